"""Classification: tell the label of a text or of a pair of texts (Devlin et al. 2018, arXiv 1810.04805, section 3.2).

The loss is the cross-entropy of the label under the softmax of the sequence head.
"""

from typing import Any, Mapping

import jax
import numpy as np

from lmjax import scores
from lmjax.config import ObjectiveConfig
from lmjax.data.task import Task, label_of, value_at
from lmjax.objectives.labelled import framed, label_terms, outputs, task_of
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [T], `number` [], and `labels` and `weights` []."""
  return framed(example, key, recipe) | targets(example, task_of(example, recipe))


def targets(example: dict[str, Any], task: Task) -> dict[str, np.ndarray]:
  """Returns the `labels` and `weights` [] of an example."""
  label = label_of(task, value_at(example["record"], task.label, example["where"]), example["where"])
  return {"labels": np.int32(label), "weights": np.float32(1)}


def terms(made: jax.Array, batch: dict[str, jax.Array],
          cfg: ObjectiveConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sum to differentiate and sums to report, of the head's logits_BL and a batch with targets."""
  return label_terms(made, batch["labels"], batch["weights"], cfg.label_smoothing)


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch; args and returns as in causal_lm.py, of batches that `make_example` makes."""
  return terms(outputs(model, params, batch, rngs), batch, cfg)


def predict(made: jax.Array) -> dict[str, jax.Array]:
  """Returns `probabilities` [B, L] of the labels."""
  return {"probabilities": jax.nn.softmax(made)}


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics, and the calibration error, of some examples and what was predicted of them."""
  del recipe
  labels = [int(targets(example, task)["labels"]) for example in examples]
  probabilities = predictions["probabilities"]
  return {**scores.scores(task.measured, probabilities.argmax(-1).tolist(), labels),
          "calibration_error": scores.calibration_error(probabilities, labels)}
