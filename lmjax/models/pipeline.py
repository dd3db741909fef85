"""Layers in stages (mesh axis `stage`): each device has some of them, and microbatches pass from stage to stage.

One loop makes both schedules. In a tick every stage runs its layers on the microbatch it has, and hands the result to
the next. S stages and M microbatches that go round R times (config.model.stage_repeats) take M R + S - 1 ticks, of
which S - 1 find a stage without work: the bubble is (S - 1) / (M R + S - 1). R = 1 is GPipe (Huang et al. 2018, arXiv
1811.06965); with R > 1 a stage has R groups of layers that do not lie together (Narayanan et al. 2021, arXiv
2104.04473, section 2.2), for which parameters, stored in the order of layers, change places once a step.

Microbatches wait on a belt [S, k, ...] with M = S k places, split over the stages as the batch is outside of here, so
that embeddings and loss, too, are the work of all. Tick t turns place t mod k: the first stage takes a microbatch off
it, the others move up by one, and what the last stage has made lies down in the gap.

Shapes: B batch, T length, D model width, L layers, b rows of a microbatch, S, M, R, k as above, l = L / (S R).
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lmjax import partitioning
from lmjax.models.attention import Context
from lmjax.partitioning import num_stages

_MOST_A_STAGE = 8  # Microbatches, where none are asked for: a bubble of a ninth at most.

# (parameters [l, ...], x [b, T, D], numbers [l] of the layers, what they read, a key or None) -> (x, what is reported)
Layers = Callable[[Any, jax.Array, jax.Array, Context, jax.Array | None], tuple[jax.Array, Any]]


def is_served(batch: int) -> bool:
  """Are there stages, and does the batch divide by the devices?"""
  return num_stages() > 1 and batch % partitioning.ways("batch") == 0


def run(layers: Layers, params: Any, x_BTD: jax.Array, context: Context, key: jax.Array | None,
        microbatches: int | None, repeats: int, checkpoint: Callable[[Callable], Callable]) -> tuple[jax.Array, Any]:
  """Runs all layers.

  Args:
    layers: runs some of them.
    params: of all layers, [L, ...].
    x_BTD: what the first one reads.
    context: what all of them read.
    key: of dropout, or None.
    microbatches: M; None means up to eight a stage.
    repeats: R.
    checkpoint: makes of a function one that saves less for the backward pass.

  Returns:
    x_BTD after the last layer, and what the layers report, [L, B, ...].
  """
  S, R, B = num_stages(), repeats, x_BTD.shape[0]
  k = microbatches_a_stage(B, microbatches)
  M, total = S * k, jax.tree.leaves(params)[0].shape[0]
  groups = jax.tree.map(lambda x: _by_stage(x, R), (params, jnp.arange(total)))
  reads = _Reads(context, B, k)
  # A free place is at the end of the belt when its microbatch leaves, and has moved up when that comes back from the
  # last stage, S - 1 ticks later.
  gap = S - 1 - (S - 1) // k
  stages = jnp.arange(S)

  def one_stage(tick, stage, x, groups):
    work = jnp.clip(tick - stage, 0, M * R - 1)
    params, numbers = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, work // M, keepdims=False), groups)
    own = None if key is None else jax.random.fold_in(key, tick * S + stage)
    return layers(params, x, numbers, reads.of(work % M), own)

  # What is picked of several groups is not saved for the backward pass.
  every_stage = jax.vmap(checkpoint(one_stage) if R > 1 else one_stage, (None, 0, 0, 0), spmd_axis_name="stage")

  def tick(carry, number):
    belt, handed = carry
    place = jax.lax.dynamic_index_in_dim(belt, number % k, 1, keepdims=False)
    first = (stages == 0).reshape(S, 1, 1, 1)
    made, reported = every_stage(number, stages, jnp.where(first, place, handed), groups)
    made = _stage_split(made)
    belt = jax.lax.dynamic_update_index_in_dim(belt, _turned(place, -1), number % k, 1)
    back = jax.lax.dynamic_index_in_dim(belt, (number - (S - 1)) % k, 1, keepdims=False)
    arrives = ((stages == gap) & (number >= S - 1)).reshape(S, 1, 1, 1)
    back = jnp.where(arrives, _turned(made, gap - (S - 1)), back)
    belt = jax.lax.dynamic_update_index_in_dim(belt, back, (number - (S - 1)) % k, 1)
    return (_stage_split(belt), _stage_split(_turned(made, 1))), reported

  belt = _microbatches(x_BTD, k)
  with partitioning.each_stage():
    belt = _stage_split(belt)
    (belt, _), reported = jax.lax.scan(tick, (belt, jnp.zeros_like(belt[:, 0])), jnp.arange(M * R + S - 1))
    belt = _settled(belt)
  x_BTD = partitioning.constrain(_rows(belt), "batch", "stream_length", "act_embed")
  return x_BTD, jax.tree.map(lambda x: _all_layers(x, M, R), reported)


def microbatches_a_stage(batch: int, asked: int | None) -> int:
  """Returns k, how many microbatches there are for each stage."""
  rows = batch // partitioning.ways("batch")
  if asked:
    return asked // num_stages()
  return next(count for count in range(min(rows, _MOST_A_STAGE), 0, -1) if rows % count == 0)


class _Reads:
  """What layers read besides x, by microbatch: arrays with a row for each of the batch are cut, others are not."""

  def __init__(self, context: Context, batch: int, k: int):
    leaves, self.tree = jax.tree.flatten(context)
    self.cut = [leaf.shape[0] == batch for leaf in leaves]
    whole = lambda x: x.reshape(-1, *x.shape[2:])
    self.leaves = [whole(_microbatches(leaf, k)) if cut else leaf for cut, leaf in zip(self.cut, leaves)]
    with partitioning.each_stage():
      self.leaves = [partitioning.constrain(leaf, None, "batch", *[None] * (leaf.ndim - 2)) if cut else leaf
                     for cut, leaf in zip(self.cut, self.leaves)]

  def of(self, microbatch: jax.Array) -> Context:
    """Returns the context of a microbatch."""
    return jax.tree.unflatten(self.tree, [
        jax.lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False) if cut else leaf
        for cut, leaf in zip(self.cut, self.leaves)])


def _microbatches(x: jax.Array, k: int) -> jax.Array:
  """Returns [S, k, b, ...] of [B, ...]: every device's rows stay its own."""
  S, (B, *rest) = num_stages(), x.shape
  others = partitioning.ways("batch") // S
  x = x.reshape(others, S, k, B // (others * S * k), *rest)
  return jnp.moveaxis(x, 0, 2).reshape(S, k, B // (S * k), *rest)


def _rows(x: jax.Array) -> jax.Array:
  """Does what `_microbatches` does the other way round."""
  S, k, b, *rest = x.shape
  others = partitioning.ways("batch") // S
  return jnp.moveaxis(x.reshape(S, k, others, b // others, *rest), 2, 0).reshape(S * k * b, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _turned(x: jax.Array, steps: int) -> jax.Array:
  """Hands on what each stage has by some stages; written so that the backward pass, too, sends it once."""
  return jnp.roll(x, steps, 0)


_turned.defvjp(lambda x, steps: (_turned(x, steps), None), lambda steps, _, dx: (_turned(dx, -steps),))


def _settled(belt: jax.Array) -> jax.Array:
  """Returns the belt with every microbatch where it lay at the start: some places have been turned once too often."""
  S, k = belt.shape[:2]
  behind = [1 + (S - 2 - place) // k for place in range(k)]
  turned = [_turned(belt[:, place], behind[place]) for place in range(k)]
  return _stage_split(jnp.stack(turned, axis=1))


def _by_stage(x: jax.Array, R: int) -> jax.Array:
  """Returns [S, R, l, ...] of [L, ...], split over the stages, and otherwise as it is."""
  S, free = num_stages(), PartitionSpec.UNCONSTRAINED
  x = x.reshape(R, S, -1, *x.shape[1:]).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(x, PartitionSpec("stage", *[free] * (x.ndim - 1)))


def _stage_split(x: jax.Array) -> jax.Array:
  between = [None] * (x.ndim - 4)
  return partitioning.constrain(x, "stages", *between, "batch", "stream_length", "act_embed")


def _all_layers(reported: jax.Array, M: int, R: int) -> jax.Array:
  """Returns [L, B, ...] of what each tick's stages reported of their layers, [ticks, S, l, b, ...]."""
  _, S, some, b, *rest = reported.shape
  repeat, stage, microbatch = np.meshgrid(np.arange(R), np.arange(S), np.arange(M), indexing="ij")
  found = reported[repeat * M + microbatch + stage, stage]  # [R, S, M, l, b, ...]
  found = jnp.moveaxis(found, 3, 2).reshape(R * S * some, S, M // S, b, *rest)
  return jax.vmap(_rows)(found)

