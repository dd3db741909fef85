"""Causal language modelling: predict each token from those before it (Radford et al. 2018)."""

from typing import Any

import jax
import numpy as np

from lmjax.config import ObjectiveConfig
from lmjax.models.moe import ROUTER, router_sums
from lmjax.objectives.cross_entropy import cross_entropy, loss_options
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a packed example as it is: its targets are already the tokens after its inputs."""
  del key, recipe  # Nothing is drawn.
  return example


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch.

  Args:
    model: a Flax module with `features_and_output`.
    params: its parameters.
    batch: `inputs`, `targets` [B, T] int32, `weights` [B, T] float32, and `positions`, `segment_ids` [B, T] where
      attention stays within documents, and `prefix` [B, T] where some tokens are seen from both sides (prefix_lm.py).
    cfg: the objective's settings.
    rngs: keys by name; a "dropout" key turns dropout on.

  Returns:
    The sum to differentiate, and sums to report, of which `weight` is what to divide by; with experts, those of
    `moe.router_sums` too, without the weights that they have in the first sum.
  """
  prefix = {"prefix_BT": batch["prefix"] > 0} if "prefix" in batch else {}
  (x_BTD, w_VD, bias_V), reported = model.apply(
      {"params": params}, batch["inputs"], batch.get("positions"), batch.get("segment_ids"), **prefix, rngs=rngs,
      method="features_and_output", mutable=[ROUTER])
  total, sums = cross_entropy(x_BTD, w_VD, batch["targets"], batch["weights"], loss_options(cfg, model.cfg), bias_V)
  if model.cfg.num_experts:
    routing = router_sums(reported[ROUTER], batch["weights"])
    total += cfg.router_balance * routing["router_balance"] + cfg.router_z_loss * routing["router_z_loss"]
    sums |= routing
  return total, sums
