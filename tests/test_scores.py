"""Scores against arithmetic done by hand, on examples small enough for it, and properties that all of them have."""

import math
import sys
import warnings

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from lmjax import scores
from lmjax.config_checks import UserError

# Three times 1 is found and twice 0; once 1 is said in place of 0, and twice 0 in place of 1.
SAID = [1, 1, 1, 0, 0, 1, 0, 0]
TRUE = [1, 1, 1, 0, 0, 0, 1, 1]


def score(name, predictions, references):
  """Returns the values of a score, which may not warn."""
  with warnings.catch_warnings(record=True, action="always") as told:
    values = scores.SCORES[name](predictions, references)
  assert told == []
  return values


def value(name, predictions, references):
  return score(name, predictions, references)[name]


def test_labels_by_the_counts_of_their_table():
  assert value("accuracy", SAID, TRUE) == 5 / 8
  assert value("f1", SAID, TRUE) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
  assert value("f1_macro", SAID, TRUE) == pytest.approx((6 / 9 + 4 / 7) / 2)
  assert value("matthews", SAID, TRUE) == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))
  # Each class counts the same, however rare.
  assert value("f1_macro", ["a", "a", "c", "c", "c"], ["a", "b", "c", "c", "c"]) == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_labels_may_be_strings_or_arrays():
  assert value("accuracy", ["yes", "no", "maybe"], ["yes", "no", "no"]) == pytest.approx(2 / 3)
  assert value("accuracy", np.array([0, 2, 1]), np.array([0, 2, 2])) == pytest.approx(2 / 3)
  assert value("f1", np.array([True, True]), np.array([1, 0])) == pytest.approx(2 / 3)


def test_f1_is_of_two_labels():
  with pytest.raises(UserError, match="labels 0 and 1.* there is 2 too; use f1_macro"):
    score("f1", [0, 1, 2], [0, 1, 1])


def test_a_class_that_is_never_there_is_no_error():
  assert value("f1", [0, 0], [0, 0]) == 0
  assert value("matthews", [1, 1], [1, 1]) == 0
  assert value("matthews", [1, 1], [1, 0]) == 0
  assert value("f1_macro", [0, 0], [1, 1]) == 0


def test_correlations_by_their_formulas():
  # Deviations are -1, 0, 1 and -4, -1, 5 thirds.
  assert value("pearson", [1, 2, 3], [1, 2, 4]) == pytest.approx(3 / math.sqrt(2 * 42 / 9))
  # Ranks are 1, 2.5, 2.5, 4 and 3, 1, 2, 4.
  assert value("spearman", [10, 20, 20, 90], [3, 1, 2, 4]) == pytest.approx(1.5 / math.sqrt(4.5 * 5))
  assert value("spearman", [1, 2, 3], [0.5, 0.1, -8.0]) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_goes_with_nothing(name):
  assert value(name, [2.5, 2.5, 2.5], [1, 2, 3]) == 0
  assert value(name, [1, 2, 3], [0.1, 0.1, 0.1]) == 0
  assert value(name, [1.0], [2.0]) == 0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_numbers_that_are_none_give_none(name):
  assert math.isnan(value(name, [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]))


@pytest.mark.parametrize("text, expected", [
    ("The  Eiffel\tTower!", "eiffel tower"),
    ("An apple a day, the doctor", "apple day doctor"),
    ("U.S. & U.K.", "us uk"),
    ("another theory of the mind", "another theory of mind"),
    # Punctuation leaves no gap, so that the article is part of a word.
    ("state-of-the-art", "stateoftheart"),
    # Only ASCII's punctuation is any, and an article beside other punctuation is one.
    ("«the» end", "« » end"),
    ("The.", ""),
])
def test_answers_are_normalized_as_by_squad(text, expected):
  assert scores.normalized_answer(text) == expected


@pytest.mark.parametrize("said, answers, exact_match, f1", [
    ("the Denver Broncos.", ["Broncos", "Denver Broncos"], 1, 1),
    # One of "in year 1066" is right, and all of the answer is said.
    ("in the year 1066", ["1066"], 0, 2 * (1 / 3) / (1 / 3 + 1)),
    # The answer that fits best, wherever it stands.
    ("red green", ["blue", "green", "red green blue"], 0, 2 * (2 / 3) / (1 + 2 / 3)),
    # A word counts as often as it stands in both.
    ("to be to", ["To be, or not to be"], 0, 2 * (3 / 6) / (1 + 3 / 6)),
    ("be be be", ["be"], 0, 2 * (1 / 3) / (1 / 3 + 1)),
    ("red", ["blue"], 0, 0),
    # Questions without an answer.
    ("", [], 1, 1),
    ("", [""], 1, 1),
    ("the", [], 1, 1),
    ("red", [], 0, 0),
    ("", ["blue"], 0, 0),
    # An answer without a word is left out where there is another.
    ("", ["the", "blue"], 0, 0),
])
def test_squad(said, answers, exact_match, f1):
  assert score("squad", [said], [answers]) == {"exact_match": exact_match, "f1": pytest.approx(f1)}


def test_squad_is_a_mean_over_questions():
  assert score("squad", ["red", "in 1066", "", "x"], [["Red"], ["1066", "the year 1066"], [], []]) == {
      "exact_match": 2 / 4, "f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4)}


def test_squad_refuses_a_reference_that_is_no_list():
  with pytest.raises(UserError, match=r"write \['red'\]"):
    score("squad", ["red"], ["red"])


def test_exact_match_leaves_out_only_the_space_around():
  assert value("exact_match", [" red\n", "Red", "a red", "red  dog"], ["red", "red", "red", "red dog"]) == 1 / 4


def test_bleu_by_its_counts():
  same, shorter = "the cat sat on the mat today", "the cat sat on"
  assert value("bleu", [same], [same]) == pytest.approx(100)
  # Of 7 words 6 are right, of 6 pairs 5, and so on.
  changed = value("bleu", [same], ["the cat sat on the mat now"])
  assert changed == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
  assert value("bleu", [shorter], ["the cat sat on the mat"]) == pytest.approx(100 * math.exp(1 - 6 / 4))
  # Counts of the texts are added up before anything is divided.
  both = value("bleu", [same, shorter], ["the cat sat on the mat now", "the cat sat on the mat"])
  assert both == pytest.approx(100 * math.exp(1 - 13 / 11) * (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25)


def test_bleu_does_not_warn_of_full_stops(caplog):
  assert value("bleu", ["it is so ."] * 200, ["it is so ."] * 200) == pytest.approx(100)
  assert caplog.records == []


def test_chrf_by_its_counts():
  assert value("chrf", ["a red dog"], ["a red dog"]) == pytest.approx(100)
  # Runs of 1, 2, 3 and 4 characters; there are none of 5 and 6.
  assert value("chrf", ["abcd"], ["abce"]) == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
  # Recall weighs four times as much (beta = 2): precisions are 1 and 1, recalls 2/4 and 1/3.
  precision, recall = 1, (2 / 4 + 1 / 3) / 2
  assert value("chrf", ["ab"], ["abcd"]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_rouge_by_its_counts():
  # The stem of cats is cat: 3 of 3 and of 4 words, 2 of 2 and of 3 pairs. Of the other's words, one is in order.
  assert score("rouge", ["The cats sat", "one two"], ["the cat sat down.", "two one"]) == {
      "rouge1": pytest.approx((6 / 7 + 1) / 2), "rouge2": pytest.approx((4 / 5 + 0) / 2),
      "rougeL": pytest.approx((6 / 7 + 1 / 2) / 2), "rougeLsum": pytest.approx((6 / 7 + 1 / 2) / 2)}
  # Between lines the order does not matter to rougeLsum.
  assert score("rouge", ["a b c\nd e f"], ["d e f\na b c"])["rougeLsum"] == pytest.approx(1)


def test_a_span_counts_where_its_ends_and_its_type_are_right():
  said = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "O"]]
  true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"]]
  assert score("span_f1", said, true) == {
      "span_precision": pytest.approx(1 / 3), "span_recall": 1 / 2, "span_f1": pytest.approx(2 / (3 + 2))}
  assert score("span_f1", [["B-PER", "I-PER"]], [["B-LOC", "I-LOC"]])["span_f1"] == 0
  # Two spans side by side are not one.
  assert score("span_f1", [("B-PER", "I-PER")], [("B-PER", "B-PER")])["span_f1"] == 0
  assert set(score("span_f1", [["O", "O"]], [["O", "O"]]).values()) == {0}


def test_calibration_error_by_hand():
  probabilities = np.array([[.5, .3, .2], [.4, .3, .3], [.1, .75, .15], [.1, .65, .25], [0, .1, .9], [0, 0, 1]])
  labels = [0, 1, 1, 2, 2, 2]
  # Two each in (1/4, 1/2], (1/2, 3/4] and (3/4, 1]: accuracies 0.5, 0.5, 1 and confidences 0.45, 0.7, 0.95.
  assert scores.calibration_error(probabilities, labels, 4) == pytest.approx((0.05 + 0.2 + 0.05) / 3)
  assert scores.calibration_error(probabilities, labels, 1) == pytest.approx(abs(4 / 6 - 4.2 / 6))
  # In ten bins (0.4, 0.5], (0.3, 0.4], (0.7, 0.8], (0.6, 0.7] have one each, and (0.8, 0.9] and (0.9, 1] too.
  assert scores.calibration_error(probabilities, labels) == pytest.approx((.5 + .4 + .25 + .65 + .1 + 0) / 6)
  assert math.isnan(scores.calibration_error(np.zeros((0, 3)), []))


def test_the_glue_average_is_of_tasks():
  values = {"cola": {"matthews": 0.5}, "mrpc": {"accuracy": 0.8, "f1": 0.9}, "rte": {"accuracy": 0.6}}
  assert scores.glue_average(values) == pytest.approx((0.5 + 0.85 + 0.6) / 3)
  assert math.isnan(scores.glue_average({}))
  assert math.isnan(scores.glue_average({"cola": {"matthews": 0.5}, "rte": {}}))


def test_several_scores_at_once():
  assert scores.scores(["accuracy", "f1"], SAID, TRUE) == {"accuracy": 5 / 8, "f1": pytest.approx(2 / 3)}
  assert scores.scores([], SAID, TRUE) == {}


def test_mistakes_are_told_in_a_sentence(monkeypatch):
  with pytest.raises(UserError, match="no score 'mathews'; did you mean 'matthews'"):
    scores.scores(["accuracy", "mathews"], SAID, TRUE)
  with pytest.raises(UserError, match="2 predictions and 1 references for exact_match"):
    scores.scores(["exact_match"], ["a", "b"], ["a"])
  monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
  with pytest.raises(UserError, match="rouge1 needs rouge-score.*; pip install rouge-score"):
    scores.scores(["rouge"], ["a"], ["a"])


def test_all_are_better_when_higher_but_the_calibration_error():
  assert [name for name, higher in scores.HIGHER_IS_BETTER.items() if not higher] == ["calibration_error"]
  assert {"accuracy", "exact_match", "rougeL", "span_recall"} <= scores.HIGHER_IS_BETTER.keys()


LABEL = st.integers(0, 1)
NUMBER = st.integers(-3, 3)
TEXT = st.lists(st.sampled_from(["the", "red", "dog", "dogs", "ran", "."]), max_size=7).map(" ".join)
SPANS = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), min_size=4, max_size=4)
# Of every score, what an example's prediction and its reference are, and the range of its values.
KINDS = {
    "accuracy": (LABEL, LABEL, 0, 1), "f1": (LABEL, LABEL, 0, 1), "f1_macro": (LABEL, LABEL, 0, 1),
    "matthews": (LABEL, LABEL, -1, 1), "pearson": (NUMBER, NUMBER, -1, 1), "spearman": (NUMBER, NUMBER, -1, 1),
    "squad": (TEXT, st.lists(TEXT, max_size=3), 0, 1), "exact_match": (TEXT, TEXT, 0, 1),
    "bleu": (TEXT, TEXT, 0, 100), "chrf": (TEXT, TEXT, 0, 100), "rouge": (TEXT, TEXT, 0, 1),
    "span_f1": (SPANS, SPANS, 0, 1),
}
few = hypothesis.settings(max_examples=30)


def test_every_score_is_tried():
  assert KINDS.keys() == scores.SCORES.keys()


@pytest.mark.parametrize("name", KINDS)
@few
@hypothesis.given(data=st.data())
def test_scores_lie_in_their_range_whatever_the_order_of_the_examples(name, data):
  prediction, reference, low, high = KINDS[name]
  examples = data.draw(st.lists(st.tuples(prediction, reference), min_size=1, max_size=8))
  values = score(name, *zip(*examples))
  assert tuple(values) == scores.SCORES[name].values
  assert all(type(x) is float and low - 1e-9 <= x <= high + 1e-9 for x in values.values())
  assert score(name, *zip(*data.draw(st.permutations(examples)))) == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_without_examples_there_is_no_value(name):
  values = score(name, [], [])
  assert values and all(math.isnan(x) for x in values.values())


@few
@hypothesis.given(st.lists(st.tuples(st.floats(0, 1), LABEL), min_size=1, max_size=8), st.integers(1, 12))
def test_the_calibration_error_is_bounded_by_that_of_single_examples(examples, num_bins):
  first, labels = map(np.array, zip(*examples))
  probabilities = np.stack([first, 1 - first], axis=1)
  error = scores.calibration_error(probabilities, labels, num_bins)
  gaps = (probabilities.argmax(axis=1) == labels) - probabilities.max(axis=1)
  # A bin's gap is the mean of those in it, so that joining examples can only take away from it.
  assert abs(gaps.mean()) - 1e-9 <= error <= np.abs(gaps).mean() + 1e-9
  assert scores.calibration_error(probabilities[::-1], labels[::-1], num_bins) == pytest.approx(error, abs=1e-9)
