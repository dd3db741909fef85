"""Optimizers from optax under one rule for learning rate, decay and clipping.

A direction u comes from optax; every optimizer then moves a parameter p by

    p <- p - lr * f_lr * u - lr * f_wd * weight_decay * p

with the factors f_lr and f_wd of the parameter's policies. The learning rate and the weight decay are inputs of the
compiled step, not part of it.
"""

import operator
import re
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lmjax.config import ModelConfig, OptimConfig, UserError
from lmjax.optim.gates import join, split
from lmjax.parametrization import eps_factor, learning_rate_factor


class Optimizer(NamedTuple):
  """An optimizer as functions. `params` are all parameters; the state and gradients are of those that learn.

  Attributes:
    init: params -> state.
    update: (grads, state, params, hparams, loss_fn, accept) -> (new params, new state). `hparams` holds the scalars
      "learning_rate" and "weight_decay", and "gates" where there are some (see gates.py); `loss_fn` maps what learns to
      the mean loss of the batch (Sophia reads curvature). Where `accept`, a boolean on the device, is false both are as
      they were.
    eval_params: (state, params) -> the parameters to evaluate, which schedule-free averages.
  """
  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]
  eval_params: Callable[[Any, Any], Any]


def make_optimizer(cfg: OptimConfig, axes: Any, frozen: Any | None = None,
                   model: ModelConfig = ModelConfig()) -> Optimizer:
  """Returns the optimizer of a config.

  Args:
    cfg: the settings.
    axes: tree of the parameters' logical axis names, as `partitioning.logical_axes` gives it.
    frozen: tree of booleans, which of them never learn; None where all do.
    model: whose parametrization scales learning rates and epsilons.

  Raises:
    UserError: where a pattern of a policy matches no parameter.
  """
  lr_factors = policy_factors("learning_rate_policy", cfg.learning_rate_policy, axes)
  wd_factors = policy_factors("weight_decay_policy", cfg.weight_decay_policy, axes)
  lr_factors, wd_factors, axes = (split(tree, frozen)[0] for tree in (lr_factors, wd_factors, axes))
  by_size, eps_factors = _size_factors(cfg, model, axes)
  lr_factors = jax.tree.map(operator.mul, lr_factors, by_size)
  if cfg.name == "muon":
    lr_factors = jax.tree.map(lambda factor, hidden: factor if hidden else factor * cfg.adam_learning_rate_ratio,
                              lr_factors, hidden_matrices(axes))

  def transform(hparams: dict) -> optax.GradientTransformationExtraArgs:
    lr, decay = hparams["learning_rate"], hparams["weight_decay"]

    def change(directions, state, params):
      step = lambda u, p, f_lr, f_wd: -lr * (f_lr * u + f_wd * decay * p if f_wd else f_lr * u)
      changes = jax.tree.map(step, directions, params, lr_factors, wd_factors)
      if "gates" in hparams:
        changes = jax.tree.map(lambda x, gate: (x * gate).astype(x.dtype), changes, hparams["gates"])
      return changes, state

    chain = optax.chain(_DIRECTIONS[cfg.name](cfg, axes), optax.GradientTransformation(_no_state, change))
    return contrib.schedule_free(chain, lr, b1=cfg.beta1) if cfg.name == "schedule_free" else chain

  def init(params):
    state = transform({"learning_rate": 0.0, "weight_decay": 0.0}).init(split(params, frozen)[0])
    if cfg.name == "schedule_free":
      # optax begins these in the parameters' type, goes on in float32, and evaluates by a rounded b1.
      zero = jnp.zeros((), jnp.float32)
      state = state._replace(b1=jnp.float32(cfg.beta1), weight_sum=zero, max_lr=zero)
    return state

  def update(grads, state, params, hparams, loss_fn, accept=True):
    extra = {"obj_fn": loss_fn} if cfg.name == "sophia" else {}
    learned, rest = split(params, frozen)
    # Adam of a gradient that is larger is Adam with an epsilon that is smaller.
    grads = jax.tree.map(lambda g, factor: g if factor == 1 else g / factor, grads, eps_factors)
    changes, new_state = transform(hparams).update(grads, state, learned, **extra)
    new = optax.apply_updates(learned, changes), new_state
    learned, state = jax.tree.map(lambda n, o: jnp.where(accept, n, o), new, (learned, state))
    return join(learned, rest), state

  def eval_params(state, params):
    if cfg.name != "schedule_free":
      return params
    learned, rest = split(params, frozen)
    return join(contrib.schedule_free_eval_params(state, learned), rest)

  return Optimizer(init, update, eval_params)


def mean_and_clip(sums: Any, weight: jax.Array, max_norm: float | None) -> tuple[Any, jax.Array]:
  """Divides summed gradients by their weight and scales them down to a global norm (Pascanu et al. 2012, 1211.5063).

  Both are one factor, so that the gradients are passed over once and not twice.

  Args:
    sums: tree of summed gradients.
    weight: [] what they are the sum of.
    max_norm: of the result; None does not clip.

  Returns:
    The gradients, and the norm of the mean before clipping.
  """
  norm = optax.tree.norm(sums) / weight
  factor = 1.0 / weight if max_norm is None else max_norm / (jnp.maximum(norm, max_norm) * weight)
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), sums), norm


def policy_factors(setting: str, policy: tuple, axes: Any) -> Any:
  """Returns the factor of every parameter under an ordered policy; the first pattern that matches counts, else 1.

  Args:
    setting: name of the setting, for messages.
    policy: (regex, factor) pairs; the regex is searched for in paths such as "layers/mlp/up/kernel".
    axes: tree of axis names; its paths are the parameters'.

  Raises:
    UserError: for a pattern that matches no parameter.
  """
  name = lambda path: "/".join(_keys(path))
  names = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_names)]
  for pattern, _ in policy:
    if not any(re.search(pattern, n) for n in names):
      raise UserError(f"config.optim.{setting} has the pattern {pattern!r}, which matches no parameter; "
                      f"they are: {', '.join(names)}.")
  first = lambda path, _: next((float(f) for pattern, f in policy if re.search(pattern, name(path))), 1.0)
  return jax.tree_util.tree_map_with_path(first, axes, is_leaf=_is_names)


def hidden_matrices(axes: Any) -> Any:
  """Returns which parameters are matrices inside a block, one for each layer or one for all: Muon is for these."""
  def is_hidden(path, names):
    return "layers" in _keys(path) and bool({"embed", "rank"} & {*names}) and len(set(names) - {"layers"}) > 1
  return jax.tree_util.tree_map_with_path(is_hidden, axes, is_leaf=_is_names)


def _size_factors(cfg: OptimConfig, model: ModelConfig, axes: Any) -> tuple[Any, Any]:
  """Returns the factors of learning rate and epsilon of every parameter that a model's parametrization asks for."""
  each = lambda function, *more: jax.tree_util.tree_map_with_path(function, axes, *more, is_leaf=_is_names)
  if model.parametrization == "standard":
    ones = each(lambda path, names: 1.0)
    return ones, ones
  by_muon = jax.tree.map(lambda hidden: hidden and cfg.name == "muon", hidden_matrices(axes))
  rule = "adamw" if cfg.name == "muon" else cfg.name
  is_adam = rule in ("adamw", "schedule_free")

  def learning_rate(path, names, by_muon):
    return learning_rate_factor(model, "muon" if by_muon else rule, _keys(path)[-1], names)

  def eps(path, names, by_muon):
    return eps_factor(model, _keys(path)[-1], names) if is_adam and not by_muon else 1.0

  return each(learning_rate, by_muon), each(eps, by_muon)


def _keys(path: tuple) -> list[str]:
  return [key.key for key in path]


def _no_state(params: Any) -> optax.OptState:
  return optax.EmptyState()


def _is_names(x: Any) -> bool:
  return isinstance(x, tuple)


def _adafactor(cfg: OptimConfig, axes: Any) -> optax.GradientTransformation:
  # Shazeer and Stern 2018, arXiv 1804.04235: factored second moments, updates clipped to unit RMS, steps relative to
  # the parameter's RMS; the layers of a stacked parameter share these.
  return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _muon(cfg: OptimConfig, axes: Any) -> optax.GradientTransformation:
  # Jordan et al. 2024 for matrices, Adam with Nesterov's look-ahead for the rest. Updates scaled by
  # 0.2 * sqrt(max(rows, columns)) have the RMS of Adam's, so that learning rate and decay carry over from it
  # (Liu et al. 2025, arXiv 2502.16982, section 2.2).
  def dimensions(hidden, names):
    if not hidden:
      return None
    # Layers, and in them experts, have a matrix each.
    matrix = [i for i, name in enumerate(names) if name not in ("layers", "expert")]
    side = "rank" if "rank" in names else "embed"
    rest, one = tuple(i for i in matrix if names[i] != side), (names.index(side),)
    reduced, kept = (one, rest) if matrix[0] == one[0] else (rest, one)
    return contrib.MuonDimensionNumbers(reduced, kept)

  # A learning rate of -1 undoes optax's sign, so that what comes out is a direction to go against.
  dims = jax.tree.map(dimensions, hidden_matrices(axes), axes)
  return contrib.muon(-1.0, beta=cfg.momentum, adam_b1=cfg.beta1, adam_b2=cfg.beta2, eps=cfg.eps, consistent_rms=0.2,
                      muon_weight_dimension_numbers=dims)


# Each returns the direction to go against, before learning rate and decay.
_DIRECTIONS = {
    "adamw": lambda cfg, axes: optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps),
    "adafactor": _adafactor,
    "lion": lambda cfg, axes: optax.scale_by_lion(cfg.beta1, cfg.beta2),
    "sgd": lambda cfg, axes: optax.trace(cfg.momentum),
    "muon": _muon,
    # Averaging stands in for the first moment.
    "schedule_free": lambda cfg, axes: optax.scale_by_adam(0.0, cfg.beta2, cfg.eps),
    "sophia": lambda cfg, axes: contrib.sophia(-1.0, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=0.0),
}
