"""Prepared TFDS data sets as a source, read from ArrayRecord files without TensorFlow.

The data set's own `train` split is used, and as validation the first there is of `validation`, `valid`, `dev` and
`test`. Where there is only `train`, records are held out as in `pieces.is_held_out`.
"""

import difflib
import pathlib
from typing import Any, Iterator

from lmjax.config import DataConfig
from lmjax.config_checks import UserError, nearest
from lmjax.data.pieces import Piece, cut_text, digest, select_split, split_share

VALIDATION_NAMES = ("validation", "valid", "dev", "test")
_RECORDS_AT_A_TIME = 64


class TfdsSource:
  """A data set that `tfds` has prepared in the array_record format."""

  def __init__(self, spec: str, config: DataConfig):
    """Finds the data set.

    Args:
      spec: `tfds:NAME[/CONFIG][:VERSION]`, looked for in `config.data_dir`, or the folder of a prepared data set.
      config: `data_dir`, `text_field` and `validation_fraction` are used.

    Raises:
      UserError: where it is unknown, not prepared, stored in another format, or has no such text field.
    """
    self.spec = spec
    self._field = config.text_field
    self._fraction = config.validation_fraction
    self._builder, folder = open_builder(spec, config.data_dir)
    info = self._builder.info
    if "train" not in info.splits:
      raise UserError(f"The TFDS data set in {folder} has no split 'train' but {', '.join(info.splits)}; choose "
                      "another.")
    if self._field not in info.features:
      raise UserError(f"The TFDS data set in {folder} has no field {self._field!r} (config.data.text_field)"
                      f"{nearest(self._field, info.features)}")
    present = [name for name in VALIDATION_NAMES if name in info.splits]
    self._validation = present[0] if present else None
    fraction = None if self._validation else self._fraction
    self.fingerprint = digest("tfds", 1, info.full_name, fraction, self._field, folder_facts(folder))

  def pieces(self, split: str) -> Iterator[Piece]:
    """Yields the documents of a split; a record is a document, and an empty one yields nothing.

    Raises:
      UserError: for a record whose field is not text.
    """
    if self._validation:
      units = self._records(self._validation if split == "validation" else "train")
      return (piece for unit in units for piece in cut_text(*unit))
    return select_split(self._records("train"), split, self._fraction)

  def approximate_bytes(self, split: str) -> int | None:
    """Returns about how many bytes the records of a split take."""
    splits = self._builder.info.splits
    if self._validation:
      return int(splits[self._validation if split == "validation" else "train"].num_bytes)
    return round(splits["train"].num_bytes * split_share(self._fraction, split))

  def _records(self, name: str) -> Iterator[Piece]:
    records = self._builder.as_data_source(name)
    for start in range(0, len(records), _RECORDS_AT_A_TIME):
      # Many at a time: reading ArrayRecord one by one is several times slower.
      batch = records.__getitems__(list(range(start, min(start + _RECORDS_AT_A_TIME, len(records)))))
      for number, record in enumerate(batch, start):
        text = self._text(record[self._field], f"record {number} of {self._builder.info.full_name} {name}")
        if text:
          yield Piece(text, True)

  def _text(self, value: Any, where: str) -> str:
    if isinstance(value, bytes):
      try:
        return value.decode()
      except UnicodeDecodeError as e:
        raise UserError(f"{where} is not UTF-8 text (byte {e.start} of {self._field!r}); convert the data set.") from e
    if isinstance(value, str):
      return value
    raise UserError(f"The field {self._field!r} of {where} is not text but {type(value).__name__}; set "
                    "config.data.text_field to a field that is.")


def is_prepared_folder(spec: str) -> bool:
  """Says whether `spec` is the folder of a prepared TFDS data set."""
  folder = pathlib.Path(spec).expanduser()
  return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def folder_facts(folder: pathlib.Path) -> list[tuple[str, int, int]]:
  """Returns what changes when the files of a prepared data set do: their names, sizes and times."""
  return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())


def open_builder(spec: str, data_dir: str | None) -> tuple[Any, pathlib.Path]:
  """Returns the builder of a prepared data set, and its folder.

  Args:
    spec: `tfds:NAME[/CONFIG][:VERSION]`, or the folder.
    data_dir: where data sets lie; None means TFDS's own default.

  Raises:
    UserError: where it is unknown, not prepared, or not stored as ArrayRecord files.
  """
  if spec.startswith("tfds:"):
    folder = _find_prepared(spec.removeprefix("tfds:"), data_dir)
  else:
    folder = pathlib.Path(spec).expanduser()
  builder = _builder_in(folder)
  stored = builder.info.file_format.value if builder.info.file_format else "an unknown format"
  if stored != "array_record":
    raise UserError(f"The TFDS data set in {folder} is stored as {stored}, which needs TensorFlow to be read; "
                    f"prepare it as array_record: {_how_to_prepare(builder.name)}")
  return builder, folder


def _builder_in(folder: pathlib.Path) -> Any:
  import tensorflow_datasets as tfds
  try:
    return tfds.builder_from_directory(str(folder))
  except Exception as e:  # tfds raises whatever its parsers do.
    raise UserError(f"{folder} is not a TFDS data set that can be read ({_first_line(e)}); prepare it again.") from e


def _find_prepared(full_name: str, data_dir: str | None) -> pathlib.Path:
  """Returns the folder of NAME[/CONFIG][:VERSION], of the newest version where none is given."""
  import tensorflow_datasets as tfds
  full_name, _, version = full_name.partition(":")
  name, _, config = full_name.partition("/")
  where = pathlib.Path(data_dir).expanduser() if data_dir else pathlib.Path(tfds.core.constants.DATA_DIR)
  folders = [info.parent for pattern in ("*", "*/*") for info in (where / name).glob(f"{pattern}/dataset_info.json")]
  if not name or not folders:
    raise UserError(_unprepared(name, where))
  fitting = [folder for folder in folders if version in ("", folder.name)
             and config in ("", _config_name(folder, where / name))]
  if not fitting:
    present = ", ".join(sorted(str(folder.relative_to(where)) for folder in folders))
    raise UserError(f"There is no {full_name}{':' * bool(version)}{version} in {where} (config.data.data_dir), only "
                    f"{present}; choose one of them.")
  configs = sorted({_config_name(folder, where / name) for folder in fitting})
  if len(configs) > 1:
    raise UserError(f"The TFDS data set {name!r} in {where} has the configs {', '.join(configs)}; say which, as in "
                    f"tfds:{name}/{configs[0]}.")
  return max(fitting, key=lambda folder: tfds.core.Version(folder.name))


def _config_name(folder: pathlib.Path, root: pathlib.Path) -> str:
  return folder.parent.name if folder.parent != root else ""


def _unprepared(name: str, where: pathlib.Path) -> str:
  import tensorflow_datasets as tfds
  # Builders that need TensorFlow are not listed without it, but their modules are there.
  modules = pathlib.Path(tfds.__file__).parent.glob("*/*.py")
  known = {*tfds.list_builders(with_community_datasets=False), *(path.stem for path in modules)}
  if name in known:
    return (f"The TFDS data set {name!r} is not prepared in {where} (config.data.data_dir); prepare it where there is "
            f"a network: {_how_to_prepare(name)}")
  prepared = [path.name for path in where.iterdir() if path.is_dir()] if where.is_dir() else []
  if not prepared and not difflib.get_close_matches(name, known, n=1):
    return (f"There is no TFDS data set {name!r}: {where} (config.data.data_dir) holds none, and TFDS knows none of "
            "that name; check the name and the folder.")
  return f"There is no TFDS data set {name!r} in {where} (config.data.data_dir){nearest(name, prepared or known)}"


def _how_to_prepare(name: str) -> str:
  return (f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare() "
          "after import tensorflow_datasets as tfds.")


def _first_line(e: Exception) -> str:
  return (str(e).splitlines() or [type(e).__name__])[0]
