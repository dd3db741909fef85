"""The coordinate check: do activations, and what a few steps change in them, depend on a model's width or depth?

A model is trained for a few steps at each size on the same batches. What matters is the change of an activation since
the start, its root mean square over all entries, after each step (Yang et al. 2022, arXiv 2203.03466, section D.1 and
figure 5): where the parametrization is right it neither grows nor falls with the size. The activations themselves are
measured too; there the logits of muP fall as 1 / sqrt(width) at the start, and attention's as 1 / sqrt(head_dim), as
theory has it, so that no verdict is made of them.

Seeds are averaged by their squares, as the heads of one model are: where these are few, the root mean square of a model
varies from seed to seed, and the mean of its logarithm would lie below that of a model of many heads.
"""

import dataclasses
from typing import Any, Callable, Iterable, Mapping, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ModelConfig, UserError, fill_sizes

TOLERANCE = 0.05  # Of a slope in log size: over 16 times the size a change grows or falls by 15% at most.
_SEEN = "intermediates"


def at_width(model: ModelConfig, width: int, grow: str) -> ModelConfig:
  """Returns a model of another width: all that grows with it in proportion, and the rest as it is.

  Args:
    model: whose sizes may be resolved or not.
    width: embed_dim.
    grow: "heads", which then are more and keep their width, or "head_dim", which then are wider and keep their number.

  Raises:
    UserError: where a size would not be whole.
  """
  model = fill_sizes(model)

  def sized(name: str, base: int | None = None) -> int:
    size, rest = divmod(getattr(model, name) * (base or width), model.embed_dim)
    if rest or not size:
      raise UserError(f"Width {base or width} would give config.model.{name} = "
                      f"{getattr(model, name) * (base or width) / model.embed_dim:g}, {getattr(model, name)} at "
                      f"embed_dim = {model.embed_dim}; leave it out of --widths, or change config.model.{name}.")
    return size

  names = ["mlp_dim", "embedding_dim", *(("num_heads", "num_kv_heads") if grow == "heads" else ("head_dim",))]
  names += [name for name in ("expert_dim", "shared_expert_dim") if model.num_experts and getattr(model, name)]
  changes = {name: sized(name) for name in names}
  if grow == "head_dim" and model.base_head_dim is None and model.base_embed_dim:
    changes["base_head_dim"] = sized("head_dim", model.base_embed_dim)
  return dataclasses.replace(model, embed_dim=width, **changes)


def at_depth(model: ModelConfig, depth: int) -> ModelConfig:
  """Returns a model with another number of layers, of both sides where there are two."""
  decoder = depth if model.num_decoder_layers else None
  return dataclasses.replace(model, num_layers=depth, num_decoder_layers=decoder)


def measure(model: Any, loss: Callable[[Any, Any, Any], Any], states: Iterable[Any], train_step: Callable,
            batches: Sequence[Any], hparams: Mapping[str, Any]) -> list[dict[str, dict[str, list[float]]]]:
  """Trains a model for a few steps from each of several states and measures its activations on the first batch.

  Args:
    model: a Flax module.
    loss: (model, params, batch) -> anything; what it applies the model to is what is seen.
    states: a `TrainState` for each seed, which is used up.
    train_step: (state, batch, hparams) -> (state, metrics).
    batches: one a step.
    hparams: what a step takes.

  Returns:
    For each state, by activation: `size`, its root mean square before the first step and after each, and `change`,
    that of its difference to before the first, after each.
  """
  look = jax.jit(lambda params: _activations(model, loss, params, batches[0]))
  compare = jax.jit(lambda now, first: jax.tree.map(lambda a, b: (_rms(a), _rms(a - b)), now, first))
  found = []
  for state in states:
    first = look(state.params)
    rows = [compare(first, first)]
    for batch in batches:
      state, _ = train_step(state, batch, hparams)
      rows.append(compare(look(state.params), first))
    rows = jax.device_get(rows)
    found.append({name: {"size": [float(row[name][0]) for row in rows],
                         "change": [float(row[name][1]) for row in rows[1:]]} for name in first})
  return found


def slope(sizes: Iterable[float], values: Any) -> np.ndarray:
  """Returns the exponents with which values grow with size, by least squares on logarithms.

  Args:
    sizes: [sizes].
    values: [seeds, sizes, ...] root mean squares above 0.

  Returns:
    [...]; nan where a value is 0 or not finite.
  """
  x = np.log2(np.asarray(sizes, float))
  with np.errstate(divide="ignore", invalid="ignore"):
    y = np.log2(_over_seeds(values))
    x = x - x.mean()
    return np.tensordot(x, y - y.mean(axis=0), 1) / (x @ x)


def slope_error(sizes: Iterable[float], values: np.ndarray) -> np.ndarray | None:
  """Returns the standard errors of slopes, from leaving out one seed at a time (the jackknife); None for one seed.

  Args:
    sizes: [sizes].
    values: [seeds, sizes, ...] as `slope` takes them.
  """
  count = len(values)
  if count < 2:
    return None
  return np.std([slope(sizes, np.delete(values, seed, axis=0)) for seed in range(count)], axis=0) * (count - 1) ** 0.5


def _over_seeds(values: Any) -> np.ndarray:
  return np.sqrt(np.square(np.asarray(values, float)).mean(axis=0))


def summarize(sizes: list[int], runs: list[list[dict]]) -> dict[str, dict[str, Any]]:
  """Returns by activation what was measured and the slopes.

  Args:
    sizes: widths or depths.
    runs: [sizes][seeds] of what `measure` returns.

  Returns:
    `size` and `change`, root mean squares over the seeds by size and step; `size_slopes` and `change_slopes` by step;
    `slope`, the last of the latter, and `slope_error`, its standard error, None for one seed.
  """
  found = {}
  for name in runs[0][0]:
    one = {}
    for what in ("size", "change"):
      values = np.array([[run[name][what] for run in seeds] for seeds in zip(*runs)])
      one[what] = _over_seeds(values).tolist()
      one[f"{what}_slopes"] = slope(sizes, values).tolist()
    error = slope_error(sizes, values[..., -1])
    found[name] = {"slope": one["change_slopes"][-1], "slope_error": None if error is None else float(error), **one}
  return found


class _Watched:
  """A model that notes what its modules make whenever it is applied."""

  def __init__(self, model: Any):
    self._model, self.seen = model, {}

  def __getattr__(self, name: str) -> Any:
    return getattr(self._model, name)

  def apply(self, variables: Any, *args: Any, mutable: Any = (), **kwargs: Any) -> Any:
    out, made = self._model.apply(variables, *args, mutable=[*mutable, _SEEN], capture_intermediates=True, **kwargs)
    for path, value in flax.traverse_util.flatten_dict(made.pop(_SEEN)).items():
      self.seen["/".join(path).removesuffix("__call__").rstrip("/")] = jax.tree.leaves(value)[0]
    # Not the parts of an output projection that a loss never multiplies as a whole.
    self.seen["logits"] = _logits(out)
    return (out, made) if mutable else out


def _logits(out: Any) -> jax.Array:
  while isinstance(out, tuple) and isinstance(out[0], tuple):
    out = out[0]
  if isinstance(out, tuple) and len(out) == 3:
    return jnp.einsum("...D,VD->...V", out[0].astype(jnp.float32), out[1].astype(jnp.float32))
  return jax.tree.leaves(out)[0]


def _activations(model: Any, loss: Callable, params: Any, batch: Any) -> dict[str, jax.Array]:
  watched = _Watched(model)
  loss(watched, params, batch)
  parts = {name: value for name, value in watched.seen.items() if name and "ropout" not in name}
  # A part that ends in a map of its own makes the same.
  same = {name for name in parts if {f"{name}/out", f"{name}/down"} & parts.keys()}
  ends = lambda name: name.split("/")[-1] == "layers"  # Of the residual stream, what leaves the last block.
  return {name: value[-1] if ends(name) else value for name, value in parts.items() if name not in same}


def _rms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
