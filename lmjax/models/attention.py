"""Attention: the projections, the key-value cache, and one function with several implementations.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head width, D model width.

A mask is described, not built: `causal`, `window`, positions and segment ids. Only the part of it that a chunk of
scores needs ever exists as an array.
"""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ModelConfig, UserError
from lmjax.models.layers import Einsum, Norm, residual_std
from lmjax.partitioning import constrain, platform

# Queries handled at a time by the chunked implementation: their scores stay in a core's cache.
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """What is static about an attention.

  Attributes:
    causal: a query sees keys at its own position and before.
    window: a query sees this many keys at most, its own included; None means no bound.
    softcap: scores are squashed to +-this.
    alibi: scores fall linearly with distance (Press et al. 2021, arXiv 2108.12409).
  """
  causal: bool = True
  window: int | None = None
  softcap: float | None = None
  alibi: bool = False


@struct.dataclass
class KVCache:
  """Keys and values of the positions decoded so far, for all layers.

  Attributes:
    key: [L, B, S, K, H].
    value: [L, B, S, K, H].
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
    start = (layer, 0, self.length - key_BTKH.shape[1], 0, 0)
    put = lambda cache, x: jax.lax.dynamic_update_slice(cache, x[None].astype(cache.dtype), start)
    return self.replace(key=put(self.key, key_BTKH), value=put(self.value, value_BTKH))

  def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns one layer's key_BSKH and value_BSKH."""
    take = lambda cache: jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    return take(self.key), take(self.value)


def init_cache(cfg: ModelConfig, batch_size: int, max_length: int) -> KVCache:
  """Returns an empty cache with `max_length` slots a sequence."""
  shape = (cfg.num_layers, batch_size, max_length, cfg.num_kv_heads, cfg.head_dim)
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
  # Written as Hugging Face writes it, so that float32 rounds alike.
  rates = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
  angles = positions[..., None, None].astype(jnp.float32) * rates
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Turns the pairs (x[i], x[i + H/2]) by their angles, in float32."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slope of each head: powers of 2^(-8/n), with every other one of 2n's filled in where n is no power of 2."""
  powers = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
  n = 2 ** int(np.log2(num_heads))
  return np.concatenate([powers(n), powers(2 * n)[::2][:num_heads - n]]).astype(np.float32)


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
    query_positions_BT: None means 0, 1, 2, ..., which also lets blocks above the diagonal be skipped.
    key_positions_BS: a key at a negative position is seen by nobody; None means 0, 1, 2, ...
    segment_ids_BT: queries see keys of their own segment only; for self-attention, T = S.
    implementation: "auto", "xla" (all scores at once), "chunked" (a block of queries at a time, less memory), or
      "cudnn" (fused, NVIDIA).

  Returns:
    [B, T, N, H] in the queries' type.
  """
  if implementation == "auto":
    implementation = _choose(q_BTNH, spec, query_positions_BT, segment_ids_BT)
  if implementation == "cudnn":
    return _cudnn(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, segment_ids_BT)
  chunk = _CHUNK if implementation == "chunked" else q_BTNH.shape[1]
  return _xla(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, key_positions_BS, segment_ids_BT, chunk)


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


def _xla(q_BTNH, k_BSKH, v_BSKH, spec: AttentionSpec, query_positions, key_positions, segment_ids, chunk) -> jax.Array:
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BKGTH = (q_BTNH * H ** -0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
  ordered = query_positions is None and key_positions is None
  outputs = []
  for start in range(0, T, chunk):
    stop = min(start + chunk, T)
    low = max(0, start + 1 - spec.window) if ordered and spec.window is not None else 0
    high = stop if ordered and spec.causal else S
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH[:, :, :, start:stop], k_BKSH[:, :, low:high],
                        preferred_element_type=jnp.float32)
    if spec.softcap is not None:
      scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    at = lambda positions, a, b: jnp.arange(a, b)[None] if positions is None else positions[:, a:b]
    query_at, key_at = at(query_positions, start, stop)[:, :, None], at(key_positions, low, high)[:, None, :]
    if spec.alibi:
      slopes = alibi_slopes(N).reshape(K, N // K, 1, 1)
      scores = scores - slopes * jnp.abs(query_at - key_at)[:, None, None].astype(jnp.float32)
    seen_BTS = _seen(spec, query_at, key_at, key_positions is not None)
    if segment_ids is not None:
      seen_BTS &= segment_ids[:, start:stop, None] == segment_ids[:, None, low:high]
    scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    outputs.append(jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH[:, :, low:high]))
  y_BKGTH = jnp.concatenate(outputs, axis=3) if len(outputs) > 1 else outputs[0]
  return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _seen(spec: AttentionSpec, query_at: jax.Array, key_at: jax.Array, may_be_empty: bool) -> jax.Array:
  """Returns [B or 1, T, S] booleans: does the query at one position see the key at the other?"""
  seen = jnp.ones(jnp.broadcast_shapes(query_at.shape, key_at.shape), bool)
  if spec.causal:
    seen &= key_at <= query_at
  if spec.window is not None:
    seen &= query_at - key_at < spec.window
  if may_be_empty:
    seen &= key_at >= 0
  return seen
