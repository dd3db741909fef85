"""Attention by JAX's Pallas kernel for TPUs, "splash", which makes no score that the mask rules out with its block.

Like `blockwise` it keeps the output and the logarithm of each query's softmax sum, and makes the scores again in the
backward pass (Dao et al. 2022, arXiv 2205.14135). On CPUs the kernel is interpreted: slow, and there for the tests.

Shapes: B batch, T length of queries and of keys, N query heads, K key-value heads, H head width.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp

from lmjax import partitioning
from lmjax.config import UserError
from lmjax.models.masks import AttentionSpec

# The kernel works on whole tiles of a TPU's registers.
TILE = 128
# (rows of at least this length, fall into blocks of this many positions); smaller ones skip more of a mask.
_BLOCKS = ((4096, 1024), (0, 512))
# Bytes of a block's queries at most: with more the kernels of some TPUs do not fit their vector memory.
_BLOCK_BYTES = 2 ** 19
# Scores are made for this many keys of a block at a time.
_COMPUTED = 512
# One backward kernel makes all gradients, but the queries' once a block of keys, to be added up; of more blocks than
# this they would fill the memory, and a kernel of their own makes them.
_FUSED_BLOCKS = 8


def not_served(spec: AttentionSpec, positions: Any = None, bias: Any = None) -> list[str]:
  """Returns the names of what is asked for and the kernel does not do."""
  return [name for name, given in (("alibi positions", spec.alibi), ("prefixes", spec.prefix),
                                   ("a relative bias", bias is not None),
                                   ("explicit positions or a key-value cache", positions is not None),
                                   ("GPUs", partitioning.platform() == "gpu")) if given]


def splash_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, spec: AttentionSpec,
                     segment_ids_BT: jax.Array | None = None, positions: Any = None, bias: Any = None) -> jax.Array:
  """Softmax(scale q k^T) v of rows with positions 0, 1, 2, ..., on each device for its rows and heads.

  Args:
    q_BTNH: queries.
    k_BTKH: keys; K divides N, and they are not repeated.
    v_BTKH: values.
    spec: which keys are seen.
    segment_ids_BT: queries see keys of their own segment only; None means one segment a row.
    positions: of queries or keys, which the kernel does not take.
    bias: of scores, which it does not take either.

  Returns:
    [B, T, N, H] in the queries' type.

  Raises:
    UserError: where the kernel does not do what is asked for.
  """
  refused = not_served(spec, positions, bias)
  if refused:
    raise UserError(f"config.model.attention_impl is splash, which does not do {' or '.join(refused)}; use auto.")
  B, T, _, H = q_BTNH.shape
  rows, places = -B % partitioning.ways("batch"), -T % TILE
  if places and segment_ids_BT is None and not spec.causal:
    segment_ids_BT = jnp.ones((B, T), jnp.int32)
  # What is filled up has a segment of its own; without segments no query sees it, as it comes last.
  full = lambda x, value: jnp.pad(x, [(0, rows), (0, places), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
  args = [full(q_BTNH * spec.scale_of(H), 0), full(k_BTKH, 0), full(v_BTKH, 0)]
  names = [("batch", None, heads, None) for heads in ("act_heads", "act_kv_heads", "act_kv_heads")]
  if segment_ids_BT is not None:
    args, names = [*args, full(segment_ids_BT, -1)], [*names, ("batch", None)]

  def on_one(q, k, v, segment_ids=None):
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    y = jax.vmap(_kernel(spec, q))(heads_first(q), heads_first(k), heads_first(v), segment_ids)
    return heads_first(y)

  # The kernel's results do not say over which devices they differ.
  y = partitioning.on_each_device(on_one, names, names[0], checked=False)(*args)
  return y[:B, :T]


def _kernel(spec: AttentionSpec, q_BTNH: jax.Array) -> Callable[..., jax.Array]:
  """Returns a function of q [N, T, H], k and v [K, T, H] and segment ids [T] or None, those of one row."""
  # It takes a while to import, and most platforms never need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  _, T, N, H = q_BTNH.shape
  if spec.window is not None:
    mask = splash.LocalMask((T, T), (spec.window - 1, 0 if spec.causal else None), 0)
  else:
    mask = splash.CausalMask((T, T)) if spec.causal else splash.FullMask((T, T))
  # Narrow heads would be filled up to a tile wherever they lie last, in what training saves of all layers too.
  layout = splash.QKVLayout.SEQ_MINOR if H < TILE else splash.QKVLayout.HEAD_DIM_MINOR
  sizes = splash.BlockSizes(**_block_sizes(T, H * q_BTNH.dtype.itemsize), q_layout=layout, k_layout=layout,
                            v_layout=layout)
  run = splash.make_splash_mha_single_device(
      splash.MultiHeadMask([mask] * N), block_sizes=sizes, attn_logits_soft_cap=spec.softcap,
      residual_checkpoint_name="attention", interpret=partitioning.platform() == "cpu")
  return lambda q, k, v, ids: run(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))


def _block_sizes(length: int, query_bytes: int) -> dict[str, int | bool]:
  """Returns the kernel's block sizes for rows of a length that TILE divides, and heads of so many bytes a query."""
  block = next(block for least, block in _BLOCKS if length >= least)
  while length % block or (block > TILE and block * query_bytes > _BLOCK_BYTES):
    block //= 2
  computed = min(block, _COMPUTED)
  sizes = dict(block_q=block, block_kv=block, block_kv_compute=computed, block_q_dkv=block, block_kv_dkv=block,
               block_kv_dkv_compute=computed)
  if length // block <= _FUSED_BLOCKS:
    return dict(sizes, use_fused_bwd_kernel=True)
  return dict(sizes, block_q_dq=block, block_kv_dq=block)
