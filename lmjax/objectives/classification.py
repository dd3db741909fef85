"""Classification: tell the label of a text or of a pair of texts (Devlin et al. 2018, arXiv 1810.04805, section 3.2).

The loss is the cross-entropy of the label under the softmax of the sequence head.
"""

from typing import Any, Mapping

import jax
import numpy as np

from lmjax import scores
from lmjax.data.task import Task, label_in
from lmjax.objectives.labelled import framed, loss_of, of_labels, predict_by, task_of
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [T], `number` [], and `labels` and `weights` []."""
  return framed(example, key, recipe) | targets(example, task_of(example, recipe))


def targets(example: dict[str, Any], task: Task) -> dict[str, np.ndarray]:
  """Returns the `labels` and `weights` [] of an example."""
  return {"labels": np.int32(label_in(task, example["record"], example["where"])), "weights": np.float32(1)}


terms = of_labels
loss = loss_of(terms)


def predictions(made: jax.Array) -> dict[str, jax.Array]:
  """Returns `probabilities` [B, L] of the labels."""
  return {"probabilities": jax.nn.softmax(made)}


predict = predict_by(predictions)


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics, and the calibration error, of some examples and what was predicted of them."""
  del recipe
  labels = [int(targets(example, task)["labels"]) for example in examples]
  probabilities = predictions["probabilities"]
  return {**scores.scores(task.measured, probabilities.argmax(-1).tolist(), labels),
          "calibration_error": scores.calibration_error(probabilities, labels)}
