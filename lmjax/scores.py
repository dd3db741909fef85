"""The metrics of labelled tasks, each by a library that others measure with.

Values are shares from 0 to 1, correlations from -1 to 1, and BLEU and chrF from 0 to 100, as their papers have them.
All but the calibration error are better when larger.
"""

import collections
import importlib
import re
import string
from typing import Any, Callable, Iterable, Mapping, Sequence
import warnings

import numpy as np

from lmjax.config_checks import UserError, nearest

# What a pip package is called where its module has another name.
_PACKAGES = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}


def scores(names: Iterable[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
  """Returns the values of several metrics.

  Args:
    names: of the metrics, keys of `SCORES`.
    predictions: what a model says: labels, numbers, texts, or lists of labels for span_f1.
    references: what is true, of the same length; for squad lists of answers, an empty one where there is none.

  Raises:
    UserError: for an unknown metric, or one whose library is missing.
  """
  values = {}
  for name in names:
    if name not in SCORES:
      raise UserError(f"There is no metric {name!r} in lmjax/scores.py{nearest(name, SCORES)}")
    values |= SCORES[name](predictions, references)
  return values


def _library(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as e:
    package = module.partition(".")[0]
    package = _PACKAGES.get(package, package)
    raise UserError(f"A metric needs the package {package}, which is not installed; pip install {package}.") from e


def _accuracy(predictions, references):
  return {"accuracy": float(_library("sklearn.metrics").accuracy_score(references, predictions))}


def _f1(predictions, references):
  return {"f1": float(_library("sklearn.metrics").f1_score(references, predictions, zero_division=0))}


def _f1_macro(predictions, references):
  labels = sorted({*references})
  value = _library("sklearn.metrics").f1_score(references, predictions, labels=labels, average="macro", zero_division=0)
  return {"f1_macro": float(value)}


def _matthews(predictions, references):
  return {"matthews": float(_library("sklearn.metrics").matthews_corrcoef(references, predictions))}


def _correlation(name: str, function: str) -> Callable[..., dict[str, float]]:
  def score(predictions, references):
    if len({*predictions}) < 2 or len({*references}) < 2:
      return {name: 0.0}  # What does not vary goes with nothing.
    return {name: float(getattr(_library("scipy.stats"), function)(predictions, references).statistic)}

  return score


def _exact_match(predictions, references):
  return {"exact_match": _mean(p.strip() == r.strip() for p, r in zip(predictions, references))}


def normalized_answer(text: str) -> str:
  """Returns an answer as SQuAD compares it: lower case, without punctuation, articles and superfluous spaces."""
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _squad(predictions, references):
  """SQuAD's exact match and F1 of words (arXiv 1606.05250, section 6.1), of the answer that fits best."""
  pairs = [(normalized_answer(said), [normalized_answer(text) for text in answers] or [""])
           for said, answers in zip(predictions, references)]
  return {"exact_match": _mean(max(said == answer for answer in answers) for said, answers in pairs),
          "f1": _mean(max(_word_f1(said, answer) for answer in answers) for said, answers in pairs)}


def _word_f1(said: str, answer: str) -> float:
  said, answer = said.split(), answer.split()
  if not said or not answer:
    return float(said == answer)
  common = sum((collections.Counter(said) & collections.Counter(answer)).values())
  return 2 * common / (len(said) + len(answer))


def _bleu(predictions, references):
  return {"bleu": float(_library("sacrebleu").corpus_bleu(list(predictions), [list(references)]).score)}


def _chrf(predictions, references):
  return {"chrf": float(_library("sacrebleu").corpus_chrf(list(predictions), [list(references)]).score)}


def _rouge(predictions, references):
  names = ("rouge1", "rouge2", "rougeL")
  scorer = _library("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=True)
  made = [scorer.score(reference, said) for said, reference in zip(predictions, references)]
  return {name: _mean(one[name].fmeasure for one in made) for name in names}


def _span_f1(predictions, references):
  metrics = _library("seqeval.metrics")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of labels that are no spans, and of tags without any true span.
    return {f"span_{name}": float(getattr(metrics, f"{name}_score")(list(references), list(predictions),
                                                                   zero_division=0))
            for name in ("precision", "recall", "f1")}


def _mean(values: Iterable[float]) -> float:
  return float(np.mean([float(value) for value in values]))


SCORES: Mapping[str, Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]] = {
    "accuracy": _accuracy, "f1": _f1, "f1_macro": _f1_macro, "matthews": _matthews,
    "pearson": _correlation("pearson", "pearsonr"), "spearman": _correlation("spearman", "spearmanr"),
    "exact_match": _exact_match, "squad": _squad, "bleu": _bleu, "chrf": _chrf, "rouge": _rouge, "span_f1": _span_f1}


def calibration_error(probabilities: np.ndarray, labels: Sequence[int], num_bins: int = 10) -> float:
  """Returns the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

  That is the mean over examples of |accuracy - confidence| of the bin that an example's confidence, the probability of
  its likeliest label, falls into. Bins are of equal width and include their upper bound.

  Args:
    probabilities: [examples, labels].
    labels: the true ones.
    num_bins: how many bins there are.
  """
  confidence, right = probabilities.max(-1), probabilities.argmax(-1) == np.asarray(labels)
  bins = np.ceil(confidence * num_bins).astype(int)
  return float(sum(abs(right[bins == i].mean() - confidence[bins == i].mean()) * np.mean(bins == i)
                   for i in np.unique(bins)))


def main_values(values: Mapping[str, float]) -> dict[str, float]:
  """Returns what an average over tasks is made of, each as a share: the metrics, and of several by one the last."""
  return {name: value / _MAIN[name] for name, value in values.items() if name in _MAIN}


def average(values: Mapping[str, Mapping[str, float]]) -> float:
  """Returns the mean over tasks of the mean of each task's metrics, as GLUE has it (arXiv 1804.07461, section 5)."""
  return _mean(_mean(of_task.values()) for of_task in values.values())


# By what each value is divided.
_MAIN = {"accuracy": 1, "f1": 1, "f1_macro": 1, "matthews": 1, "pearson": 1, "spearman": 1, "span_f1": 1, "rougeL": 1,
         "bleu": 100, "chrf": 100}
