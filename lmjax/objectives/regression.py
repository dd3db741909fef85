"""Regression: predict a number of a text or of a pair of texts, such as how much alike they are.

The loss is the squared error of the sequence head's one output.
"""

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import scores
from lmjax.config import ObjectiveConfig
from lmjax.data.task import Task, number_in
from lmjax.objectives.labelled import framed, loss_of, predict_by, task_of
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [T], `number` [], and `numbers` and `weights` [] float32."""
  return framed(example, key, recipe) | targets(example, task_of(example, recipe))


def targets(example: dict[str, Any], task: Task) -> dict[str, np.ndarray]:
  """Returns the `numbers` and `weights` [] of an example."""
  return {"numbers": np.float32(number_in(task, example["record"], example["where"])), "weights": np.float32(1)}


def terms(made: jax.Array, batch: dict[str, jax.Array],
          cfg: ObjectiveConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sum to differentiate and sums to report, of the head's output [B, 1] and a batch with targets."""
  del cfg
  total = jnp.sum(jnp.square(made[:, 0] - batch["numbers"]) * batch["weights"])
  return total, {"loss": total, "weight": jnp.sum(batch["weights"])}


loss = loss_of(terms)


def predictions(made: jax.Array) -> dict[str, jax.Array]:
  """Returns `numbers` [B]."""
  return {"numbers": made[:, 0]}


predict = predict_by(predictions)


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics of some examples and what was predicted of them."""
  del recipe
  numbers = [float(targets(example, task)["numbers"]) for example in examples]
  return scores.scores(task.measured, predictions["numbers"].tolist(), numbers)
