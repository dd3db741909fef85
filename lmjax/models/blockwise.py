"""Exact attention a block of scores at a time, with a backward pass that makes them again.

Forward keeps the output and the logarithm of each query's softmax sum; backward recomputes a block's weights from them
(Dao et al. 2022, arXiv 2205.14135). Blocks that the mask rules out are never made. No [T, T] array exists, in memory or
among what training saves. Written in plain JAX: it runs, and is differentiated, on any platform.

Shapes: B batch, N heads, T length of queries and of keys, H head width; "..." are batch and heads, apart or folded.
"""

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lmjax.models.masks import AttentionSpec, alibi_slopes, seen
from lmjax.models.products import transposed
from lmjax.partitioning import platform

# A row falls into blocks of _BLOCK positions; of up to twice as many while that leaves eight, as larger products are
# faster; and of more where there would be over sixteen, as each is compiled by itself.
_BLOCK = 64
# Scores handled together on one CPU: what stays in a core's cache.
_CPU_SCORES = 2 ** 19
# Below every score, and finite: its difference from another is never NaN.
UNSEEN = -1e30


class Rows(NamedTuple):
  """What tells rows apart besides q, k and v; None where nothing does.

  Attributes:
    query_segments: [..., T]; a query sees keys of its own segment.
    key_segments: [..., T].
    slopes: [..., 1, 1] ALiBi slope of the row's head.
    prefix: [..., T] booleans; a query sees keys of the prefix wherever they stand.
    shift: [] how much further on in the text the queries stand than the keys; None where both are the same part of it.
  """
  query_segments: jax.Array | None
  key_segments: jax.Array | None
  slopes: jax.Array | None
  prefix: jax.Array | None
  shift: jax.Array | None = None


def blockwise_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, spec: AttentionSpec,
                        segment_ids_BT: jax.Array | None = None, prefix_BT: jax.Array | None = None) -> jax.Array:
  """Softmax(scale q k^T) v of rows with positions 0, 1, 2, ..., every one of which sees itself.

  Args:
    q_BTNH: queries.
    k_BTNH: keys, as many heads as queries.
    v_BTNH: values.
    spec: which keys are seen.
    segment_ids_BT: queries see keys of their own segment only; None means one segment a row.
    prefix_BT: which keys are of a prefix, for a spec with one.

  Returns:
    [B, T, N, H] in the queries' type.
  """
  B, T, N, H = q_BTNH.shape
  heads_first = lambda x: x.transpose(0, 2, 1, 3)
  q, k, v = heads_first(q_BTNH * spec.scale_of(H)), heads_first(k_BTNH), heads_first(v_BTNH)
  ids, prefix = (None if x is None else x[:, None] for x in (segment_ids_BT, prefix_BT))
  slopes = jnp.asarray(alibi_slopes(N)).reshape(1, N, 1, 1) if spec.alibi else None
  together = _rows_together(B * N, T)
  if together == B * N:
    return heads_first(_attend(spec, _all_at_once, q, k, v, Rows(ids, ids, slopes, prefix)))
  # One head's scores after another's, so that those of a block are still in the cache when they are used.
  fold = lambda x: None if x is None else jnp.broadcast_to(x, (B, N, *x.shape[2:])).reshape(
      B * N // together, together, *x.shape[2:])
  args = jax.tree.map(fold, (q, k, v, Rows(ids, ids, slopes, prefix)))
  return heads_first(_attend(spec, _in_turn, *args).reshape(B, N, T, H))


def _rows_together(rows: int, length: int) -> int:
  """Returns how many rows to handle together: all but on a single CPU device."""
  if platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
    return rows
  limit = max(1, _CPU_SCORES // (min(_block(length), length) * length))
  return next(n for n in range(min(limit, rows), 0, -1) if rows % n == 0)


def _block(length: int) -> int:
  return max(_BLOCK, min(2 * _BLOCK, length // 8), -(-length // 16))


def _blocks(length: int) -> list[tuple[int, int]]:
  block = _block(length)
  return [(start, min(start + block, length)) for start in range(0, length, block)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, run, q, k, v, rows):
  return _attend_fwd(spec, run, q, k, v, rows)[0]


def _attend_fwd(spec, run, q, k, v, rows):
  y, log_sums = (checkpoint_name(x, "attention") for x in run(functools.partial(forward, spec), q, k, v, rows))
  return y, (q, k, v, rows, y, log_sums)


def _attend_bwd(spec, run, saved, dy):
  return *run(functools.partial(backward, spec), *saved, dy), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _all_at_once(function, *args):
  return function(*args)


def _in_turn(function, *args):
  return jax.lax.map(lambda one: function(*one), args)


def forward(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array,
            rows: Rows) -> tuple[jax.Array, jax.Array]:
  """Returns y [..., T, H] and the logarithms [..., T] of the softmax sums, a block of queries at a time."""
  length = q.shape[-2]
  outputs = []
  for start, stop in _blocks(length):
    low, high = spec.keys_of(start, stop, length) if rows.shift is None else (0, length)
    raw = jnp.einsum("...th,...sh->...ts", q[..., start:stop, :], k[..., low:high, :],
                     preferred_element_type=jnp.float32)
    scores, _ = _scores(spec, raw, rows, (start, stop), (low, high), -2, -1)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.einsum("...ts,...sh->...th", weights.astype(v.dtype), v[..., low:high, :])
    outputs.append(((y / total).astype(q.dtype), (top + jnp.log(total))[..., 0]))
  y, log_sums = zip(*outputs)
  return jnp.concatenate(y, axis=-2), jnp.concatenate(log_sums, axis=-1)


def backward(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, y: jax.Array,
             log_sums: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns dq, dk, dv, a block of keys at a time; scores lie transposed, [..., S, T], as most products want them.

  Where k and v are only some of the keys, y and log_sums are those over all of them.
  """
  length = q.shape[-2]
  blocks = _blocks(length)
  mean = jnp.sum((dy * y).astype(jnp.float32), axis=-1)[..., None, :]
  dq, dk, dv = [0.0] * len(blocks), [], []
  for start, stop in blocks:
    low, high = spec.queries_of(start, stop, length) if rows.shift is None else (0, length)
    keys, values, queries, out = (x[..., a:b, :] for x, a, b in (
        (k, start, stop), (v, start, stop), (q, low, high), (dy, low, high)))
    raw = jnp.einsum("...sh,...th->...st", keys, queries, preferred_element_type=jnp.float32)
    scores, slope = _scores(spec, raw, rows, (low, high), (start, stop), -1, -2)
    weights = jnp.exp(scores - log_sums[..., None, low:high])
    dv.append(jnp.einsum("...st,...th->...sh", weights.astype(dy.dtype), out))
    d_weights = jnp.einsum("...sh,...th->...st", values, out, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - mean[..., low:high]) * slope).astype(q.dtype)
    dk.append(jnp.einsum("...st,...th->...sh", d_scores, queries))
    part = jnp.einsum("...ts,...sh->...th", transposed(d_scores), keys)
    for i, (a, b) in enumerate(blocks):
      first, last = max(a, low), min(b, high)
      if first < last:
        piece = part[..., first - low:last - low, :].astype(jnp.float32)
        pad = [(0, 0)] * (piece.ndim - 2) + [(first - a, b - last), (0, 0)]
        dq[i] += piece if last - first == b - a else jnp.pad(piece, pad)
  return (jnp.concatenate(dq, axis=-2).astype(q.dtype), jnp.concatenate(dk, axis=-2), jnp.concatenate(dv, axis=-2))


def _scores(spec, raw, rows, queries, keys, query_axis, key_axis):
  """Returns scores after soft-cap, ALiBi and mask, and d scores / d raw where it is not 1."""
  slope = 1.0
  if spec.softcap is not None:
    squashed = jnp.tanh(raw / spec.softcap)
    raw, slope = spec.softcap * squashed, 1.0 - jnp.square(squashed)
  query_at, key_at = (jnp.expand_dims(jnp.arange(*span), axis) for span, axis in
                      ((queries, key_axis), (keys, query_axis)))
  if rows.shift is not None:
    query_at = query_at + rows.shift
  if spec.alibi:
    raw = raw - rows.slopes * jnp.abs(query_at - key_at).astype(jnp.float32)
  at = lambda values, span, axis: jnp.expand_dims(values[..., slice(*span)], axis)
  sees = seen(spec, query_at, key_at, None if rows.prefix is None else at(rows.prefix, keys, query_axis))
  if rows.query_segments is not None:
    sees = sees & (at(rows.query_segments, queries, key_axis) == at(rows.key_segments, keys, query_axis))
  return jnp.where(sees, raw, UNSEEN), slope
