import json
import os
import pathlib

import pytest

from lmjax.config import DataConfig
from lmjax.config_checks import UserError
from lmjax.data.records import open_records
from lmjax.data.task import Task, number_of


def _open(path, split="train", **settings):
  return open_records(str(path), split, DataConfig(**settings))


def test_a_table_may_have_a_column_without_a_name(tmp_path):
  (tmp_path / "a.csv").write_text(",text,label\n0,one,2\n1,\"two, three\",4\n")
  records = _open(tmp_path / "a.csv", validation_fraction=0.0)
  assert [(row["text"], row["label"]) for row in records] == [("one", "2"), ("two, three", "4")]


@pytest.mark.parametrize("line", ["one", "one,2,3"])
def test_a_row_of_another_length_is_refused(tmp_path, line):
  (tmp_path / "a.csv").write_text(f"text,label\nfirst,1\n{line}\n")
  with pytest.raises(UserError, match=r"a\.csv, line 3, has another number of values than the first line, .* 2 colu"):
    _open(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_long_text_is_read(tmp_path, suffix):
  (tmp_path / f"a.{suffix}").write_text("text\n" + "x" * 200_000 + "\n")
  assert len(_open(tmp_path / f"a.{suffix}", validation_fraction=0.0)[0]["text"]) == 200_000


def test_a_split_in_brackets_is_for_tfds_alone(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"text": "one"}))
  with pytest.raises(UserError, match=r"The source '.*a\.jsonl\[test\]' matches no file.*give a path or glob"):
    _open(f"{path}[test]")


def test_the_fingerprint_tells_which_rows_are_held_out(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(20)))
  prints = [_open(path, split, validation_fraction=share).fingerprint
            for split, share in (("train", 0.1), ("train", 0.2), ("validation", 0.2))]
  assert len(set(prints)) == 3
  assert _open(path, validation_fraction=0.1).fingerprint == prints[0]


def test_the_fingerprint_of_a_tfds_data_set_tells_that_it_was_prepared_again(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  from lmjax.data.tfds_builder import prepare_tfds
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
  folder = pathlib.Path(prepare_tfds(str(tmp_path / "a.jsonl"), tmp_path, DataConfig(validation_fraction=0.0)))
  before = _open(folder, validation_fraction=0.0).fingerprint
  assert _open(folder, validation_fraction=0.0).fingerprint == before
  for path in folder.iterdir():
    os.utime(path, ns=(0, 0))
  assert _open(folder, validation_fraction=0.0).fingerprint != before


def test_a_split_by_name_is_not_held_out_of_itself(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  from lmjax.data.tfds_builder import prepare_tfds
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(40)))
  folder = prepare_tfds(str(tmp_path / "a.jsonl"), tmp_path, DataConfig(validation_fraction=0.25))
  parts = [{row["text"] for row in _open(f"{folder}[train]", split, validation_fraction=0.2)}
           for split in ("train", "validation")]
  assert all(parts) and not parts[0] & parts[1]
  whole = open_records(f"{folder}[train]", "train", DataConfig(validation_fraction=0.2), whole=True)
  assert {row["text"] for row in whole} == parts[0] | parts[1]


@pytest.mark.parametrize("value", [float("nan"), "inf", "three", None])
def test_a_regression_has_a_number(value):
  with pytest.raises(UserError, match="Record 3 has score = .* which is no number"):
    number_of(Task(name="t", kind="regression", label="score"), value, "Record 3")
