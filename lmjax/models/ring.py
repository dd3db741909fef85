"""Exact attention over a sequence that is split between devices (mesh axis `context`).

Keys and values go round a ring of devices (Liu et al. 2023, arXiv 2310.01889), or are gathered by all of them (Llama 3,
arXiv 2407.21783, section 3.3.2): config.model.context_attention. A device joins what it gets of each part by the
logarithms of the softmax sums; backward goes the same way again, with the gradients of keys and values on board.

A causal sequence of 2C chunks on C devices is so dealt that device d has chunks d and 2C - 1 - d: every device then has
the same work, where in order the last would have twice the mean (as in section 3.3.2 there). Only inside of this
function is the order another: q, k and v come, and the result goes, in the order of the text.

Shapes: B batch, T length, N heads, K key-value heads, H head width, C devices that split the length, L = T / 2C length
of a chunk; "2" is a device's two chunks.
"""

import functools
from typing import Any, Callable

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lmjax import partitioning
from lmjax.models import blockwise
from lmjax.models.masks import AttentionSpec, alibi_slopes
from lmjax.partitioning import moved, ways

_QUERIES, _KEYS = ("batch", "length", "act_heads", None), ("batch", "length", "act_kv_heads", None)
_SUMS, _IDS, _SLOPES = ("batch", "act_heads", "length"), ("batch", "length"), ("act_heads",)


def is_served(q_BTNH: jax.Array, k_BTKH: jax.Array) -> bool:
  """Is the length split, and do the sizes divide by the mesh in use?"""
  B, T, N, _ = q_BTNH.shape
  sizes = (B, "batch"), (N, "act_heads"), (k_BTKH.shape[2], "act_kv_heads")
  divides = all(size % ways(name) == 0 for size, name in sizes) and T % (2 * ways("length")) == 0
  return ways("length") > 1 and divides and T == k_BTKH.shape[1]


def split_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, spec: AttentionSpec, gather: bool,
                    segment_ids_BT: jax.Array | None = None, prefix_BT: jax.Array | None = None) -> jax.Array:
  """Softmax(scale q k^T) v of rows with positions 0, 1, 2, ..., each split over the devices of "length".

  Args:
    q_BTNH: queries.
    k_BTKH: keys; K divides N.
    v_BTKH: values.
    spec: which keys are seen.
    gather: whether all devices gather the keys and values, rather than pass them round.
    segment_ids_BT: queries see keys of their own segment only; None means one segment a row.
    prefix_BT: which keys are of a prefix, for a spec with one.

  Returns:
    [B, T, N, H] in the queries' type.
  """
  N, H = q_BTNH.shape[2:]
  sides = {"segments": segment_ids_BT, "prefix": prefix_BT,
           "slopes": jnp.asarray(alibi_slopes(N)) if spec.alibi else None}
  sides = {name: value for name, value in sides.items() if value is not None}
  return _attend((spec, gather), partitioning.in_stage(), q_BTNH * spec.scale_of(H), k_BTKH, v_BTKH, sides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(how, in_stage, q, k, v, sides):
  return _attend_fwd(how, in_stage, q, k, v, sides)[0]


def _attend_fwd(how, in_stage, q, k, v, sides):
  run = _on_devices(functools.partial(_forward, *how), (_QUERIES, _KEYS, _KEYS), sides, [_QUERIES, _SUMS])
  y, log_sums = (checkpoint_name(x, "attention") for x in run(q, k, v, *sides.values()))
  return y, (q, k, v, sides, y, log_sums)


def _attend_bwd(how, in_stage, saved, dy):
  q, k, v, sides, y, log_sums = saved
  with partitioning.each_stage(in_stage):
    run = _on_devices(functools.partial(_backward, *how), (_QUERIES, _KEYS, _KEYS, _QUERIES, _SUMS, _QUERIES), sides,
                      [_QUERIES, _KEYS, _KEYS])
    return *run(q, k, v, y, log_sums, dy, *sides.values()), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _on_devices(function: Callable, names: tuple, sides: dict, output: list) -> Callable:
  split = names + tuple(_SLOPES if side == "slopes" else _IDS for side in sides)

  def on_one(*args):
    return function(*args[:len(names)], dict(zip(sides, args[len(names):])))

  return partitioning.on_each_device(on_one, split, output, checked=False)


def _forward(spec, gather, q, k, v, sides):
  """Returns y [B, T, N, H] and the logarithms [B, N, T] of the softmax sums, of a device's part."""
  queries, keys = _dealt(spec, q, k, v, sides)

  def take(total, travels, part, keys):
    for i, j in _pairs(spec):
      found = _by_place(functools.partial(blockwise.forward, spec), spec, part, queries, keys, i, j)
      joined = _joined(*(x[i] for x in total), *found)
      total = tuple(x.at[i].set(one) for x, one in zip(total, joined))
    return total, travels

  halves = queries["q"]
  start = jnp.zeros(halves.shape, jnp.float32), jnp.full(halves.shape[:-1], blockwise.UNSEEN, jnp.float32)
  (y, log_sums), _ = (_all_at_hand if gather else _round)(take, start, (), keys)
  return _returned(spec, y).astype(q.dtype).swapaxes(1, 2), _returned(spec, log_sums[..., None])[..., 0]


def _backward(spec, gather, q, k, v, y, log_sums, dy, sides):
  """Returns dq, dk and dv of a device's part."""
  queries, keys = _dealt(spec, q, k, v, sides)
  y, dy = (_deal(spec, x.swapaxes(1, 2)) for x in (y, dy))
  log_sums = _deal(spec, log_sums[..., None])[..., 0]
  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)

  def take(dq, of_keys, part, keys):
    for i, j in _pairs(spec):
      found = _by_place(functools.partial(blockwise.backward, spec), spec, part, queries, keys, i, j,
                        y[i], log_sums[i], dy[i])
      dq = dq.at[i].add(found[0])
      of_keys = tuple(x.at[j].add(_sum_of_groups(one, x.shape[2])) for x, one in zip(of_keys, found[1:]))
    return dq, of_keys

  of_keys = zeros(keys["k"]), zeros(keys["v"])
  dq, (dk, dv) = (_all_at_hand if gather else _round)(take, zeros(queries["q"]), of_keys, keys)
  return tuple(_returned(spec, x).swapaxes(1, 2).astype(like.dtype) for x, like in zip((dq, dk, dv), (q, k, v)))


def _round(take: Callable, stays: Any, travels: Any, keys: dict) -> tuple[Any, Any]:
  """Passes keys round the ring, this device's own first, and with them what is added up for them.

  Args:
    take: (stays, travels, part, keys of that part) -> (stays, travels).
    stays: added up for the queries.
    travels: added up for the keys; () where nothing is.
    keys: of this device.

  Returns:
    `stays`, and what has been added up of this device's keys.
  """
  count, here = ways("length"), partitioning.device_index("length")

  def step(carry, number):
    stays, travels, keys = carry
    sent = _next(keys)  # On its way while these are worked on.
    stays, travels = take(stays, travels, (here - number) % count, keys)
    return (stays, _next(travels), sent), None

  (stays, travels, keys), _ = jax.lax.scan(step, (stays, travels, keys), jnp.arange(count - 1))
  stays, travels = take(stays, travels, (here + 1) % count, keys)
  return stays, _next(travels)  # The last step of the round brings them home.


def _next(tree: Any) -> Any:
  count = ways("length")
  return moved(tree, "length", [(device, (device + 1) % count) for device in range(count)])


def _all_at_hand(take: Callable, stays: Any, travels: Any, keys: dict) -> tuple[Any, Any]:
  """Does what `_round` does by gathering the keys of all devices."""
  whole = lambda x: partitioning.gather_rows(x[None], "length")
  parts = jnp.arange(ways("length")), jax.tree.map(whole, keys)
  stays, of_parts = jax.lax.scan(lambda stays, part: take(stays, travels, *part), stays, parts)
  return stays, jax.tree.map(lambda x: partitioning.scatter_sum_rows(x, "length")[0], of_parts)


def _by_place(function: Callable, spec: AttentionSpec, part: jax.Array, queries: dict, keys: dict, i: int, j: int,
              *more: jax.Array) -> tuple:
  """Returns `function` of this device's chunk i of queries and a part's chunk j of keys: of what is seen of it."""
  q = queries["q"][i]
  groups = q.shape[1] // keys["k"].shape[2]
  k, v = (jnp.repeat(keys[name][j], groups, axis=1) for name in ("k", "v"))
  length, pick = q.shape[2], lambda side, name, half: side[name][half] if name in side else None
  rows = blockwise.Rows(pick(queries, "segments", i), pick(keys, "segments", j), queries.get("slopes"),
                        pick(keys, "prefix", j))
  ahead = _chunk(spec, partitioning.device_index("length"), i) - _chunk(spec, part, j)
  nothing = jax.eval_shape(lambda: function(q, k, v, rows, *more))

  def skip():
    fills = (0, blockwise.UNSEEN) if len(nothing) == 2 else (0, 0, 0)
    return tuple(jnp.full(x.shape, fill, x.dtype) for x, fill in zip(nothing, fills))

  seen = jnp.bool_(True)
  if spec.causal and not spec.prefix:
    seen &= ahead >= 0
  if spec.window is not None:
    seen &= (ahead - 1) * length + 1 < spec.window
  branches = [skip, lambda: function(q, k, v, rows, *more),
              lambda: function(q, k, v, rows._replace(shift=ahead * length), *more)]
  return jax.lax.switch(jnp.where(seen, jnp.where(ahead == 0, 1, 2), 0), branches)


def _pairs(spec: AttentionSpec) -> list[tuple[int, int]]:
  """Returns which chunks of queries may see which of keys: the lower one of a device never sees a higher one."""
  never = [(0, 1)] if spec.causal and not spec.prefix else []
  return [pair for pair in ((0, 0), (0, 1), (1, 0), (1, 1)) if pair not in never]


def _chunk(spec: AttentionSpec, part: jax.Array, half: int) -> jax.Array:
  """Returns which chunk of the sequence a device has."""
  if not spec.causal:
    return 2 * part + half
  return 2 * ways("length") - 1 - part if half else part


def _joined(y, log_sums, other_y, other_log_sums):
  """Returns softmax-weighted sums over some keys and over others as one over both."""
  both = jnp.logaddexp(log_sums, other_log_sums)
  share = lambda part: jnp.exp(part - both)[..., None]
  return y * share(log_sums) + other_y.astype(jnp.float32) * share(other_log_sums), both


def _sum_of_groups(x: jax.Array, num_kv_heads: int) -> jax.Array:
  B, N, L, H = x.shape
  return jnp.sum(x.astype(jnp.float32).reshape(B, num_kv_heads, N // num_kv_heads, L, H), axis=2)


def _dealt(spec, q, k, v, sides):
  """Returns what a device has of queries, {q [2, B, N, L, H], segments [2, B, 1, L], slopes}, and of keys likewise."""
  ids = {name: _deal(spec, x[:, None, :, None])[..., 0] for name, x in sides.items() if name != "slopes"}
  q, k, v = (_deal(spec, x.swapaxes(1, 2)) for x in (q, k, v))
  slopes = {name: x.reshape(1, -1, 1, 1) for name, x in sides.items() if name == "slopes"}
  return {"q": q, **ids, **slopes}, {"k": k, "v": v, **ids}


def _deal(spec, x):
  """Returns [2, B, N, L, H], the chunks that a device is to have, of its [B, N, T, H] in the order of the text."""
  halves = jnp.stack(jnp.split(x, 2, axis=2))
  if not spec.causal:
    return halves
  first, second = (moved(halves[half], "length", _routes(half)) for half in range(2))
  return _lower_first(jnp.stack([first, second]))


def _returned(spec, chunks):
  """Does what `_deal` does the other way round."""
  if spec.causal:
    chunks = _lower_first(chunks)
    back = lambda half: [(to, start) for start, to in _routes(half)]
    chunks = [moved(chunks[half], "length", back(half)) for half in range(2)]
  return jnp.concatenate(list(chunks), axis=2)


def _routes(half: int) -> list[tuple[int, int]]:
  """Returns where each device sends a half of its part: chunk j of 2C goes to device min(j, 2C - 1 - j)."""
  count = ways("length")
  return [(device, min(2 * device + half, 2 * (count - device) - 1 - half)) for device in range(count)]


def _lower_first(pair: jax.Array) -> jax.Array:
  """Swaps, on odd devices, what came from first halves (even chunks) and from second halves; its own inverse."""
  return jnp.where(partitioning.device_index("length") % 2 == 0, pair, pair[::-1])
