"""Multiple choice: tell which of several answers fits a text (Zellers et al. 2018, arXiv 1808.05326).

The model reads the text with each answer in turn, and its choice head gives each a number; the loss is the
cross-entropy of the right one under their softmax.
"""

from typing import Any, Mapping

import jax
import numpy as np

from lmjax import scores
from lmjax.config import ObjectiveConfig
from lmjax.data.task import Task
from lmjax.objectives.classification import targets
from lmjax.objectives.labelled import label_terms, outputs, row, task_of, texts
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [choices, T], `number` [], and `labels` and `weights` []."""
  task = task_of(example, recipe)
  text, *choices = texts(example, (task.text, *task.choices), key, recipe)
  rows = [row(recipe.framer.frame(text, choice), example, recipe) for choice in choices]
  stacked = {name: np.stack([one[name] for one in rows]) for name in ("inputs", "segment_ids", "token_types")}
  return stacked | {"number": rows[0]["number"]} | targets(example, task)


def terms(made: jax.Array, batch: dict[str, jax.Array],
          cfg: ObjectiveConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sum to differentiate and sums to report, of the head's logits [B, choices] and a batch with targets."""
  return label_terms(made, batch["labels"], batch["weights"], cfg.label_smoothing)


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch; args and returns as in causal_lm.py, of batches that `make_example` makes."""
  return terms(outputs(model, params, batch, rngs), batch, cfg)


def predict(made: jax.Array) -> dict[str, jax.Array]:
  """Returns the likeliest `choices` [B]."""
  return {"choices": made.argmax(-1)}


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics of some examples and what was chosen for them."""
  del recipe
  labels = [int(targets(example, task)["labels"]) for example in examples]
  return scores.scores(task.measured, predictions["choices"].tolist(), labels)
