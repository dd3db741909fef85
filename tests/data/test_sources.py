import json
import os

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from lmjax.config import DataConfig, UserError
from lmjax.data.file_sources import FileSource
from lmjax.data.pieces import MAX_PIECE, Piece, cut_text, is_held_out
from lmjax.data.sources import open_source, short_name
from lmjax.data.stdlib_source import StdlibSource


def _texts(source, split):
  """Returns the documents of a split."""
  documents, parts = [], []
  for text, ends_document in source.pieces(split):
    assert len(text) <= MAX_PIECE
    parts.append(text)
    if ends_document:
      documents.append("".join(parts))
      parts = []
  assert not parts
  return documents


def _write_jsonl(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_held_out_takes_one_unit_of_each_group():
  held_out = [is_held_out(i, 0.25) for i in range(400)]
  assert held_out[:4] == [False, True, False, False]
  assert all(sum(held_out[i:i + 4]) == 1 for i in range(0, 400, 4))
  assert {held_out[i:i + 4].index(True) for i in range(0, 400, 4)} == {0, 1, 2, 3}
  assert not any(is_held_out(i, 0.0) for i in range(100))


@hypothesis.given(st.text(max_size=40).map(lambda text: text * 4000))
@hypothesis.settings(max_examples=20)
def test_cut_text_loses_nothing(text):
  pieces = list(cut_text(text, True))
  assert "".join(piece.text for piece in pieces) == text
  assert max(len(piece.text) for piece in pieces) <= MAX_PIECE
  assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_cut_text_prefers_line_ends():
  text = "a" * 60_000 + "\n" + "b" * 10_000
  assert list(cut_text(text)) == [Piece("a" * 60_000 + "\n", False), Piece("b" * 10_000, True)]


# The standard library.

def test_stdlib_split_is_by_file_and_holds_out_its_share():
  source = StdlibSource(DataConfig())
  train, validation = source.files("train"), source.files("validation")
  assert len(train) > 300 and len(validation) > 20
  assert not set(train) & set(validation)
  share = source.approximate_bytes("validation") / sum(source.approximate_bytes(s) for s in ("train", "validation"))
  assert 0.045 < share <= 0.05
  assert not any(name.startswith(("encodings/cp", "encodings/iso8859")) for name in validation)
  assert not any("site-packages" in name for name in train)
  assert StdlibSource(DataConfig()).files("validation") == validation
  assert len(_texts(source, "validation")) == len(validation)


def test_stdlib_near_copies_go_to_training(tmp_path):
  for i in range(40):
    (tmp_path / f"m{i}.py").write_text("".join(f"unique_name_{i}_{j} = {j}\n" for j in range(50)))
  for i in range(40):
    table = "".join(f"shared_table_{j} = {j}\n" for j in range(50))
    (tmp_path / f"copy{i}.py").write_text(f"{table}only_here_{i} = 1\n")
  (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
  (tmp_path / "site-packages").mkdir()
  (tmp_path / "site-packages" / "other.py").write_text("installed_module = 1\n")
  source = StdlibSource(DataConfig(validation_fraction=0.2), root=tmp_path)
  validation = source.files("validation")
  assert len(validation) >= 5
  assert all(name.startswith("m") for name in validation)
  assert len(source.files("train")) == 80 - len(validation)


def test_stdlib_with_nothing_held_out(tmp_path):
  (tmp_path / "a.py").write_text("some_name = 1\n")
  source = StdlibSource(DataConfig(validation_fraction=0.0), root=tmp_path)
  assert (source.files("train"), source.files("validation")) == (["a.py"], [])
  with pytest.raises(UserError, match="no .py files"):
    StdlibSource(DataConfig(), root=tmp_path / "nothing")


# Text files.

@pytest.mark.parametrize("num_lines", [60, 3000, 100_000])
def test_text_file_is_split_without_loss(tmp_path, num_lines):
  path = tmp_path / "a.txt"
  lines = [f"line {i} with some words in it é\n" for i in range(num_lines)]
  path.write_text("".join(lines), encoding="utf-8")
  source = open_source(str(path), DataConfig())
  train, validation = _texts(source, "train"), _texts(source, "validation")
  held_out = "".join(validation).splitlines(True)
  assert sorted(held_out + "".join(train).splitlines(True)) == sorted(lines)
  assert 0.01 < len(held_out) / num_lines < 0.2
  # Runs of blocks on one side are one document: cut only where the other side begins.
  assert len(train) <= len(validation) + 1
  assert source.approximate_bytes("train") == pytest.approx(len("".join(train).encode()), rel=0.2)


def test_without_held_out_a_file_is_one_document(tmp_path):
  path = tmp_path / "a.md"
  path.write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\n" * 50_000)
  source = open_source(str(path), DataConfig(validation_fraction=0.0))
  assert _texts(source, "train") == ["one\r\ntwo\n" * 50_000]
  assert _texts(source, "validation") == []


def test_an_enormous_line_is_cut_between_characters(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("é€😀" * 100_000, encoding="utf-8")
  source = open_source(str(path), DataConfig(validation_fraction=0.0))
  assert _texts(source, "train") == ["é€😀" * 100_000]


def test_folder_and_globs(tmp_path):
  (tmp_path / "sub" / "deep").mkdir(parents=True)
  (tmp_path / "__pycache__").mkdir()
  for name in ("b.txt", "a.py", "sub/c.txt", "sub/deep/d.txt", ".hidden", "__pycache__/x.txt"):
    (tmp_path / name).write_text(name)
  whole = DataConfig(validation_fraction=0.0)
  def found(spec):
    return _texts(open_source(str(spec), whole), "train")
  assert found(tmp_path) == ["a.py", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
  assert found(tmp_path / "*.txt") == ["b.txt"]
  assert found(tmp_path / "**" / "*.txt") == ["b.txt", "sub/c.txt", "sub/deep/d.txt"]


def test_fingerprint_follows_content_and_rule(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("hello")
  def fingerprint(**settings):
    return open_source(str(path), DataConfig(**settings)).fingerprint
  first = fingerprint()
  assert fingerprint() == first
  assert fingerprint(validation_fraction=0.1) != first
  os.utime(path, ns=(1, 1))
  assert fingerprint() != first


# Records.

def test_jsonl_and_parquet_hold_the_same_documents(tmp_path):
  texts = [f"document {i}\nwith lines" for i in range(100)]
  _write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)])
  pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": list(range(100))}), tmp_path / "a.parquet")
  config = DataConfig(validation_fraction=0.1)
  splits = [[_texts(open_source(str(tmp_path / name), config), split) for split in ("train", "validation")]
            for name in ("a.jsonl", "a.parquet")]
  assert splits[0] == splits[1]
  train, validation = splits[0]
  assert sorted(train + validation) == sorted(texts)
  assert len(validation) == 10 and validation[0] == texts[1]


def test_two_records_are_enough_for_both_splits(tmp_path):
  _write_jsonl(tmp_path / "a.jsonl", [{"body": "first"}, {"body": ""}, {"body": "second"}])
  source = open_source(str(tmp_path / "a.jsonl"), DataConfig(text_field="body"))
  assert (_texts(source, "train"), _texts(source, "validation")) == (["first"], ["second"])


def test_a_long_record_is_one_document_in_pieces(tmp_path):
  text = "word " * 50_000
  _write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": "b"}])
  source = open_source(str(tmp_path / "a.jsonl"), DataConfig())
  assert _texts(source, "train") == [text]


def test_parquet_is_read_from_several_row_groups(tmp_path):
  table = pyarrow.table({"text": pyarrow.array([f"row {i}" for i in range(1000)], pyarrow.large_string())})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
  source = open_source(str(tmp_path / "a.parquet"), DataConfig(validation_fraction=0.0))
  assert _texts(source, "train") == [f"row {i}" for i in range(1000)]


# Mistakes.

@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"good line\n\xff\xfe", r"a\.txt is not UTF-8 text \(byte 10\)"),
    ("a.txt", b"x" * 200_000 + b"\xc3", r"byte 200000"),
    ("a.txt", b"good\0bad", r"byte 4"),
    ("a.txt", b"", r"There is nothing in .*a\.txt"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', r"a\.jsonl:3 is not a JSON object but a list"),
    ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl:1 has no field 'text' .*did you mean 'txt'\?"),
    ("a.jsonl", b'{"body": "a", "id": 1}\n', r"a\.jsonl:1 has no field 'text' .*known are: body, id"),
    ("a.jsonl", b'{}\n', r"has none at all"),
    ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: the field 'text' is a number, not text"),
    ("a.jsonl", b'{"text": null}\n', r"is null, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"half a surrogate pair at character 0"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not valid JSON"),
    ("a.parquet", b"PAR1 but not really", r"a\.parquet is not a readable parquet file"),
])
def test_broken_files_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    list(open_source(str(tmp_path / name), DataConfig()).pieces("train"))
  assert "\n" not in str(error.value)


def test_parquet_with_the_wrong_columns(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "number": [1]}), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=r"no field 'text' .*content.*"):
    list(open_source(str(tmp_path / "a.parquet"), DataConfig()).pieces("train"))
  with pytest.raises(UserError, match=r"record 1: the field 'number' is a number"):
    list(open_source(str(tmp_path / "a.parquet"), DataConfig(text_field="number")).pieces("train"))


def test_a_parquet_file_with_flipped_bytes(tmp_path):
  path = tmp_path / "a.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"text": [f"record {i}" * 50 for i in range(500)]}), path)
  data = bytearray(path.read_bytes())
  data[100:160] = b"\xff" * 60
  path.write_bytes(data)
  with pytest.raises(UserError, match=r"a\.parquet ") as error:
    list(open_source(str(path), DataConfig()).pieces("train"))
  assert "\n" not in str(error.value)


def test_a_source_that_is_not_there(tmp_path):
  for spec in ("stdlb", str(tmp_path / "*.txt"), ""):
    with pytest.raises(UserError, match="config.data.source"):
      open_source(spec, DataConfig())
  with pytest.raises(UserError, match="holds no file"):
    open_source(str(tmp_path), DataConfig())


def test_a_file_that_vanishes_is_named(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("text")
  source = FileSource(str(path), DataConfig())
  path.unlink()
  with pytest.raises(UserError, match=r"a\.txt cannot be read"):
    list(source.pieces("train"))


@pytest.mark.parametrize("spec, name", [
    ("stdlib", "stdlib"), ("tfds:lm1b", "lm1b"), ("tfds:wiki/en:1.0.0", "wiki_en"), ("/data/books/*.txt", "books"),
    ("notes/a.b.jsonl", "a"), ("*.txt", "files"), ("**/*.py", "files")])
def test_short_name(spec, name):
  assert short_name(spec) == name
