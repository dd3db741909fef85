"""Attention: the projections, the key-value cache, and one function with several implementations.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head width, D model width.
"""

from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ModelConfig, UserError
from lmjax.models.blockwise import blockwise_attention
from lmjax.models.layers import Einsum, Norm, residual_std
from lmjax.models.masks import AttentionSpec, alibi_slopes, seen
from lmjax.partitioning import constrain, platform


@struct.dataclass
class KVCache:
  """Keys and values of the positions decoded so far, for all layers.

  Attributes:
    key: [L, B, K, S, H], so that each head's keys lie together, as the products with them want it.
    value: [L, B, K, S, H].
    positions: [B, S] position held in each slot; -1 where it is empty or padding.
    length: [] slots filled so far.
  """
  key: jax.Array
  value: jax.Array
  positions: jax.Array
  length: jax.Array

  def extend(self, positions_BT: jax.Array) -> "KVCache":
    """Takes the next T slots for the given positions; each layer then writes its keys and values with `write`."""
    positions = jax.lax.dynamic_update_slice(self.positions, positions_BT, (0, self.length))
    return self.replace(positions=positions, length=self.length + positions_BT.shape[1])

  def write(self, layer: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array) -> "KVCache":
    """Writes the newest T slots of one layer."""
    start = (layer, 0, 0, self.length - key_BTKH.shape[1], 0)
    put = lambda cache, x: jax.lax.dynamic_update_slice(
        cache, x.transpose(0, 2, 1, 3)[None].astype(cache.dtype), start)
    return self.replace(key=put(self.key, key_BTKH), value=put(self.value, value_BTKH))

  def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns one layer's key_BSKH and value_BSKH."""
    take = lambda cache: jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False).transpose(0, 2, 1, 3)
    return take(self.key), take(self.value)


def init_cache(cfg: ModelConfig, batch_size: int, max_length: int) -> KVCache:
  """Returns an empty cache with `max_length` slots a sequence."""
  shape = (cfg.num_layers, batch_size, cfg.num_kv_heads, max_length, cfg.head_dim)
  zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
  return KVCache(zeros, zeros, jnp.full((batch_size, max_length), -1, jnp.int32), jnp.zeros((), jnp.int32))


class Attention(nn.Module):
  """Multi-head attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None,
               cache: KVCache | None, layer: jax.Array) -> tuple[jax.Array, KVCache | None]:
    """Returns y_BTD and the cache with this layer's keys and values written."""
    cfg = self.cfg
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    q_BTNH = Einsum(cfg, "BTD,DNH->BTNH", (D, N, H), heads, cfg.init_std, name="query")(x_BTD)
    k_BSKH = Einsum(cfg, "BTD,DKH->BTKH", (D, K, H), kv_heads, cfg.init_std, name="key")(x_BTD)
    v_BSKH = Einsum(cfg, "BTD,DKH->BTKH", (D, K, H), kv_heads, cfg.init_std, name="value")(x_BTD)
    if cfg.qk_norm:
      q_BTNH = Norm(cfg, "rmsnorm", name="query_norm")(q_BTNH)
      k_BSKH = Norm(cfg, "rmsnorm", name="key_norm")(k_BSKH)
    if cfg.position == "rotary":
      positions = jnp.arange(x_BTD.shape[1])[None] if positions_BT is None else positions_BT
      sin, cos = rotary_angles(positions, H, cfg.rope_theta)
      q_BTNH, k_BSKH = rotate(q_BTNH, sin, cos), rotate(k_BSKH, sin, cos)
    q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", None)
    k_BSKH = constrain(k_BSKH, "batch", "length", "act_kv_heads", None)
    v_BSKH = constrain(v_BSKH, "batch", "length", "act_kv_heads", None)

    key_positions_BS = positions_BT
    if cache is not None:
      cache = cache.write(layer, k_BSKH, v_BSKH)
      (k_BSKH, v_BSKH), key_positions_BS = cache.read(layer), cache.positions
    elif segment_ids_BT is not None:
      # Within a segment, order in the row is order of position; the static form lets kernels skip whole blocks.
      positions_BT = key_positions_BS = None
    spec = AttentionSpec(True, cfg.attention_window, cfg.attention_softcap, cfg.position == "alibi")
    y_BTNH = dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, spec,
        query_positions_BT=positions_BT, key_positions_BS=key_positions_BS, segment_ids_BT=segment_ids_BT,
        implementation=cfg.attention_impl if cache is None else "xla")
    y_BTNH = constrain(y_BTNH, "batch", "length", "act_heads", None)
    out = Einsum(cfg, "BTNH,NHD->BTD", (N, H, D), ("heads", "head_dim", "embed"), residual_std(cfg), name="out")
    return out(y_BTNH), cache


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines of the rotary embedding (Su et al. 2021, arXiv 2104.09864).

  Args:
    positions: [B, T] integers.
    head_dim: H.
    theta: base of the wavelengths.

  Returns:
    Two arrays [B, T, 1, H / 2] in float32.
  """
  # Rounded where Hugging Face rounds, for at far positions the last bit of a rate shows in the logits. NumPy's own
  # float32 powers differ between processors.
  exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)
  rates = np.float32(1.0) / (theta ** exponents).astype(np.float32)
  angles = positions[..., None, None].astype(jnp.float32) * rates
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Turns the pairs (x[i], x[i + H/2]) by their angles, in float32."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTNH.dtype)


def dot_product_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spec: AttentionSpec, *,
    query_positions_BT: jax.Array | None = None, key_positions_BS: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None, implementation: str = "auto") -> jax.Array:
  """Softmax(q k^T / sqrt(H)) v under the mask that `spec`, positions and segment ids describe.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; K divides N.
    v_BSKH: values.
    spec: what is static.
    query_positions_BT: None means 0, 1, 2, ..., which lets blocks that the mask rules out be skipped; with positions
      given, all scores are made at once.
    key_positions_BS: a key at a negative position is seen by nobody; None means 0, 1, 2, ...
    segment_ids_BT: queries see keys of their own segment only; for self-attention, T = S.
    implementation: "auto", "xla" (all scores at once), "chunked" (a block of scores at a time, made again in the
      backward pass), or "cudnn" (fused, NVIDIA).

  Returns:
    [B, T, N, H] in the queries' type.
  """
  if implementation == "auto":
    implementation = _choose(q_BTNH, spec, query_positions_BT, segment_ids_BT)
  if implementation == "cudnn":
    return _cudnn(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, segment_ids_BT)
  if implementation == "chunked" and query_positions_BT is None and key_positions_BS is None:
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    each = lambda x: jnp.repeat(x, groups, axis=2) if groups > 1 else x
    return blockwise_attention(q_BTNH, each(k_BSKH), each(v_BSKH), spec, segment_ids_BT)
  return _xla(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, key_positions_BS, segment_ids_BT)


def _choose(q: jax.Array, spec: AttentionSpec, positions: Any, segment_ids: Any) -> str:
  plain = spec.softcap is None and not spec.alibi and positions is None and segment_ids is None
  # 128 is what the fused kernels take on every card that has them.
  if platform() == "gpu" and plain and q.dtype != jnp.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
    return "cudnn"
  return "chunked"


def _cudnn(q, k, v, spec: AttentionSpec, positions, segment_ids) -> jax.Array:
  refused = [name for name, given in (("attention_softcap", spec.softcap), ("alibi positions", spec.alibi),
                                      ("documents in one example", segment_ids is not None),
                                      ("a key-value cache", positions is not None)) if given]
  if refused:
    raise UserError(f"config.model.attention_impl is cudnn, which does not do {' or '.join(refused)}; use auto.")
  window = None if spec.window is None else (spec.window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, is_causal=spec.causal, local_window_size=window, implementation="cudnn")


def _xla(q_BTNH, k_BSKH, v_BSKH, spec: AttentionSpec, query_positions, key_positions, segment_ids) -> jax.Array:
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * H ** -0.5).reshape(B, T, K, N // K, H)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  if spec.softcap is not None:
    scores = spec.softcap * jnp.tanh(scores / spec.softcap)
  query_at = (jnp.arange(T)[None] if query_positions is None else query_positions)[:, :, None]
  key_at = (jnp.arange(S)[None] if key_positions is None else key_positions)[:, None, :]
  if spec.alibi:
    slopes = alibi_slopes(N).reshape(K, N // K, 1, 1)
    scores = scores - slopes * jnp.abs(query_at - key_at)[:, None, None].astype(jnp.float32)
  seen_BTS = seen(spec, query_at, key_at)
  if key_positions is not None:
    seen_BTS &= key_at >= 0
  if segment_ids is not None:
    seen_BTS &= segment_ids[:, :, None] == segment_ids[:, None, :]
  scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)
