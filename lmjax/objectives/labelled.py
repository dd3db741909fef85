"""What objectives of labelled texts share: how a text becomes a row, the head's output, and sums over labels."""

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ObjectiveConfig
from lmjax.data.augment import augment
from lmjax.data.frames import model_inputs
from lmjax.data.task import Task, render
from lmjax.objectives.recipe import Recipe


def task_of(example: dict[str, Any], recipe: Recipe) -> Task:
  """Returns the task of an example."""
  return recipe.tasks[example["task"]]


def texts(example: dict[str, Any], templates: tuple[str, ...], key: tuple[int, int], recipe: Recipe) -> list[str]:
  """Returns the texts that some templates make of an example, augmented where a training set is to be."""
  made = [render(template, example["record"], example["where"]) for template in templates]
  if not recipe.training:
    return made
  rng = np.random.default_rng((*key, 2))

  def draw() -> str:
    other = recipe.texts[int(rng.integers(recipe.texts.num_examples))]
    text = render(task_of(other, recipe).templates[0], other["record"], other["where"])
    words = text.split() or [""]
    return words[int(rng.integers(len(words)))]

  return [augment(text, rng, recipe.data, draw) for text in made]


def framed(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns `inputs`, `segment_ids` and `token_types` [T] of an example's text or texts, and its `number` []."""
  task = task_of(example, recipe)
  both = texts(example, tuple(filter(None, (task.text, task.text_pair))), key, recipe)
  return row(recipe.framer.frame(*both), example, recipe)


def row(encoding: Any, example: dict[str, Any], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns the same of an encoding."""
  return {**model_inputs(encoding, recipe.seq_len), "number": np.int32(example["number"])}


def outputs(model: Any, params: Any, batch: dict[str, jax.Array], rngs: dict[str, jax.Array] | None = None) -> Any:
  """Returns what the model's head makes of a batch."""
  types = batch["token_types"] if model.cfg.token_types > 1 else None
  return model.apply({"params": params}, batch["inputs"], None, batch["segment_ids"], types, rngs=rngs)


def loss_of(terms: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]) -> Callable[..., Any]:
  """Returns the loss of an objective, given (the head's output, batch, settings) -> sum and sums to report."""
  def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
           rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the loss over a batch; args and returns as in causal_lm.py, of batches that `make_example` makes."""
    return terms(outputs(model, params, batch, rngs), batch, cfg)

  return loss


def predict_by(predictions: Callable[[Any], dict[str, jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
  """Returns what an objective predicts of a batch, given (the head's output) -> arrays [B, ...]."""
  def predict(model: Any, params: Any, batch: dict[str, jax.Array], task: Task, recipe: Recipe) -> dict[str, jax.Array]:
    """Returns arrays [B, ...] by name, of a batch of one task."""
    del task, recipe
    return predictions(outputs(model, params, batch))

  return predict


def of_labels(made: jax.Array, batch: dict[str, jax.Array],
              cfg: ObjectiveConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sum to differentiate and sums to report, of logits [..., L] and a batch with `labels` and `weights`."""
  return label_terms(made, batch["labels"], batch["weights"], cfg.label_smoothing)


def label_terms(logits: jax.Array, labels: jax.Array, weights: jax.Array,
                smoothing: float = 0.0) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns weighted sums of the cross-entropy of labels.

  Args:
    logits: [..., L].
    labels: [...] int32.
    weights: [...] float32.
    smoothing: share of each label spread evenly over all (Szegedy et al. 2015, arXiv 1512.00567).

  Returns:
    The sum to differentiate, and sums without smoothing: `loss` (nats), `accuracy`, `weight`.
  """
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  nll = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
  right = jnp.argmax(logits, axis=-1) == labels
  sums = {"loss": jnp.sum(nll * weights), "accuracy": jnp.sum(right * weights), "weight": jnp.sum(weights)}
  spread = -jnp.mean(log_probs, axis=-1)
  return sums["loss"] + smoothing * jnp.sum((spread - nll) * weights), sums


def scaled_terms(batch: dict[str, jax.Array], factors: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Scales the weights of terms of a loss so that it is a sum of means, each by its factor.

  All sums are divided by the sum of the first term's `weights`. A term's `TERM_weights` are therefore made to add up to
  that times what the term counts.

  Args:
    batch: the whole one.
    factors: what each term beside the first counts.
  """
  whole, scaled = jnp.sum(batch["weights"]), {}
  for term, factor in factors.items():
    weights = batch[f"{term}_weights"]
    scaled[f"{term}_weights"] = weights * (factor * whole / jnp.maximum(jnp.sum(weights), 1e-9))
  return {**batch, **scaled}
