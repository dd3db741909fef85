"""The scores of labelled tasks, as the field's own libraries compute them.

Each is a function of all predictions and all references of a set, for most are no mean over examples. `SCORES` is the
table of them. Values are fractions from 0 to 1, correlations from -1 to 1, and BLEU and chrF from 0 to 100, as papers
print them. What is undefined is NaN, or 0 where the library says so, and never an exception.

Libraries are imported when a score is computed.
"""

import collections
import dataclasses
import math
import re
import string
from typing import Any, Callable, Iterable, Mapping, Sequence
import warnings

import numpy as np

from lmjax.config_checks import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Score:
  """A score and what it needs.

  Attributes:
    function: of predictions and references, of equal length and not empty; returns a number for each of `values`.
    values: the names of what it returns.
    library: what is to be installed for it, by the name that pip knows.
  """
  function: Callable[[Sequence[Any], Sequence[Any]], float | Sequence[float]]
  values: tuple[str, ...]
  library: str | None = None

  def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Computes the score over a set.

    Args:
      predictions: one for each example.
      references: what would have been right, in the same order.

    Returns:
      A number for each of `values`; all are NaN where there is no example.

    Raises:
      UserError: if there is not one reference for each prediction, or the library is missing.
    """
    if len(predictions) != len(references):
      raise UserError(f"There are {len(predictions)} predictions and {len(references)} references for "
                      f"{self.values[0]}; give one reference for each prediction.")
    if not len(predictions):
      return dict.fromkeys(self.values, math.nan)
    try:
      numbers = self.function(predictions, references)
    except ModuleNotFoundError as e:
      raise UserError(f"{self.values[0]} needs {self.library}, of which {e.name} is not installed; "
                      f"pip install {self.library}.") from e
    return dict(zip(self.values, np.atleast_1d(numbers).tolist(), strict=True))


def _accuracy(predictions, references) -> float:
  from sklearn.metrics import accuracy_score
  with _silent():
    return accuracy_score(references, predictions)


def _f1(predictions, references) -> float:
  from sklearn.metrics import f1_score
  others = sorted({str(label) for labels in (predictions, references) for label in labels if label not in (0, 1)})
  if others:
    raise UserError(f"f1 is of the labels 0 and 1, of which 1 is the one looked for, but there is {others[0]} too; "
                    "use f1_macro.")
  with _silent():
    return f1_score(references, predictions, zero_division=0)


def _f1_macro(predictions, references) -> float:
  from sklearn.metrics import f1_score
  with _silent():
    return f1_score(references, predictions, average="macro", zero_division=0)


def _matthews(predictions, references) -> float:
  from sklearn.metrics import matthews_corrcoef
  with _silent():
    return matthews_corrcoef(references, predictions)


def _pearson(predictions, references) -> float:
  from scipy.stats import pearsonr
  return _correlation(pearsonr, predictions, references)


def _spearman(predictions, references) -> float:
  from scipy.stats import spearmanr
  return _correlation(spearmanr, predictions, references)


def _correlation(function, predictions, references) -> float:
  """Returns a correlation, and 0 with a constant, which tells nothing of the other: a run may well begin with one."""
  x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
  if (x == x[0]).all() or (y == y[0]).all():
    return 0.0
  with _silent(), np.errstate(all="ignore"):
    return function(x, y).statistic


def _silent() -> warnings.catch_warnings:
  """Leaves out warnings about a score that is undefined, or labels of many kinds: both are said by the value."""
  return warnings.catch_warnings(action="ignore")


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_answer(text: str) -> str:
  """Returns an answer as SQuAD compares it: in lower case, without ASCII punctuation, articles and further whitespace.

  Punctuation goes first and leaves no gap, so that "the-art" is one word and keeps its article.
  """
  return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _squad(predictions, references) -> np.ndarray:
  """Returns the mean exact match and F1 of SQuAD 2.0 (arXiv 1806.03822), whose rule is also that of 1.1.

  A question's score is that of the acceptable answer that fits best. Where none has a word left, the question has no
  answer, and only a prediction without a word is right. It is written here, for the rule is short, and it is kept up
  nowhere but in the script that came with the data.
  """
  for answers in references:
    if isinstance(answers, str):
      raise UserError(f"A reference of squad is the string {answers!r}, but each is a list of acceptable answers; "
                      f"write [{answers!r}].")
  return np.mean([_of_question(normalized_answer(prediction), [normalized_answer(answer) for answer in answers])
                  for prediction, answers in zip(predictions, references)], axis=0)


def _of_question(prediction: str, answers: list[str]) -> tuple[float, float]:
  answers = [answer for answer in answers if answer] or [""]
  return float(prediction in answers), max(_common_words(prediction.split(), answer.split()) for answer in answers)


def _common_words(prediction: list[str], answer: list[str]) -> float:
  """Returns the harmonic mean of the shares of both that are in common, words counted as often as they stand there."""
  if not prediction or not answer:
    return float(prediction == answer)
  common = (collections.Counter(prediction) & collections.Counter(answer)).total()
  return 2 * common / (len(prediction) + len(answer))


def _exact_match(predictions, references) -> float:
  return np.mean([prediction.strip() == reference.strip() for prediction, reference in zip(predictions, references)])


# `force` leaves out a warning about texts that look tokenized; the score is the same.
def _bleu(predictions, references) -> float:
  from sacrebleu import corpus_bleu
  return corpus_bleu(list(predictions), [list(references)], force=True).score


def _chrf(predictions, references) -> float:
  from sacrebleu import corpus_chrf
  return corpus_chrf(list(predictions), [list(references)]).score


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _rouge(predictions, references) -> np.ndarray:
  from rouge_score.rouge_scorer import RougeScorer
  scorer = RougeScorer(_ROUGE, use_stemmer=True)
  found = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)]
  return np.mean([[of_text[name].fmeasure for name in _ROUGE] for of_text in found], axis=0)


def _spans(predictions, references) -> Sequence[float]:
  from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
  # It tells a set of texts from a single one by the type of the parts.
  as_lists = lambda texts: [list(labels) for labels in texts]
  return precision_recall_fscore_support(as_lists(references), as_lists(predictions), average="micro",
                                         zero_division=0)[:3]


SCORES: dict[str, Score] = {
    # Of class labels, which are integers or strings. F1 is of label 1; MultiRC's F1 over all answers is the same.
    "accuracy": Score(_accuracy, ("accuracy",), "scikit-learn"),
    "f1": Score(_f1, ("f1",), "scikit-learn"),
    "f1_macro": Score(_f1_macro, ("f1_macro",), "scikit-learn"),
    "matthews": Score(_matthews, ("matthews",), "scikit-learn"),
    # Of numbers.
    "pearson": Score(_pearson, ("pearson",), "scipy"),
    "spearman": Score(_spearman, ("spearman",), "scipy"),
    # Of texts; a reference of squad is a list of acceptable answers, which is empty where the question has none.
    "squad": Score(_squad, ("exact_match", "f1")),
    "exact_match": Score(_exact_match, ("exact_match",)),
    # BLEU counts runs of up to four tokens: a set of shorter texts alone has 0, however right they are.
    "bleu": Score(_bleu, ("bleu",), "sacrebleu"),
    "chrf": Score(_chrf, ("chrf",), "sacrebleu"),
    "rouge": Score(_rouge, _ROUGE, "rouge-score"),
    # Of lists of IOB labels such as B-PER, one for each word. A span counts where both its ends and its type are right.
    "span_f1": Score(_spans, ("span_precision", "span_recall", "span_f1"), "seqeval"),
}

# Of every value's name: whether a better model has more of it.
HIGHER_IS_BETTER: dict[str, bool] = {**{value: True for score in SCORES.values() for value in score.values},
                                     "calibration_error": False}


def higher_is_better(metric: str) -> bool:
  """Returns whether a better model has more of a metric of an evaluation, such as validation/accuracy or a loss."""
  name = metric.rpartition("/")[2]
  if name in HIGHER_IS_BETTER:
    return HIGHER_IS_BETTER[name]
  return name == "average" or name.endswith("_accuracy")  # Of terms of a loss.


def scores(names: Iterable[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
  """Computes several scores of the same predictions.

  Args:
    names: keys of `SCORES`, for the same kind of predictions and references.
    predictions: one for each example.
    references: what would have been right, in the same order.

  Returns:
    The values of all, by their own names, some scores having several.

  Raises:
    UserError: if there is no score of a name, not one reference for each prediction, or a library is missing.
  """
  values = {}
  for name in names:
    if name not in SCORES:
      raise UserError(f"There is no score {name!r}{nearest(name, SCORES)}")
    values |= SCORES[name](predictions, references)
  return values


def calibration_error(probabilities: Any, labels: Any, num_bins: int = 10) -> float:
  """Returns the expected calibration error of Guo et al. 2017 (arXiv 1706.04599, equation 3).

  It is the mean over examples of |accuracy - confidence| of the bin that the example is in, a bin's confidence being
  the mean of its top probabilities. Bins are of equal width, ((m - 1) / M, m / M] for m = 1, ..., M. No library in use
  here has it: scikit-learn's scores of probabilities are others.

  Args:
    probabilities: [n, L], those of a row summing to 1.
    labels: [n], the right one of 0, ..., L - 1.
    num_bins: M.

  Returns:
    From 0 to 1, lower being better; NaN where there is no example, or a probability is NaN.
  """
  probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
  if not len(labels):
    return math.nan
  confidence, is_right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
  bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence)
  # A bin's count times its gap is the absolute sum of the differences in it.
  return float(np.abs(np.bincount(bins, is_right - confidence)).sum() / len(labels))


def glue_average(values: Mapping[str, Mapping[str, float]]) -> float:
  """Returns the score of a benchmark as GLUE defines it (arXiv 1804.07461, section 3.4).

  It is the mean over tasks, each counting the same whatever its size, of the unweighted mean of a task's metrics. MNLI
  is one task in it, with its matched and mismatched accuracies as its two metrics, and the diagnostic set is none. It
  compares with published averages only where it is of the same tasks: many leave WNLI out.

  Args:
    values: the metrics of each task, by its name.

  Returns:
    The mean in the unit of the metrics, NaN where there is no task, or one has no metric.
  """
  of_task = lambda metrics: sum(metrics.values()) / len(metrics) if metrics else math.nan
  return sum(map(of_task, values.values())) / len(values) if values else math.nan


# Of a task's values those that an average over tasks is made of, and what makes each a share. SQuAD's F1 stands for its
# exact match too, and ROUGE-L for the others.
_AVERAGED = {"accuracy": 1, "f1": 1, "f1_macro": 1, "matthews": 1, "pearson": 1, "spearman": 1, "span_f1": 1,
             "rougeL": 1, "bleu": 100, "chrf": 100}


def main_values(values: Mapping[str, float]) -> dict[str, float]:
  """Returns the values of a task that an average over tasks is made of, each as a share."""
  return {name: value / _AVERAGED[name] for name, value in values.items() if name in _AVERAGED}
