"""Multi-token prediction (Gloeckle et al. 2024, arXiv 2404.19737, section 2).

    L = -mean over t of log P_1(x_{t+1} | x_{<=t}) - w * mean over t and k = 2 ... n of log P_k(x_{t+k} | x_{<=t})

A decoder with model.num_future = n has for each k > 1 a block of its own on top of what the next token is predicted
from, and one output projection for all. The second mean is over the places that have a token so far ahead in their
text; w is objective.future_weight, in the paper n - 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ObjectiveConfig
from lmjax.objectives.cross_entropy import cross_entropy, loss_options
from lmjax.objectives.labelled import scaled_terms
from lmjax.objectives.recipe import Recipe


def balance(batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Scales the weights of a whole batch so that each term counts as the settings say."""
  return scaled_terms(batch, {"future": cfg.future_weight})


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a packed example, and `future_targets` and `future_weights` [T, n - 1] of the tokens further ahead."""
  del key  # Nothing is drawn.
  T, ahead = recipe.seq_len, range(1, recipe.model.num_future)
  later = lambda name, k: np.pad(example[name][k:], (0, min(k, T)))[:T]
  weights = np.stack([later("weights", k) for k in ahead], axis=1)
  if "segment_ids" in example:
    weights = weights * np.stack([later("segment_ids", k) == example["segment_ids"] for k in ahead], axis=1)
  return {**example, "future_targets": np.stack([later("targets", k) for k in ahead], axis=1),
          "future_weights": weights.astype(np.float32)}


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch; args and returns as in causal_lm.py, further tokens being the terms `future_...`."""
  options = loss_options(cfg, model.cfg)
  (x_BTD, w_VD, bias_V), x_KBTD = model.apply(
      {"params": params}, batch["inputs"], batch.get("positions"), batch.get("segment_ids"), rngs=rngs,
      method="future_outputs")
  total, sums = cross_entropy(x_BTD, w_VD, batch["targets"], batch["weights"], options, bias_V)
  further = {"loss": 0.0, "accuracy": 0.0, "weight": 0.0}
  for k, x in enumerate(x_KBTD):
    part, of_part = cross_entropy(x, w_VD, batch["future_targets"][..., k], batch["future_weights"][..., k], options,
                                  bias_V)
    total += part
    further = {name: further[name] + of_part[name] for name in further}
  return total, sums | {f"future_{name}": jnp.asarray(value) for name, value in further.items()}
