"""Records of labelled tasks: rows with columns, from files, prepared TFDS data sets or the standard library."""

import csv
import dataclasses
import pathlib
import re
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from lmjax.config import DataConfig
from lmjax.config_checks import UserError
from lmjax.data.file_sources import find_files, json_lines, kind_of, unreadable
from lmjax.data.pieces import digest, is_held_out
from lmjax.data.stdlib_tasks import stdlib_records
from lmjax.data.task import value_at
from lmjax.data.tfds_sources import VALIDATION_NAMES, folder_facts, is_prepared_folder, open_builder

_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_SOURCES = (f"a path or glob of files of type {', '.join(_SUFFIXES)}, tfds:NAME, the folder of a prepared TFDS data "
            "set, or stdlib:NAME")
_MAX_FIELD = 1 << 30


@dataclasses.dataclass(frozen=True)
class Records:
  """Some rows of a source.

  Attributes:
    where: the source, for messages.
    rows: all of its rows.
    chosen: numbers of those that are meant.
    names: names of labels by column, where the source knows them.
    fingerprint: changes when the rows do.
  """
  where: str
  rows: Sequence[Mapping[str, Any]]
  chosen: np.ndarray
  names: Mapping[str, tuple[str, ...]]
  fingerprint: str

  def __len__(self) -> int:
    return len(self.chosen)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return self.rows[int(self.chosen[index])]

  def name(self, index: int) -> str:
    """Returns what a message calls a record."""
    return f"Record {int(self.chosen[index])} of {self.where}"


def open_records(spec: str, split: str, config: DataConfig, whole: bool = False) -> Records:
  """Opens the records of a source.

  Args:
    spec: as in `Task.source`; `[SPLIT]` at its end names a split of a TFDS data set.
    split: "train" or "validation".
    config: `data_dir` and `validation_fraction` are used.
    whole: whether nothing is held out of the source.

  Raises:
    UserError: where there is no such source, it cannot be read, or holds no record.
  """
  fraction = 0.0 if whole else config.validation_fraction
  base, named = re.fullmatch(r"(.*?)(?:\[([\w.-]+)\])?", spec, flags=re.DOTALL).groups()
  if spec.startswith("stdlib:"):
    rows = stdlib_records(spec.removeprefix("stdlib:"), split, fraction)
    found = Records(spec, rows, np.arange(len(rows)), {}, digest("stdlib", spec, split, fraction, len(rows), rows[:20]))
  elif spec.startswith("tfds:") or is_prepared_folder(base):
    found = _tfds(base, split, named, fraction, config)
  else:
    found = _of_split(_files(spec), split, fraction)
  if not len(found):
    raise UserError(f"{found.where} has no record for {split}; give a source that has some"
                    f"{', or a config.data.validation_fraction that holds some out' if split == 'validation' else ''}.")
  return found


def _of_split(records: Records, split: str, fraction: float) -> Records:
  held_out = np.array([is_held_out(number, fraction) for number in range(len(records.rows))], bool)
  return dataclasses.replace(records, chosen=np.flatnonzero(held_out == (split == "validation")),
                             fingerprint=digest(records.fingerprint, split, fraction))


def _files(spec: str) -> Records:
  paths = find_files(spec, "The source", _SOURCES)
  for path in paths:
    if path.suffix not in _SUFFIXES:
      raise UserError(f"{path} is no file of records; give files of type {', '.join(_SUFFIXES)}.")
  tables = [_read(path) for path in paths]
  rows = tables[0] if len(tables) == 1 else [row for table in tables for row in table]
  facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
  return Records(spec, rows, np.arange(len(rows)), {}, digest("records", facts))


def _read(path: pathlib.Path) -> Sequence[Mapping[str, Any]]:
  try:
    if path.suffix == ".parquet":
      return _parquet(path)
    return [record for _, record in json_lines(path)] if path.suffix == ".jsonl" else [*_separated(path)]
  except OSError as e:
    raise unreadable(path, e) from e


def _separated(path: pathlib.Path) -> Iterator[Mapping[str, str]]:
  """Yields the rows of a .csv, or of a .tsv, in which quotes mean nothing, as in GLUE's."""
  options = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix == ".tsv" else {}
  csv.field_size_limit(_MAX_FIELD)  # What it is otherwise, 2**17, is less than a long text has.
  with open(path, encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file, strict=True, **options)
    try:
      for record in reader:
        if None in record or None in record.values():
          raise UserError(f"{path}, line {reader.line_num}, has another number of values than the first line, which "
                          f"names {len(reader.fieldnames)} columns; mend it.")
        yield record
    except (csv.Error, UnicodeDecodeError) as e:
      raise UserError(f"{path}, line {reader.line_num + 1}, cannot be read ({e}); mend it.") from e


class _Table:
  """A table of Arrow, row by row."""

  def __init__(self, table: Any):
    self._columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    self._num_rows = table.num_rows

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return {name: column[index].as_py() for name, column in self._columns.items()}


def _parquet(path: pathlib.Path) -> Sequence[Mapping[str, Any]]:
  import pyarrow
  import pyarrow.parquet
  try:
    return _Table(pyarrow.parquet.read_table(path))
  except pyarrow.ArrowException as e:
    raise UserError(f"{path} is not a readable parquet file ({str(e).splitlines()[0]}); write it again.") from e


class _TfdsRows:
  """A split of a TFDS data set, its values as plain Python's."""

  def __init__(self, builder: Any, split: str):
    self._records = builder.as_data_source(split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return _plain(self._records[index])


def _tfds(spec: str, split: str, named: str | None, fraction: float, config: DataConfig) -> Records:
  builder, folder = open_builder(spec, config.data_dir)
  splits = builder.info.splits
  apart = [name for name in VALIDATION_NAMES if name in splits]
  source = named or (split if split == "train" else (*apart, "train")[0])
  if source not in splits:
    raise UserError(f"The TFDS data set in {folder} has no split {source!r} but {', '.join(splits)}; name one, "
                    f"as in {spec}[{next(iter(splits), 'train')}].")
  rows = _TfdsRows(builder, source)
  names = {name: tuple(feature.names) for name, feature in builder.info.features.items()
           if getattr(feature, "names", None)}
  records = Records(f"{builder.info.full_name} {source}", rows, np.arange(len(rows)), names,
                    digest("tfds", builder.info.full_name, source, len(rows), folder_facts(folder)))
  return records if apart and not named else _of_split(records, split, fraction)


def _plain(value: Any) -> Any:
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:  # No text, but perhaps nothing that is read either.
      return value
  if isinstance(value, Mapping):
    return {name: _plain(part) for name, part in value.items()}
  if isinstance(value, np.ndarray) or isinstance(value, np.generic):
    return _plain(value.tolist())
  return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def distinct(records: Records, column: str) -> tuple[str, ...]:
  """Returns the sorted distinct texts of a column."""
  values = (value_at(records[i], column, records.name(i)) for i in range(len(records)))
  flat = (one for value in values for one in (value if isinstance(value, (list, tuple)) else [value]))
  return tuple(sorted({one for one in flat if _is_label(one, column, records)}))


def _is_label(value: Any, column: str, records: Records) -> bool:
  if not isinstance(value, str):
    raise UserError(f"{records.where} has {kind_of(value)} in the column {column!r}, so that its labels have no names; "
                    "set the task's labels to their names, the first being that of 0.")
  return True
