"""Token classification: label each word of a text (Devlin et al. 2018, arXiv 1810.04805, section 5.3).

Words are joined by spaces. The first token of a word is the one that is labelled; the loss is the mean cross-entropy
over words. What does not fit into data.seq_len is left out, of the metrics too.
"""

import itertools
from typing import Any, Mapping

import jax
import numpy as np

from lmjax import scores
from lmjax.data.frames import first_tokens
from lmjax.data.task import Task
from lmjax.data.task_sets import word_labels
from lmjax.objectives.labelled import loss_of, of_labels, predict_by, row, task_of
from lmjax.objectives.recipe import Recipe


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [T], `number` [], and `labels` and `weights` [T]."""
  del key  # Nothing is drawn.
  encoding, places, labels = _aligned(example, task_of(example, recipe), recipe)
  row_labels, weights = np.zeros(recipe.seq_len, np.int32), np.zeros(recipe.seq_len, np.float32)
  for word, place in places.items():
    row_labels[place], weights[place] = labels[word], 1
  return row(encoding, example, recipe) | {"labels": row_labels, "weights": weights}


def _aligned(example: dict[str, Any], task: Task, recipe: Recipe) -> tuple[Any, dict[int, int], list[int]]:
  """Returns the encoding of the words, {word: place of its first token}, and the words' labels."""
  words, labels = word_labels(task, example["record"], example["where"])
  encoding = recipe.framer.frame(" ".join(words))
  return encoding, first_tokens(encoding.offsets, encoding.sequence_ids, words), labels


terms = of_labels
loss = loss_of(terms)


def predictions(made: jax.Array) -> dict[str, jax.Array]:
  """Returns the likeliest `labels` [B, T]."""
  return {"labels": made.argmax(-1)}


predict = predict_by(predictions)


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics of some examples: of spans over texts, and of labels over all of their words."""
  guessed, true = [], []
  for example, labels in zip(examples, predictions["labels"]):
    _, places, numbers = _aligned(example, task, recipe)
    guessed.append([task.labels[int(labels[place])] for place in places.values()])
    true.append([task.labels[numbers[word]] for word in places])
  names = task.measured
  of_words = [name for name in names if name != "span_f1"]
  flat = [list(itertools.chain.from_iterable(labels)) for labels in (guessed, true)]
  values = scores.scores(of_words, *flat)
  return values | (scores.scores(["span_f1"], guessed, true) if "span_f1" in names else {})
