"""Attention: the projections, the key-value cache, and one function with several implementations.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head width, D model width.
"""

import dataclasses
from typing import Any, Callable

from flax import linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lmjax.config import ModelConfig, UserError
from lmjax.models import ring
from lmjax.models.blockwise import blockwise_attention
from lmjax.models.layers import Einsum, Norm, residual_std
from lmjax.models.masks import AttentionSpec, alibi_slopes, seen
from lmjax.models.rope import rotary_angles, rotate
from lmjax.models.splash import TILE, not_served, splash_attention
from lmjax.parametrization import attention_scale, base_head_dim
from lmjax.partitioning import constrain, platform


@struct.dataclass
class KVCache:
  """Keys and values of the positions decoded so far, for all layers.

  Attributes:
    key: [L, B, K, S, H], so that each head's keys lie together, as the products with them want it.
    value: [L, B, K, S, H].
    positions: [B, S] position held in each slot; -1 where it is empty or padding.
    length: [] slots filled so far.
    cross: the same of the sequence that cross-attention reads.
  """
  key: jax.Array
  value: jax.Array
  positions: jax.Array
  length: jax.Array
  cross: "KVCache | None" = None

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
  num_layers = cfg.num_decoder_layers if cfg.architecture == "encoder_decoder" else cfg.num_layers
  shape = (num_layers, batch_size, cfg.num_kv_heads, max_length, cfg.head_dim)
  zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
  return KVCache(zeros, zeros, jnp.full((batch_size, max_length), -1, jnp.int32), jnp.zeros((), jnp.int32))


@struct.dataclass
class Context:
  """What all blocks of a stack read besides the residual stream; None where there is none.

  Attributes:
    positions_BT: positions of the tokens; None means 0, 1, 2, ...
    segment_ids_BT: attention stays within equal ids, which count from 1; 0 is padding.
    bias_BNTS: added to the scores of self-attention; B may be 1.
    encoded_BSD: what cross-attention reads; None where the cache has its keys and values.
    encoded_segment_ids_BS: its segment ids; None means that all of it is seen.
    prefix_BT: booleans of the tokens that are seen from both sides in a decoder, beside a cache of all its slots; None
      means none.
  """
  positions_BT: jax.Array | None = None
  segment_ids_BT: jax.Array | None = None
  bias_BNTS: jax.Array | None = None
  encoded_BSD: jax.Array | None = None
  encoded_segment_ids_BS: jax.Array | None = None
  prefix_BT: jax.Array | None = None


class Attention(nn.Module):
  """Multi-head attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245).

  Attributes:
    cfg: the model's settings.
    causal: whether a token sees none after it.
    cross: whether keys and values are of the encoded sequence.
  """
  cfg: ModelConfig
  causal: bool = True
  cross: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: KVCache | None,
               layer: jax.Array) -> tuple[jax.Array, KVCache | None]:
    """Returns y_BTD and the cache with this layer's keys and values written."""
    cfg = self.cfg
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    into = lambda name, shape, axes, std=cfg.init_std: Einsum(
        cfg, "BTD,DNH->BTNH", shape, axes, std, cfg.qkv_bias, name=name)
    norm = lambda name: Norm(cfg, "rmsnorm", 1 if cfg.qk_norm == "head" else 2, name=name)
    q_BTNH = into("query", (D, N, H), heads, _query_std(cfg))(x_BTD)
    if cfg.qk_norm != "none":
      q_BTNH = norm("query_norm")(q_BTNH)
    source = context.encoded_BSD if self.cross else x_BTD
    if source is None:
      k_BSKH, v_BSKH = cache.cross.read(layer)
    else:
      k_BSKH = into("key", (D, K, H), kv_heads)(source)
      v_BSKH = into("value", (D, K, H), kv_heads)(source)
      if cfg.qk_norm != "none":
        k_BSKH = norm("key_norm")(k_BSKH)
    local = is_local(cfg, layer)
    if cfg.position == "rotary" and not self.cross:
      positions = jnp.arange(x_BTD.shape[1])[None] if context.positions_BT is None else context.positions_BT
      sin, cos = _by_kind(local, lambda local: rotary_angles(cfg, positions, local))
      q_BTNH, k_BSKH = rotate(q_BTNH, sin, cos), rotate(k_BSKH, sin, cos)
    q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", None)
    k_BSKH = constrain(k_BSKH, "batch", "length", "act_kv_heads", None)
    v_BSKH = constrain(v_BSKH, "batch", "length", "act_kv_heads", None)
    if self.is_mutable_collection("intermediates"):  # Which nothing but a look into the model asks for.
      scale = AttentionSpec(scale=attention_scale(cfg)).scale_of(H)
      keys = jnp.repeat(k_BSKH, N // K, axis=2)
      self.sow("intermediates", "scores", jnp.einsum("BTNH,BSNH->BNTS", q_BTNH * scale, keys))
    if self.cross:
      y_BTNH, cache = self._see_encoded(q_BTNH, k_BSKH, v_BSKH, context, cache, layer)
    else:
      y_BTNH, cache = self._see_itself(q_BTNH, k_BSKH, v_BSKH, context, cache, layer, local)
    y_BTNH = constrain(y_BTNH, "batch", "length", "act_heads", None)
    out = Einsum(cfg, "BTNH,NHD->BTD", (N, H, D), ("heads", "head_dim", "embed"), residual_std(cfg), cfg.out_bias,
                 name="out")
    return out(y_BTNH), cache

  def _see_encoded(self, q_BTNH, k_BSKH, v_BSKH, context, cache, layer):
    spec = AttentionSpec(causal=False, softcap=self.cfg.attention_softcap, scale=attention_scale(self.cfg))
    # Without segments of the encoded sequence all of it is seen, whatever the queries'.
    segment_ids_BT = None if context.encoded_segment_ids_BS is None else context.segment_ids_BT
    key_positions_BS = None
    if context.encoded_BSD is None:
      key_positions_BS = cache.cross.positions
    elif cache is not None:
      cache = cache.replace(cross=cache.cross.write(layer, k_BSKH, v_BSKH))
    return dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, spec, key_positions_BS=key_positions_BS, segment_ids_BT=segment_ids_BT,
        key_segment_ids_BS=context.encoded_segment_ids_BS, implementation="xla"), cache

  def _see_itself(self, q_BTNH, k_BSKH, v_BSKH, context, cache, layer, local):
    cfg = self.cfg
    positions_BT = key_positions_BS = context.positions_BT
    if cache is not None:
      cache = cache.write(layer, k_BSKH, v_BSKH)
      (k_BSKH, v_BSKH), key_positions_BS = cache.read(layer), cache.positions
    elif context.segment_ids_BT is not None or not self.causal:
      # Within a segment, order in the row is order of position; the static form lets kernels skip whole blocks.
      positions_BT = key_positions_BS = None

    def attend(local):
      spec = AttentionSpec(self.causal, cfg.attention_window if local else None, cfg.attention_softcap,
                           cfg.position == "alibi", attention_scale(cfg))
      return dot_product_attention(
          q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT=positions_BT, key_positions_BS=key_positions_BS,
          segment_ids_BT=context.segment_ids_BT, prefix_BS=context.prefix_BT, bias_BNTS=context.bias_BNTS,
          implementation=cfg.attention_impl if cache is None else "xla", context_attention=cfg.context_attention)
    return _by_kind(local, attend), cache


def _query_std(cfg: ModelConfig) -> float:
  # With cfg.init "fan_in", scores start with unit variance whatever their scale; T5 has none.
  unit = cfg.init == "normal" or cfg.attention_scale is None
  return cfg.init_std if unit else cfg.init_std / (cfg.attention_scale * base_head_dim(cfg) ** 0.5)


def is_local(cfg: ModelConfig, layer: jax.Array) -> bool | jax.Array:
  """Is this a local layer? A Python bool where all are of one kind, else an array, for the layers share one program."""
  kinds = [kind == "local" for kind in cfg.attention_pattern] or [cfg.attention_window is not None]
  return kinds[0] if len(set(kinds)) == 1 else jnp.array(kinds)[layer % len(kinds)]


def _by_kind(local: bool | jax.Array, function: Callable[[bool], Any]) -> Any:
  """Returns function(local), with a local and a global branch of which one runs where that is not known before."""
  if isinstance(local, bool):
    return function(local)
  return jax.lax.cond(local, lambda: function(True), lambda: function(False))


def dot_product_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spec: AttentionSpec, *,
    query_positions_BT: jax.Array | None = None, key_positions_BS: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None, key_segment_ids_BS: jax.Array | None = None,
    prefix_BS: jax.Array | None = None, bias_BNTS: jax.Array | None = None, implementation: str = "auto",
    context_attention: str = "ring") -> jax.Array:
  """Softmax(scale q k^T + bias) v under the mask that `spec`, positions and segment ids describe.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; K divides N.
    v_BSKH: values.
    spec: what is static.
    query_positions_BT: None means 0, 1, 2, ..., which lets blocks that the mask rules out be skipped; with positions
      given, all scores are made at once.
    key_positions_BS: a key at a negative position is seen by nobody; None means 0, 1, 2, ...
    segment_ids_BT: queries see keys of their own segment only; None beside `key_segment_ids_BS` means all of segment 1.
    key_segment_ids_BS: of keys of another sequence; None means that keys stand where queries do, T = S.
    prefix_BS: booleans of keys that queries see wherever they stand, such as those of a prefix; None means none.
    bias_BNTS: added to the scores; with it, all scores are made at once.
    implementation: "auto", "xla" (all scores at once), "chunked" (a block of scores at a time, made again in the
      backward pass), "cudnn" (fused, NVIDIA), or "splash" (fused, TPU).
    context_attention: "ring" or "gather", how keys and values reach queries where the length is split (ring.py).

  Returns:
    [B, T, N, H] in the queries' type.
  """
  if key_segment_ids_BS is None:
    key_segment_ids_BS = segment_ids_BT
  elif segment_ids_BT is None:
    segment_ids_BT = jnp.ones(q_BTNH.shape[:2], key_segment_ids_BS.dtype)
  if prefix_BS is not None:
    spec = dataclasses.replace(spec, prefix=True)
  positions = query_positions_BT if key_positions_BS is None else key_positions_BS
  in_order = positions is None
  if in_order and bias_BNTS is None and implementation in ("auto", "chunked") and ring.is_served(q_BTNH, k_BSKH):
    return ring.split_attention(q_BTNH, k_BSKH, v_BSKH, spec, context_attention == "gather", segment_ids_BT, prefix_BS)
  if implementation == "auto" and bias_BNTS is None:
    implementation = _choose(q_BTNH, spec, positions, segment_ids_BT)
  if implementation == "splash":
    return splash_attention(q_BTNH, k_BSKH, v_BSKH, spec, segment_ids_BT, positions, bias_BNTS)
  if bias_BNTS is not None:
    return _xla(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, key_positions_BS, segment_ids_BT, key_segment_ids_BS,
                prefix_BS, bias_BNTS)
  if implementation == "cudnn":
    return _cudnn(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, segment_ids_BT)
  if implementation == "chunked" and in_order:
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    each = lambda x: jnp.repeat(x, groups, axis=2) if groups > 1 else x
    return blockwise_attention(q_BTNH, each(k_BSKH), each(v_BSKH), spec, segment_ids_BT, prefix_BS)
  return _xla(q_BTNH, k_BSKH, v_BSKH, spec, query_positions_BT, key_positions_BS, segment_ids_BT, key_segment_ids_BS,
              prefix_BS)


def _choose(q: jax.Array, spec: AttentionSpec, positions: Any, segment_ids: Any) -> str:
  plain = spec.softcap is None and not (spec.alibi or spec.prefix) and positions is None and segment_ids is None
  # 128 is what the fused kernels take on every card that has them.
  if platform() == "gpu" and plain and q.dtype != jnp.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
    return "cudnn"
  if platform() == "tpu" and q.shape[1] % TILE == 0 and not not_served(spec, positions):
    return "splash"
  return "chunked"


def _cudnn(q, k, v, spec: AttentionSpec, positions, segment_ids) -> jax.Array:
  refused = [name for name, given in (("attention_softcap", spec.softcap), ("alibi positions", spec.alibi),
                                      ("prefixes", spec.prefix),
                                      ("documents in one example", segment_ids is not None),
                                      ("a key-value cache", positions is not None)) if given]
  if refused:
    raise UserError(f"config.model.attention_impl is cudnn, which does not do {' or '.join(refused)}; use auto.")
  window = None if spec.window is None else (spec.window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, scale=spec.scale, is_causal=spec.causal, local_window_size=window,
                                      implementation="cudnn")


def _xla(q_BTNH, k_BSKH, v_BSKH, spec: AttentionSpec, query_positions, key_positions, segment_ids, key_segment_ids,
         prefix_BS, bias_BNTS=None) -> jax.Array:
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * spec.scale_of(H)).reshape(B, T, K, N // K, H)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  if spec.softcap is not None:
    scores = spec.softcap * jnp.tanh(scores / spec.softcap)
  query_at = (jnp.arange(T)[None] if query_positions is None else query_positions)[:, :, None]
  key_at = (jnp.arange(S)[None] if key_positions is None else key_positions)[:, None, :]
  if spec.alibi:
    slopes = alibi_slopes(N).reshape(K, N // K, 1, 1)
    scores = scores - slopes * jnp.abs(query_at - key_at)[:, None, None].astype(jnp.float32)
  if bias_BNTS is not None:
    scores = scores + bias_BNTS.reshape(bias_BNTS.shape[0], K, N // K, T, S).astype(jnp.float32)
  seen_BTS = seen(spec, query_at, key_at, None if prefix_BS is None else prefix_BS[:, None])
  if key_positions is not None:
    seen_BTS &= key_at >= 0
  if segment_ids is not None:
    seen_BTS &= segment_ids[:, :, None] == key_segment_ids[:, None, :]
  scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
  y_BTNH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, v_BSKH.shape[-1])
  return checkpoint_name(y_BTNH, "attention")
