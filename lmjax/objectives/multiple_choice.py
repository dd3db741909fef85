"""Multiple choice: tell which of several answers fits a text (Zellers et al. 2018, arXiv 1808.05326).

The model reads the text with each answer in turn, and its choice head gives each a number; the loss is the
cross-entropy of the right one under their softmax.
"""

from typing import Any, Mapping

import jax
import numpy as np

from lmjax import scores
from lmjax.data.task import Task
from lmjax.objectives.classification import targets
from lmjax.objectives.labelled import loss_of, of_labels, predict_by, row, task_of, texts
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [choices, T], `number` [], and `labels` and `weights` []."""
  task = task_of(example, recipe)
  text, *choices = texts(example, (task.text, *task.choices), key, recipe)
  rows = [row(recipe.framer.frame(text, choice), example, recipe) for choice in choices]
  stacked = {name: np.stack([one[name] for one in rows]) for name in ("inputs", "segment_ids", "token_types")}
  return stacked | {"number": rows[0]["number"]} | targets(example, task)


terms = of_labels
loss = loss_of(terms)


def predictions(made: jax.Array) -> dict[str, jax.Array]:
  """Returns the likeliest `choices` [B]."""
  return {"choices": made.argmax(-1)}


predict = predict_by(predictions)


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics of some examples and what was chosen for them."""
  del recipe
  labels = [int(targets(example, task)["labels"]) for example in examples]
  return scores.scores(task.measured, predictions["choices"].tolist(), labels)
