"""Extractive question answering: find the answer of a question in a text, or tell that it has none.

(Rajpurkar et al. 2016, arXiv 1606.05250, and 2018, arXiv 1806.03822; Devlin et al. 2018, arXiv 1810.04805, sections 4.2
and 4.3.) The span head gives each token two numbers, whose softmaxes over the tokens are the probabilities that the
answer starts and ends there; the loss is the mean of the two cross-entropies. A text that does not fit is read in
windows that overlap, each an example of its own. Where a window does not have the answer, start and end are at the null
token: the first, or in a decoder the last, which alone sees all.

The answer is the span with the largest sum of its two numbers among those that lie within the text, start before they
end and have no more than `max_answer_tokens`, over all windows; there is none where in every window the null token's
sum is larger than that.
"""

import collections
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import scores
from lmjax.config import ObjectiveConfig
from lmjax.data.answers import find_answers, tokens_of
from lmjax.data.task import Task, render
from lmjax.objectives.labelled import label_terms, loss_of, predict_by, row, task_of
from lmjax.objectives.recipe import Recipe

_NEVER = -1e9


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `segment_ids`, `token_types` [T], `number` [], and `starts`, `ends` and `weights` []."""
  del key  # Nothing is drawn.
  task = task_of(example, recipe)
  encoding = _window(example, task, recipe)
  spans = [tokens_of(encoding, answer) for answer in find_answers(task, example["record"], example["where"])[:1]]
  start, end = next(iter(filter(None, spans)), (_null(encoding, recipe),) * 2)
  return row(encoding, example, recipe) | {"starts": np.int32(start), "ends": np.int32(end), "weights": np.float32(1)}


def _window(example: dict[str, Any], task: Task, recipe: Recipe) -> Any:
  question, text = (render(template, example["record"], example["where"]) for template in (task.text, task.text_pair))
  return recipe.framer.windows([(question, text)])[0][example["window"]]


def _null(encoding: Any, recipe: Recipe) -> int:
  return len(encoding.ids) - 1 if recipe.model.architecture == "decoder" else 0


def terms(made: tuple[jax.Array, jax.Array], batch: dict[str, jax.Array],
          cfg: ObjectiveConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sum to differentiate and sums to report, of the head's logits [B, T] and a batch with targets."""
  masked = [jnp.where(batch["segment_ids"] > 0, logits, _NEVER) for logits in made]
  (of_starts, first), (of_ends, last) = (
      label_terms(logits, batch[name], batch["weights"]) for logits, name in zip(masked, ("starts", "ends")))
  del cfg
  sums = {name: (first[name] + last[name]) / 2 for name in ("loss", "accuracy")}
  return (of_starts + of_ends) / 2, {**sums, "weight": first["weight"]}


loss = loss_of(terms)


def predictions(made: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
  """Returns the logits `starts` and `ends` [B, T]."""
  return {"starts": made[0], "ends": made[1]}


predict = predict_by(predictions)


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the task's metrics over the records whose windows are all among some examples."""
  seen = collections.Counter(example["of"] for example in examples)
  whole = [i for i, example in enumerate(examples) if seen[example["of"]] == example["windows"]]
  examples = [examples[i] for i in whole]
  predictions = {name: values[whole] for name, values in predictions.items()}
  best: dict[int, Found] = {}
  for example, starts, ends in zip(examples, predictions["starts"], predictions["ends"]):
    found = best_answer(example, task, starts, ends, recipe)
    best[example["of"]] = found.better(best.get(example["of"]))
  records = {example["of"]: example for example in examples}
  references = [[answer.text for answer in find_answers(task, example["record"], example["where"])]
                for example in records.values()]
  return scores.scores(task.measured, [best[of].answer(task) for of in records], references)


class Found(NamedTuple):
  """The best span of one window or more.

  Attributes:
    text: its text.
    value: the sum of its two numbers.
    null: that of the null token.
  """
  text: str
  value: float
  null: float

  def better(self, other: "Found | None") -> "Found":
    """Returns what two windows tell together: the better span, and of the null token the smaller sum."""
    best = self if other is None or self.value > other.value else other
    return best._replace(null=min(self.null, other.null if other else self.null))

  def answer(self, task: Task) -> str:
    """Returns the answer; "" for none."""
    return "" if task.no_answer and self.null > self.value else self.text


def best_answer(example: dict[str, Any], task: Task, starts: np.ndarray, ends: np.ndarray, recipe: Recipe) -> Found:
  """Returns the best span of a window, given the logits of its tokens [T]."""
  encoding = _window(example, task, recipe)
  text = render(task.text_pair, example["record"], example["where"])
  null = _null(encoding, recipe)
  of_null = float(starts[null] + ends[null])
  inside = np.flatnonzero([sequence == 1 for sequence in encoding.sequence_ids])
  if not len(inside) or inside.tolist() == [null]:
    return Found("", _NEVER, of_null)
  sums = starts[inside][:, None] + ends[inside][None]
  distance = inside[None] - inside[:, None]
  sums = np.where((distance >= 0) & (distance < task.max_answer_tokens), sums, _NEVER)
  sums[(inside == null)[:, None] & (inside == null)] = _NEVER  # A decoder's last token may be of the text.
  first, last = (inside[i] for i in np.unravel_index(np.argmax(sums), sums.shape))
  span = text[encoding.offsets[first][0]:encoding.offsets[last][1]]
  return Found(span.strip(), float(sums.max()), of_null)
