"""Labelled tasks: what is wrong with a spec or a record is one sentence, before a run begins."""

import json

import numpy as np
import pytest

from lmjax import objectives, workdir
from lmjax.config import UserError, base_config, from_config_dict
from lmjax.config_checks import check_objective
from lmjax.data import answers, augment, mixing, pipeline
from lmjax.data.task import KINDS

LABEL = dict(name="reviews", kind="classification", text="{text}", label="label", labels=("bad", "good"))
NAMES = dict(name="names", kind="token_classification", words="words", label="tags")
QA = dict(name="find", kind="extractive_qa", text="{question}", text_pair="{text}", answers="answer", starts="start")
ROWS = [dict(text=f"text {i}", label=i % 2) for i in range(40)]


def config_of(task, head="sequence", data=None, model=None, **objective):
  config = base_config()
  config.model.update(dict(num_layers=1, embed_dim=8, num_heads=1, architecture="encoder", head=head) | (model or {}))
  config.data.update(tokenizer="bytes", seq_len=32, tasks=(task,), **(data or {}))
  kind = task["kind"] if isinstance(task, dict) and task["kind"] in KINDS else "classification"
  config.objective.update({"name": kind, **objective})
  config.train.num_steps = 1
  return from_config_dict(config)


def opened(tmp_path, task, rows, **settings):
  path = tmp_path / "data.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = config_of(dict(task, source=str(path)), **settings)
  check_objective(config)
  data = pipeline.open_data(config, *objectives.text_needs(config))
  return objectives.with_heads(config, data.tasks), data


def refused(tmp_path, task, rows, **settings):
  with pytest.raises(UserError) as error:
    opened(tmp_path, task, rows, **settings)
  message = str(error.value)
  assert message.count(". ") == 0 and message.endswith((".", "?")), message
  return message


def long(answer, **changes):
  text = "a" * 40 + "b" * 25
  return dict(dict(question="what", text=text, answer=answer, start=text.find(answer)), **changes)


@pytest.mark.parametrize("task,rows,told", [
    (dict(LABEL, text="{txt}"), ROWS, "has no column 'txt'; did you mean 'text'?"),
    (dict(LABEL, label="lable"), ROWS, "has no column 'lable'; did you mean 'label'?"),
    (LABEL, [*ROWS, dict(text="x", label=2)] * 2, "Record 4"),
    (LABEL, [dict(text="x", label=2)] * 40, "label 2, but the task 'reviews' has the names bad, good or"),
    (LABEL, [dict(text="x", label="great")] * 40, "label 'great', but the task"),
    (dict(LABEL, labels=()), ROWS, "has a number in the column 'label', so that its labels have no names"),
    (dict(LABEL, labels=()), [dict(text="x", label="a")] * 40, "has but one label, 'a'"),
    (LABEL, [], "has no record for train"),
    (LABEL, ROWS[:1], "has no record for validation"),
    (dict(LABEL, labels=("a", "a")), ROWS, "has a label twice"),
    (dict(LABEL, labels="bad"), ROWS, "labels is 'bad', but it must be of type tuple"),
    (dict(LABEL, kind="clasification"), ROWS, "'clasification', which is not one of its values; did you mean"),
    (dict(LABEL, lable="x"), ROWS, "has no setting 'lable'; did you mean"),
    (dict(LABEL, words="text"), ROWS, "has words = 'text', which kind classification does not read"),
    (dict(name="reviews", kind="classification", text="{text}"), ROWS, "has no label, which kind classification needs"),
    (dict(LABEL, name="a b"), ROWS, "needs a name of letters"),
    (dict(LABEL, metrics=("acc",)), ROWS, "no metric 'acc'"),
    (dict(LABEL, metrics=("squad",)), ROWS, "the metric 'squad', but those of kind classification are accuracy, f1"),
    (dict(LABEL, labels=("bad",)), ROWS, "has but one label, 'bad'"),
    (dict(LABEL, text="{text"), ROWS, "has text = '{text', which names no column, so that all records would be alike"),
])
def test_a_wrong_classification_is_told(tmp_path, task, rows, told):
  assert told in refused(tmp_path, task, rows)


def test_a_wrong_number_is_told(tmp_path):
  task = dict(name="score", kind="regression", text="{text}", label="label")
  assert "label = 'high', which is no number" in refused(tmp_path, task, [dict(text="x", label="high")] * 40)


@pytest.mark.parametrize("row,told", [
    (dict(words=["a", "b"], tags=["X"]), "needs a list of words in 'words' and one of as many labels in 'tags'"),
    (dict(words="a b", tags=["X", "Y"]), "has no list of words in the column 'words'"),
    (dict(words=["a", 3], tags=["X", "Y"]), "has no list of words in the column 'words', each a text"),
])
def test_wrong_words_are_told(tmp_path, row, told):
  assert told in refused(tmp_path, dict(NAMES, labels=("X", "Y")), [row] * 40, head="token")


@pytest.mark.parametrize("row,told", [
    (long("b" * 25), "which is too long to stand in a window of config.data.seq_len tokens"),
    (long("bbb", start=3), "has the answer 'bbb', which does not stand in the text at character 3"),
    (long("xyz"), "has the answer 'xyz', which does not stand in the text"),
    (long("b", question="w" * 30), "has a question that takes more than half of the 32 tokens of config.data.seq_len"),
])
def test_wrong_answers_are_told(tmp_path, row, told):
  assert told in refused(tmp_path, QA, [row] * 40, head="span")


@pytest.mark.parametrize("changes,told", [
    (dict(answer=[5], start=[1]), "has the answer 5, which is no text"),
    (dict(answer=["a", "b"], start=[1]), "has 2 answers but 1 starts"),
    (dict(start="first"), "has an answer that starts at 'first', which is no number"),
])
def test_answers_of_other_types_are_told(tmp_path, changes, told):
  assert told in refused(tmp_path, QA, [dict(long("ab"), **changes)] * 40, head="span")


def test_a_start_may_be_written_as_text(tmp_path):
  rows = [long("ab", start="39")] * 40 + [long("", start="")] * 40
  _, data = opened(tmp_path, QA, rows, head="span")
  assert [answer.start for answer in answers.find_answers(data.tasks[0], rows[0], "it")] == [39]
  assert not answers.find_answers(data.tasks[0], rows[-1], "it")


def test_a_text_whose_answer_is_written_is_one_example(tmp_path):
  rows = [long("b" * 25)] * 40  # More than a window holds.
  _, data = opened(tmp_path, QA, rows, head="lm", name="text_to_text", model=dict(architecture="encoder_decoder"),
                   data=dict(validation_fraction=0.25))
  assert (data.train.num_examples, data.eval_sets["validation"].num_examples) == (30, 10)


def test_weights_of_tasks_that_are_not_read_are_told(tmp_path):
  assert "task_weights is (2.0,), which config.objective.name = classification does not read" in refused(
      tmp_path, LABEL, ROWS, task_weights=(2.0,))


def test_a_smoothing_that_is_not_read_is_told(tmp_path):
  assert "label_smoothing is 0.1, but config.objective.name = extractive_qa has no labels" in refused(
      tmp_path, QA, [long("ab")] * 40, head="span", label_smoothing=0.1)


def test_an_answer_longer_than_the_task_allows_is_told(tmp_path):
  told = refused(tmp_path, dict(QA, max_answer_tokens=3), [long("bbbb")] * 40, head="span")
  assert "of 4 tokens, longer than the 3 of the task's max_answer_tokens" in told


@pytest.mark.parametrize("settings,told", [
    (dict(head="token"), "config.model.head is token; set it to sequence"),
    (dict(model=dict(num_labels=3)), "config.model.num_labels is 3, but the task 'reviews' has 2; set it to 2"),
    (dict(name="extractive_qa", head="span"), "the task 'reviews' of config.data.tasks is of kind classification"),
    (dict(name="masked_lm", head="lm"), "which learns from plain text, but config.data.tasks is"),
    (dict(data=dict(augment_swap=0.1), name="multi_task", head="tasks"), "multi_task cannot bear"),
])
def test_a_task_that_does_not_fit_the_model_is_told(tmp_path, settings, told):
  assert told in refused(tmp_path, LABEL, ROWS, **settings)


def test_an_unknown_task_is_named():
  with pytest.raises(UserError, match="names 'glue/ss2', which is no task; did you mean 'glue/sst2'"):
    objectives.text_needs(config_of("glue/ss2"))


def test_sets_have_the_records_and_labels_come_of_the_data(tmp_path):
  rows = [dict(text=f"text {i}", label=("cat", "ant")[i % 2]) for i in range(40)]
  config, data = opened(tmp_path, dict(LABEL, labels=()), rows, data=dict(validation_fraction=0.25))
  assert data.tasks[0].labels == ("ant", "cat") and config.model.num_labels == 2
  assert (data.train.num_examples, data.eval_sets["validation"].num_examples) == (30, 10)
  texts = [{one["record"]["text"] for one in some.examples(range(some.num_examples))}
           for some in (data.train, data.eval_sets["validation"])]
  assert texts[0] | texts[1] == {row["text"] for row in rows} and not texts[0] & texts[1]


def test_labels_that_a_run_has_learned_stay_when_its_data_changes(tmp_path):
  task = dict(LABEL, labels=(), source=str(tmp_path / "data.jsonl"))

  def labels_of(*names):
    rows = [dict(text=f"text {i}", label=names[i % len(names)]) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(task, data=dict(validation_fraction=0.25))
    data = pipeline.open_data(config, labels=workdir.read_labels(tmp_path))
    workdir.write_labels(tmp_path, {one.name: one.labels for one in data.tasks})
    return data.tasks[0].labels

  assert labels_of("cat", "ant") == labels_of("cat", "cat", "ant") == labels_of("cat") == ("ant", "cat")
  with pytest.raises(UserError, match="has the label 'bee', but the task 'reviews' has the names ant, cat or numbers"):
    labels_of("cat", "bee")
  (tmp_path / "labels.json").write_text("[")
  with pytest.raises(UserError, match="labels.json is damaged"):
    labels_of("cat", "ant")


def augmented(text, seed=0, **shares):
  config = from_config_dict(dict(train=dict(num_steps=1), data={f"augment_{k}": v for k, v in shares.items()}))
  return augment.augment(text, np.random.default_rng(seed), config.data, lambda: "NEW")


TEXT = "  one two\tthree four\nfive six seven eight "


def test_augmentation():
  assert augmented(TEXT) == TEXT
  assert augmented(TEXT, replace=1.0).split() == ["NEW"] * 8
  assert augmented(TEXT, insert=1.0).split() == [w for word in TEXT.split() for w in (word, "NEW")]
  assert len(augmented(TEXT, delete=1.0).split()) == 1
  swapped = augmented(TEXT, swap=1.0)
  assert swapped.split() != TEXT.split() and sorted(swapped.split()) == sorted(TEXT.split())
  assert augmented("", replace=1.0) == "" and augmented("  ", delete=1.0) == "  "


@pytest.mark.parametrize("name,count", [("replace", lambda w: w.count("NEW")), ("insert", lambda w: w.count("NEW")),
                                        ("delete", lambda w: 8 - len(w))])
def test_shares_of_augmentation(name, count):
  mean = np.mean([count(augmented(TEXT, seed, **{name: 0.3}).split()) for seed in range(2000)])
  # Of eight words one is never left out.
  assert mean == pytest.approx(0.3 * (7 if name == "delete" else 8), abs=0.1)


def test_shares_of_a_mixture():
  assert mixing.shares([100, 900], 1.0, None) == [100, 900]
  assert mixing.shares([100, 900], 2.0, None) == [10, 30]
  assert mixing.shares([100, 900], 1.0, 300) == [100, 300]
