"""Several tasks at once: one body, and a head for each task (Liu et al. 2019, arXiv 1901.11504).

    L = sum over tasks t of lambda_t L_t

L_t is the mean loss over the examples of task t in a batch, whatever its own objective counts: texts, words or windows.
With objective.task_weights these are the lambda_t. Without, lambda_t is the share of the batch's examples that are of
task t, so that tasks count as data.weights or their sizes mix them.
"""

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ObjectiveConfig
from lmjax.data.task import Task
from lmjax.objectives import classification, extractive_qa, regression, token_classification
from lmjax.objectives.labelled import outputs, scaled_terms, task_of
from lmjax.objectives.recipe import Recipe

# Those whose rows have one text, which alone can share a batch.
KINDS = {"classification": classification, "regression": regression, "token_classification": token_classification,
         "extractive_qa": extractive_qa}
_BODY = ("inputs", "segment_ids", "token_types", "number")
# The targets of a row by kind: of each, whether it is an array [T], and its type.
_TARGETS = {
    "classification": {"labels": (False, np.int32), "weights": (False, np.float32)},
    "regression": {"numbers": (False, np.float32), "weights": (False, np.float32)},
    "token_classification": {"labels": (True, np.int32), "weights": (True, np.float32)},
    "extractive_qa": {"starts": (False, np.int32), "ends": (False, np.int32), "weights": (False, np.float32)},
}


def balance(batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Scales the weights of a whole batch so that each task counts by its lambda; one without an example has no loss."""
  return scaled_terms(batch, _lambdas(batch, cfg))


def _lambdas(batch: Mapping[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, Any]:
  names = [name.removesuffix("_weights") for name in batch if name.endswith("_weights")]
  if cfg.task_weights:
    return {name: cfg.task_weights[int(name.removeprefix("task"))] for name in names}
  rows, real = batch["task"], batch["weights"]
  share = lambda number: jnp.sum(real * (rows == number)) / jnp.maximum(jnp.sum(real), 1e-9)
  return {name: share(int(name.removeprefix("task"))) for name in names}


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: what the model reads, the number of its `task` [], `weights` [], and for each task k its targets.

  These are called `taskK_NAME`, with the names and shapes that the task's own objective gives them, and are 0 but for
  those of the row's own task.
  """
  task = task_of(example, recipe)
  made = KINDS[task.kind].make_example(example, key, recipe)
  row = {name: made[name] for name in _BODY} | {"task": np.int32(example["task"]), "weights": np.float32(1)}
  for number, other in enumerate(recipe.tasks):
    for name, (is_long, dtype) in _TARGETS[other.kind].items():
      empty = np.zeros(recipe.seq_len if is_long else (), dtype)
      row[f"task{number}_{name}"] = made[name] if number == example["task"] else empty
  return row


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch; args and returns as in causal_lm.py, the terms of a task being `TASK_...`."""
  made, total, sums = outputs(model, params, batch, rngs), 0.0, {}
  for number, (name, head, labels) in enumerate(model.cfg.task_heads):
    prefix = f"task{number}_"
    own = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
    of_task, reported = _module(head, labels).terms(made[name], own | {"segment_ids": batch["segment_ids"]}, cfg)
    total += of_task
    sums |= {f"{name}_{key}": value for key, value in reported.items()}
  whole = sum(sums[f"{name}_loss"] for name, *_ in model.cfg.task_heads)
  return total, {"loss": whole, "weight": jnp.sum(batch["weights"]), **sums}


def _module(head: str, labels: int) -> Any:
  if head == "sequence":
    return regression if labels == 1 else classification
  return {"token": token_classification, "span": extractive_qa}[head]


def predict(model: Any, params: Any, batch: dict[str, jax.Array], task: Task, recipe: Recipe) -> dict[str, jax.Array]:
  """Returns what the objective of one task predicts of a batch."""
  del recipe
  return KINDS[task.kind].predictions(outputs(model, params, batch)[task.name])


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the metrics of one task."""
  return KINDS[task.kind].score(task, examples, predictions, recipe)
