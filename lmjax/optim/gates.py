"""Which parameters learn, from when on, and how much less the lower layers do.

A gate is what all of a parameter's change in a step is multiplied by, weight decay included:

    gate = [step >= first] * layer_decay^(L + 1 - depth)

`first` is what the freeze policy says. The depth is 0 for embeddings, l for the l-th of L layers and L + 1 for what
comes after them: layer-wise decay as ELECTRA is fine-tuned (Clark et al. 2020, arXiv 2003.10555, appendix A.2), and
unfreezing from the top as in ULMFiT (Howard and Ruder 2018, arXiv 1801.06146, section 3.3). What never learns has
neither a gradient nor a place in the optimizer's state.
"""

import re
from typing import Any, Callable, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import OptimConfig, UserError
from lmjax.optim import lora

NEVER = -1
_INPUTS = {"embed", "relative", "target"}


class Gates(NamedTuple):
  """The gates of a model.

  Attributes:
    at: step -> tree of factors that broadcast against the parameters.
    frozen: tree of booleans: whether nothing of a parameter ever learns.
  """
  at: Callable[[jax.Array], Any]
  frozen: Any


def make_gates(cfg: OptimConfig, axes: Any, shapes: Any) -> Gates | None:
  """Returns the gates that a config asks for; None where all are 1.

  Args:
    cfg: with freeze_policy, layer_decay and lora_rank: beside adapters, only what the policy names learns. A pattern
      is searched for in paths such as "layers/mlp/up/kernel" and "layers/3/mlp/up/kernel"; the first that matches
      counts.
    axes: tree of the parameters' logical axis names.
    shapes: the same tree of shapes.

  Raises:
    UserError: where a pattern matches no parameter, or nothing would ever learn.
  """
  if not cfg.freeze_policy and cfg.layer_decay == 1 and not cfg.lora_rank:
    return None
  leaves, tree = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
  sizes = [leaf.shape[0] if names[0] == "layers" else 1 for (_, names), leaf in zip(leaves, jax.tree.leaves(shapes))]
  paths = [[key.key for key in path] for path, _ in leaves]
  depths = {_stack(path): size for path, size in zip(paths, sizes) if "layers" in path}
  _check(cfg, paths, sizes)
  firsts, factors = [], []
  for (_, names), path, size in zip(leaves, paths, sizes):
    stacked = names[0] == "layers"
    first = np.array([_first_step(cfg, path, layer if stacked else None) for layer in range(size)])
    decay = cfg.layer_decay ** np.array([_below_top(path, layer if stacked else None, depths) for layer in range(size)])
    shape = (size, *[1] * (len(names) - 1)) if stacked else ()
    firsts.append(first.reshape(shape))
    factors.append(decay.astype(np.float32).reshape(shape))

  def at(step: jax.Array) -> Any:
    learns = lambda first: (step >= first) & (first != NEVER)
    return tree.unflatten([jnp.where(learns(first), factor, 0.0) for first, factor in zip(firsts, factors)])

  frozen = [bool((first == NEVER).all()) for first in firsts]
  if all(frozen):
    raise UserError(f"config.optim.freeze_policy is {cfg.freeze_policy!r}, under which no parameter ever learns; leave "
                    "some out.")
  return Gates(at, tree.unflatten(frozen))


def split(params: Any, frozen: Any | None) -> tuple[Any, Any]:
  """Returns a tree of what learns and one of what is frozen, each without the other's leaves.

  Args:
    params: a tree like the parameters.
    frozen: as in `Gates`; None where all learn.
  """
  if frozen is None:
    return params, {}
  never = flax.traverse_util.flatten_dict(frozen)
  leaves = flax.traverse_util.flatten_dict(params)
  part = lambda wanted: flax.traverse_util.unflatten_dict({k: x for k, x in leaves.items() if never[k] == wanted})
  return part(False), part(True)


def join(learned: Any, rest: Any) -> Any:
  """Returns both in one tree, the inverse of `split`; a leaf that both have is that of `learned`."""
  flat = flax.traverse_util.flatten_dict
  return flax.traverse_util.unflatten_dict({**flat(rest), **flat(learned)}) if rest else learned


def _stack(path: list[str]) -> tuple[str, ...]:
  return tuple(path[:path.index("layers")])


def _names(path: list[str], layer: int | None) -> list[str]:
  """Returns the names that a pattern may be found in."""
  plain = "/".join(path)
  if layer is None:
    return [plain]
  at = path.index("layers") + 1
  return [plain, "/".join([*path[:at], str(layer), *path[at:]])]


def _first_step(cfg: OptimConfig, path: list[str], layer: int | None) -> int:
  names = _names(path, layer)
  # A head of labels is new to the model that adapters are made for.
  learns = not cfg.lora_rank or path[0] == lora.ADAPTERS or path[0].endswith("_head")
  default = 0 if learns else NEVER
  return next((step for pattern, step in cfg.freeze_policy if any(re.search(pattern, name) for name in names)), default)


def _below_top(path: list[str], layer: int | None, depths: dict[tuple[str, ...], int]) -> int:
  """Returns L + 1 - depth."""
  if "layers" in path:  # Layers that share their parameters count as the last.
    return 1 if layer is None else depths[_stack(path)] - layer
  inputs = bool(_INPUTS & {*path})
  own = next((depth for stack, depth in depths.items() if stack and path[:len(stack)] == [*stack]), None)
  return (own or max(depths.values())) + 1 if inputs else 0


def _check(cfg: OptimConfig, paths: list[list[str]], sizes: list[int]) -> None:
  names = {name for path, size in zip(paths, sizes)
           for layer in (range(size) if "layers" in path else [None]) for name in _names(path, layer)}
  for pattern, _ in cfg.freeze_policy:
    if not any(re.search(pattern, name) for name in names):
      raise UserError(f"config.optim.freeze_policy has the pattern {pattern!r}, which matches no parameter; they are: "
                      f"{', '.join('/'.join(path) for path in paths)}, with the number of a layer after layers/.")
