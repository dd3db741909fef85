"""Tests of the metrics of labelled tasks: values worked out by hand, and what must hold of any."""

import numpy as np
import pytest

from lmjax import scores
from lmjax.config import UserError


def one(name, predictions, references):
  return next(iter(scores.scores([name], predictions, references).values()))


def test_labels():
  said, true = [1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]  # 2 true and 1 false positives, 2 true and 1 false negatives.
  assert one("accuracy", said, true) == pytest.approx(4 / 6)
  assert one("f1", said, true) == pytest.approx(2 / 3)
  assert one("matthews", said, true) == pytest.approx((2 * 2 - 1 * 1) / 9)
  # Of 0: precision 2/3, recall 2/3; of 1 the same.
  assert one("f1_macro", said, true) == pytest.approx(2 / 3)
  # A label that is guessed but never true has no part in the mean over labels.
  assert one("f1_macro", ["a", "c", "b"], ["a", "a", "b"]) == pytest.approx((2 / 3 + 1) / 2)


def test_correlations():
  assert one("pearson", [1, 2, 4], [1, 2, 3]) == pytest.approx(3 / np.sqrt(14 / 3 * 2))
  # The ranks of ties are shared: 1.5, 1.5, 3, 4 against 1, 2, 3, 4.
  assert one("spearman", [1, 1, 5, 9], [10, 20, 30, 40]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_what_does_not_vary_correlates_with_nothing(name):
  assert one(name, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0


@pytest.mark.parametrize("said,answers,exact,f1", [
    ("the Cat.", ["cat"], 1, 1),  # Case, articles and punctuation do not count.
    ("a black cat", ["black cat", "dog"], 1, 1),
    ("black cat", ["cat"], 0, 2 / 3),
    ("dog", ["cat", "dog house"], 0, 2 / 3),  # The answer that fits best.
    ("", [], 1, 1),  # Rightly none.
    ("cat", [], 0, 0),
    ("", ["cat"], 0, 0),
    ("cat cat", ["cat"], 0, 2 / 3),  # A word counts as often as it stands in both.
])
def test_answers(said, answers, exact, f1):
  values = scores.scores(["squad"], [said], [answers])
  assert values == {"exact_match": pytest.approx(exact), "f1": pytest.approx(f1)}


def test_texts():
  texts = ["the cat sat on the mat today", "a dog ran over the long road"]
  assert one("bleu", texts, texts) == pytest.approx(100) and one("chrf", texts, texts) == pytest.approx(100)
  assert one("exact_match", [" a", "b"], ["a", "c"]) == 0.5
  # "the cat sat" of "the cat ran off": 2 of 3 and 2 of 4 words, and 1 of 2 and 1 of 3 pairs of words.
  rouge = scores.scores(["rouge"], ["the cat sat"], ["the cat ran off"])
  assert rouge == {"rouge1": pytest.approx(4 / 7), "rouge2": pytest.approx(2 / 5), "rougeL": pytest.approx(4 / 7)}


@pytest.mark.filterwarnings("error")
def test_spans_count_whole():
  true = [["B-X", "I-X", "O"], ["B-Y", "O", "B-X"]]
  said = [["B-X", "O", "O"], ["B-Y", "O", "B-X"]]  # The first span ends too early.
  assert scores.scores(["span_f1"], said, true) == {
      f"span_{name}": pytest.approx(2 / 3) for name in ("precision", "recall", "f1")}
  assert one("span_f1", [["O"]], [["O"]]) == 0


def test_calibration_error():
  # Of those sure at 0.9 one of two is right, and the one at 0.6 is right: (2 * 0.4 + 1 * 0.4) / 3.
  probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
  assert scores.calibration_error(probabilities, [0, 0, 0]) == pytest.approx(0.4)


def test_the_average_is_over_tasks_and_within_each_over_its_metrics():
  values = {"one": {"f1": 0.5, "accuracy": 0.7, "loss": 3.0}, "two": {"bleu": 20.0}}
  values = {task: scores.main_values(of_task) for task, of_task in values.items()}
  assert scores.average(values) == pytest.approx((0.6 + 0.2) / 2)


def test_the_order_of_examples_does_not_matter():
  rng = np.random.default_rng(0)
  said, true = rng.integers(0, 2, 40).tolist(), rng.integers(0, 2, 40).tolist()
  order = rng.permutation(40)
  names = ["accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman"]
  moved = scores.scores(names, [said[i] for i in order], [true[i] for i in order])
  assert moved == pytest.approx(scores.scores(names, said, true))


def test_an_unknown_metric_is_named():
  with pytest.raises(UserError, match="no metric 'acuracy' in lmjax/scores.py; did you mean 'accuracy'"):
    scores.scores(["acuracy"], [], [])
