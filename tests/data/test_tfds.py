import pytest

tfds = pytest.importorskip("tensorflow_datasets")

from lmjax.config import DataConfig, UserError  # noqa: E402
from lmjax.data.sources import open_source  # noqa: E402
from lmjax.data.tfds_builder import prepare_tfds  # noqa: E402


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Returns (data_dir, folder) of a data set of 40 records, 4 of them held out."""
  folder = tmp_path_factory.mktemp("tfds")
  (folder / "a.jsonl").write_text("".join(f'{{"text": "record {i} é"}}\n' for i in range(40)))
  return folder, prepare_tfds(str(folder / "a.jsonl"), folder / "data", DataConfig(validation_fraction=0.1))


def _documents(source, split):
  return sorted(piece.text for piece in source.pieces(split) if piece.ends_document)


def test_a_prepared_source_keeps_its_splits(prepared):
  folder, path = prepared
  original = open_source(str(folder / "a.jsonl"), DataConfig(validation_fraction=0.1))
  for spec in (path, "tfds:lmjax_text", "tfds:lmjax_text:1.0.0"):
    source = open_source(spec, DataConfig(data_dir=str(folder / "data")))
    assert len(_documents(source, "validation")) == 4
    for split in ("train", "validation"):
      assert _documents(source, split) == _documents(original, split)
      assert source.approximate_bytes(split) > 0


def test_a_data_set_with_only_train_is_split_by_record(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  (tmp_path / "b.txt").write_text("two")
  path = prepare_tfds(str(tmp_path / "*.txt"), tmp_path / "data", DataConfig(validation_fraction=0.0))
  source = open_source(path, DataConfig(validation_fraction=0.5))
  assert len(_documents(source, "train")) == len(_documents(source, "validation")) == 1
  assert _documents(open_source(path, DataConfig(validation_fraction=0.0)), "train") == ["one", "two"]


@pytest.mark.parametrize("spec, settings, message", [
    ("tfds:lmjax_txt", {}, r"did you mean 'lmjax_text'\?"),
    ("tfds:lmjax_text:2.0.0", {}, r"only lmjax_text/1\.0\.0"),
    ("tfds:lmjax_text/english", {}, r"only lmjax_text/1\.0\.0"),
    ("tfds:lm1b", {}, r"'lm1b' is not prepared in .*array_record"),
    ("tfds:", {}, r"no TFDS data set ''"),
    ("tfds:lmjax_text", {"text_field": "txt"}, r"no field 'txt' .*did you mean 'text'\?"),
])
def test_mistakes(prepared, spec, settings, message):
  folder, _ = prepared
  with pytest.raises(UserError, match=message):
    open_source(spec, DataConfig(data_dir=str(folder / "data"), **settings))


def test_tfrecord_is_refused(prepared, tmp_path):
  _, path = prepared
  import pathlib
  import shutil
  copy = pathlib.Path(shutil.copytree(path, tmp_path / "copy"))
  info = copy / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(UserError, match="stored as tfrecord, which needs TensorFlow"):
    open_source(str(copy), DataConfig())


def test_a_damaged_folder_is_refused(prepared, tmp_path):
  (tmp_path / "dataset_info.json").write_text("{")
  (tmp_path / "features.json").write_text("{")
  with pytest.raises(UserError, match="not a TFDS data set that can be read"):
    open_source(str(tmp_path), DataConfig())
