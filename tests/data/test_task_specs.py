import dataclasses
import importlib
import importlib.util
import json
import re
import types

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")

from lmjax.config import DataConfig  # noqa: E402
from lmjax.data.records import open_records  # noqa: E402
from lmjax.data.task import label_of, number_of, parse_task, render, value_at  # noqa: E402
from lmjax.data.task_specs import TASKS  # noqa: E402
from lmjax.objectives.text_to_text import source_text  # noqa: E402
from lmjax.scores import SCORES  # noqa: E402

# TFDS registers these builders when their modules are imported.
_MODULES = {"glue": "text.glue", "super_glue": "text.super_glue", "c4": "text.c4", "wmt14_translate": "translate.wmt14",
            "wmt16_translate": "translate.wmt16", "cnn_dailymail": "summarization.cnn_dailymail"}
_NAMES = [name for name, task in TASKS.items() if task.source.startswith("tfds:")]


@pytest.fixture
def builder_of(tmp_path, monkeypatch):
  """Returns a function from a TFDS name to TFDS's own builder, which has prepared nothing."""
  def make(full_name):
    name = full_name.partition("/")[0]
    if name in _MODULES:
      path = f"tensorflow_datasets.{_MODULES[name]}"
      if importlib.util.find_spec(path) is None:
        pytest.skip(f"this version of TFDS has no {path}")
      module = importlib.import_module(path)
      if name == "super_glue":  # All that it takes of TensorFlow is a type.
        monkeypatch.setattr(module, "tf", types.SimpleNamespace(int32=np.int32))
    return tfds.builder(full_name, data_dir=str(tmp_path), file_format="array_record")
  return make


@pytest.fixture
def prepare(builder_of):
  """Returns a function that writes records, by split, as the TFDS data set of that name."""
  def write(full_name, **splits):
    builder = builder_of(full_name)
    builder._split_generators = lambda dl_manager: {split: enumerate(rows) for split, rows in splits.items()}
    builder.download_and_prepare()
  return write


def test_the_names_are_these():
  assert " ".join(TASKS) == (
      "glue/cola glue/sst2 glue/mrpc glue/qqp glue/stsb glue/mnli glue/mnli_mismatched glue/qnli glue/rte glue/wnli "
      "super_glue/boolq super_glue/cb super_glue/copa super_glue/multirc super_glue/record super_glue/rte "
      "super_glue/wic super_glue/wsc.fixed squad squad/v2 wmt14/de-en wmt14/en-de wmt14/fr-en wmt14/en-fr wmt16/ro-en "
      "wmt16/en-ro cnn_dailymail stdlib/packages stdlib/identifiers stdlib/answers stdlib/docstrings")
  assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_a_spec_is_a_declaration_that_is_allowed(name):
  task = TASKS[name]
  changed = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)
             if getattr(task, field.name) != field.default}
  assert parse_task(json.loads(json.dumps(changed)), {}) == task
  assert parse_task(name, TASKS) is task


@pytest.mark.parametrize("name", _NAMES)
def test_a_spec_reads_what_tfds_has(name, builder_of):
  task = TASKS[name]
  source, held_out = (re.sub(r"^tfds:|\[.*", "", spec or task.source) for spec in (task.source, task.validation))
  assert source == held_out
  features = builder_of(source).info.features
  for column in task.columns:
    feature = features
    for part in column.split("/"):
      feature = feature[part]
  kind = type(features[task.label]) if task.label else None
  if task.kind == "classification":
    assert kind is tfds.features.ClassLabel and list(task.labels) == features[task.label].names
  elif task.kind == "multiple_choice":
    assert kind is tfds.features.ClassLabel and features[task.label].num_classes == len(task.choices)
  elif task.kind == "regression":
    assert features[task.label].np_dtype == np.float32
  else:
    assert kind is None


@pytest.mark.parametrize("name", [name for name in _NAMES if re.match("(super_)?glue/|squad", name)])
def test_tfds_makes_the_splits_that_a_spec_reads(name, builder_of):
  task = TASKS[name]
  held_out = re.search(r"\[(.*)\]", task.validation)[1] if task.validation else "validation"
  # Nothing is fetched, and nothing read before a split is written.
  fetch = lambda urls: {key: "nowhere" for key in urls} if isinstance(urls, dict) else "nowhere"  # noqa: E731
  manager = types.SimpleNamespace(download=fetch, download_and_extract=fetch)
  made = builder_of(task.source.removeprefix("tfds:"))._split_generators(manager)
  assert {"train", held_out} <= {str(getattr(split, "name", split)) for split in made}


@pytest.mark.parametrize("name", TASKS)
def test_a_spec_is_measured_by_metrics_that_there_are(name):
  assert TASKS[name].metrics and {*TASKS[name].metrics} <= {*SCORES}


@pytest.mark.parametrize("name, beginning", [
    ("glue/cola", "cola sentence: a"), ("glue/mrpc", "mrpc sentence1: a sentence2: b"),
    ("squad", "question: a context: b"), ("squad/v2", "question: a context: b"),
    ("glue/mnli", "mnli "), ("glue/mnli_mismatched", "mnli "), ("super_glue/wsc.fixed", "wsc "),
    ("super_glue/record", "record "), ("wmt14/en-fr", "translate English to French: a"),
    ("wmt16/ro-en", "translate Romanian to English: a"), ("cnn_dailymail", "summarize: a")])
def test_texts_begin_as_those_of_t5(name, beginning):
  assert source_text(TASKS[name], ["a", "b"]).startswith(beginning)


@pytest.mark.parametrize("name", ["c4/en", "lm1b"])
def test_plain_text_is_in_the_default_field(name, builder_of):
  assert isinstance(builder_of(name).info.features[DataConfig().text_field], tfds.features.Text)


def _open(task, tmp_path, split):
  config = DataConfig(data_dir=str(tmp_path))
  if task.validation and split == "validation":
    return open_records(task.validation, "train", config, whole=True)
  return open_records(task.source, split, config, whole=bool(task.validation))


def _read(name, tmp_path, split, read):
  """Returns what `read(task, record, where)` gives for all records, sorted, for TFDS shuffles them."""
  records = _open(TASKS[name], tmp_path, split)
  return sorted(read(TASKS[name], records[i], records.name(i)) for i in range(len(records)))


def _labelled(task, record, where):
  texts = [render(template, record, where) for template in task.templates]
  return (*texts, label_of(task, value_at(record, task.label, where), where))


def _written(task, record, where):
  return render(task.text, record, where), render(task.target, record, where)


def _answered(task, record, where):
  texts = render(task.text, record, where), render(task.text_pair, record, where)
  return (*texts, value_at(record, task.answers, where), task.starts and value_at(record, task.starts, where))


def test_sst2(tmp_path, prepare):
  def rows(*pairs):
    return [{"sentence": text, "label": label, "idx": i} for i, (text, label) in enumerate(pairs)]

  prepare("glue/sst2", train=rows(("a film é", "positive"), ("bad", "negative"), ("fine", "positive")),
          validation=rows(("dull", "negative"), ("good", "positive")), test=rows(("unknown", -1)))
  assert _read("glue/sst2", tmp_path, "train", _labelled) == [("a film é", 1), ("bad", 0), ("fine", 1)]
  assert _read("glue/sst2", tmp_path, "validation", _labelled) == [("dull", 0), ("good", 1)]
  records = _open(TASKS["glue/sst2"], tmp_path, "train")
  assert records.names == {"label": ("negative", "positive")}


def test_mnli_has_two_validation_splits(tmp_path, prepare):
  def rows(*triples):
    return [{"premise": one, "hypothesis": two, "label": label, "idx": i}
            for i, (one, two, label) in enumerate(triples)]

  prepare("glue/mnli", train=rows(("p1", "h1", "neutral"), ("p2", "h2", "contradiction"), ("p3", "h3", "entailment")),
          validation_matched=rows(("p4", "h4", "neutral")), validation_mismatched=rows(("p5", "h5", "contradiction")))
  for name, held_out in (("glue/mnli", ("p4", "h4", 1)), ("glue/mnli_mismatched", ("p5", "h5", 2))):
    assert _read(name, tmp_path, "train", _labelled) == [("p1", "h1", 1), ("p2", "h2", 2), ("p3", "h3", 0)]
    assert _read(name, tmp_path, "validation", _labelled) == [held_out]


def test_stsb(tmp_path, prepare):
  rows = [{"sentence1": "one", "sentence2": "two", "label": 3.75, "idx": 0}]
  prepare("glue/stsb", train=rows, validation=rows)
  read = _read("glue/stsb", tmp_path, "train", lambda task, record, where: number_of(task, record[task.label], where))
  assert read == [3.75]


def test_super_glue(tmp_path, prepare):
  copa = {"premise": "It rained.", "question": "effect", "choice1": "Dry.", "choice2": "Wet.", "idx": 0}
  prepare("super_glue/copa", train=[copa | {"label": "choice2"}], validation=[copa | {"label": "choice1"}])
  assert _read("super_glue/copa", tmp_path, "train", _labelled) == [
      ("It rained. What was the effect?", "Dry.", "Wet.", 1)]
  record = {"passage": "A saw B.", "query": "@placeholder was seen.", "entities": ["A", "B"], "answers": ["B"],
            "idx": {"passage": 0, "query": 0}}
  prepare("super_glue/record", train=[record], validation=[record])
  assert _read("super_glue/record", tmp_path, "validation", _answered) == [
      ("@placeholder was seen.", "A saw B.", ["B"], "")]


def test_both_versions_of_squad_lie_side_by_side(tmp_path, prepare):
  def row(context, question, texts, starts):
    return {"id": question, "title": "t", "context": context, "question": question,
            "answers": {"text": texts, "answer_start": starts}}

  v1 = [row("Ann is tall.", "Who?", ["Ann"], [0]), row("It is in Rome.", "Where?", ["Rome", "in Rome"], [9, 6])]
  prepare("squad/v1.1", train=v1, validation=v1[:1])
  further = {"is_impossible": True, "plausible_answers": {"text": ["Ann"], "answer_start": [0]}}
  prepare("squad/v2.0", train=[row("Ann is tall.", "Why?", [], []) | further],
          validation=[row("Ann is tall.", "Who?", ["Ann"], [0]) | further])
  assert _read("squad", tmp_path, "train", _answered) == [
      ("Where?", "It is in Rome.", ["Rome", "in Rome"], [9, 6]), ("Who?", "Ann is tall.", ["Ann"], [0])]
  assert _read("squad", tmp_path, "validation", _answered) == [("Who?", "Ann is tall.", ["Ann"], [0])]
  assert _read("squad/v2", tmp_path, "train", _answered) == [("Why?", "Ann is tall.", [], [])]


def test_a_pair_of_languages_is_read_both_ways(tmp_path, prepare):
  pairs = [("Ja.", "Yes."), ("Nein.", "No."), ("Straße", "street")]
  prepare("wmt14_translate/de-en", train=[{"de": de, "en": en} for de, en in pairs],
          validation=[{"de": "Haus", "en": "house"}])
  assert _read("wmt14/de-en", tmp_path, "train", _written) == pairs
  assert _read("wmt14/en-de", tmp_path, "train", _written) == [("No.", "Nein."), ("Yes.", "Ja."), ("street", "Straße")]
  assert _read("wmt14/en-de", tmp_path, "validation", _written) == [("house", "Haus")]
  assert TASKS["wmt14/en-de"].prefix == "translate English to German: "


def test_cnn_dailymail(tmp_path, prepare):
  rows = [{"article": "Long text.", "highlights": "One .\nTwo .", "id": "x", "publisher": "cnn"}]
  prepare("cnn_dailymail", train=rows, validation=rows)
  assert _read("cnn_dailymail", tmp_path, "train", _written) == [("Long text.", "One .\nTwo .")]
