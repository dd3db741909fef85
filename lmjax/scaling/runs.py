"""Reading finished runs: from a sweep's folder, whose subfolders are runs, or from a CSV file with a row each."""

import csv
import dataclasses
import json
import math
import pathlib
from typing import Any, Mapping, Sequence

import numpy as np

from lmjax.config_checks import UserError, by_full_name, nearest
from lmjax.scaling.counts import ATTENTION_COLUMNS, FlopCount, attention_flops
from lmjax.scaling.laws import Points

_FINISHED = "finished"
_DEPTH = 3  # How far below the sweep's folder its runs may lie.


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells by column and row, as they were written.

  Attributes:
    source: what was read, to tell the user.
    columns: the cells of each column.
    places: where each row stands, such as `runs.csv, line 3`.
    names: of the rows.
    notes: sentences about what was left out.
    folders: of the runs, where they are a sweep's.
  """
  source: str
  columns: Mapping[str, Sequence[Any]]
  places: Sequence[str]
  names: Sequence[str]
  notes: Sequence[str] = ()
  folders: Sequence[pathlib.Path] = ()

  def numbers(self, column: str, flag: str) -> np.ndarray:
    """Returns a column as numbers above 0.

    Args:
      column: its name.
      flag: that names the column, to tell the user.

    Raises:
      UserError: where the column is missing, or a cell is not such a number.
    """
    if column not in self.columns:
      raise UserError(f"{self.source} has no column {column!r} for --{flag}{_known(self, column)}")
    return np.array([_positive(cell, f"{place}, column {column!r},", flag)
                     for cell, place in zip(self.columns[column], self.places)])

  def text(self, column: str, flag: str) -> list[str]:
    """Returns a column as text; raises a UserError where it is missing."""
    if column not in self.columns:
      raise UserError(f"{self.source} has no column {column!r} for --{flag}{_known(self, column)}")
    return [str(cell) for cell in self.columns[column]]


def _known(table: Table, column: str) -> str:
  # A sweep has a column for every setting; a file has few.
  return nearest(column, table.columns) if len(table.columns) > 8 else f"; its columns are {', '.join(table.columns)}."


@dataclasses.dataclass(frozen=True)
class Runs:
  """Runs to fit a law to.

  Attributes:
    names: of the rows.
    run: which run each row belongs to, 0, 1, ...; intervals come from drawing whole runs.
    points: size, tokens and compute of each row.
    loss: of each row.
    table: what they were read from.
  """
  names: Sequence[str]
  run: np.ndarray
  points: Points
  loss: np.ndarray
  table: Table

  @property
  def num_runs(self) -> int:
    return int(self.run.max()) + 1

  def keep(self, rows: np.ndarray) -> "Runs":
    """Returns the runs without the rows where `rows` is False; the table stays whole."""
    _, run = np.unique(self.run[rows], return_inverse=True)
    return Runs([name for name, kept in zip(self.names, rows) if kept], run, self.points[rows], self.loss[rows],
                self.table)


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns hold what; tokens and flops may be None, but not both."""
  size: str
  loss: str
  tokens: str | None = None
  flops: str | None = None
  run: str | None = None


def read_table(path: str) -> Table:
  """Reads a sweep's folder or a CSV file.

  Args:
    path: of either.

  Returns:
    The table. A sweep's columns are what result.json holds and, by their full names, the settings of config.json.

  Raises:
    UserError: where there is no such file, no run, or a file that cannot be read.
  """
  found = pathlib.Path(path)
  if found.is_dir():
    return _read_sweep(found)
  if found.is_file():
    return _read_csv(found)
  raise UserError(f"There is no file or folder {path}; give --input the folder of a sweep or a CSV file.")


def select(table: Table, columns: Columns, per_param_token: float = 6.0, attention: bool = False
           ) -> tuple[Runs, FlopCount]:
  """Returns the runs of a table, with the tokens or the compute that it does not hold worked out by a convention.

  Args:
    table: of runs.
    columns: which hold what.
    per_param_token: FLOPs for each parameter and token.
    attention: whether the FLOPs of attention's scores count, too, for which the table must have the shape's columns.

  Returns:
    The runs and the convention.

  Raises:
    UserError: where a column is missing or has a cell that is not a number above 0.
  """
  size, loss = table.numbers(columns.size, "size"), table.numbers(columns.loss, "loss")
  count = FlopCount(per_param_token, attention_flops(
      *(table.numbers(name, "attention") for name in ATTENTION_COLUMNS)) if attention else 0.0)
  flops = None if columns.flops is None else table.numbers(columns.flops, "flops")
  tokens = count.tokens(size, flops) if columns.tokens is None else table.numbers(columns.tokens, "tokens")
  points = Points(size, tokens, count.flops(size, tokens) if flops is None else flops)
  if columns.run is not None:
    _, run = np.unique(table.text(columns.run, "run"), return_inverse=True)
    return Runs(table.names, run, points, loss, table), count
  # A copy of a run tells nothing new.
  known: dict[tuple, int] = {}
  run = np.array([known.setdefault(row, len(known)) for row in zip(size, tokens, points.flops, loss)])
  if copies := len(run) - len(known):
    table = dataclasses.replace(table, notes=[*table.notes, f"{copies} of {len(run)} runs are copies of others, in "
                                              "compute and loss too, and count as one run with these."])
  return Runs(table.names, run, points, loss, table), count


def _positive(cell: Any, where: str, flag: str) -> float:
  if cell is None or cell == "":
    raise UserError(f"{where} is empty, but --{flag} needs a number above 0 in each run; fill it in, leave the run "
                    "out, or name another column.")
  try:
    number = float(cell)
  except (TypeError, ValueError):
    number = None
  if number is None or isinstance(cell, bool):
    raise UserError(f"{where} is {cell!r}, which is not a number; --{flag} needs one above 0.")
  if not 0 < number < math.inf:
    raise UserError(f"{where} is {cell}, but --{flag} needs a finite number above 0.")
  return number


def _read_csv(path: pathlib.Path) -> Table:
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      reader = csv.reader(file, strict=True)
      rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
  except (UnicodeDecodeError, csv.Error) as e:
    raise UserError(f"{path} is not a CSV file in UTF-8 ({e}); give one with a line of column names.") from e
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); give --input a file that can.") from e
  if len(rows) < 2:
    raise UserError(f"{path} holds no runs; give a CSV file with a line of column names and a line for each run.")
  header = [name.strip() for name in rows[0][1]]
  for separator, name in ((";", "semicolons"), ("\t", "tabs")):
    if len(header) == 1 and separator in header[0]:
      raise UserError(f"{path} has {name} between its cells; give a file with commas between, and points in numbers.")
  while header and not header[-1]:  # Spreadsheets fill up rows.
    header.pop()
  if len(set(header)) < len(header):
    twice = next(name for name in header if header.count(name) > 1)
    raise UserError(f"{path} has the column {twice!r} more than once; give each its own name.")
  for line, row in rows[1:]:
    if len(row) < len(header) or any(cell.strip() for cell in row[len(header):]):
      raise UserError(f"{path}, line {line}, has {len(row)} cells for {len(header)} columns; give each column one.")
  lines = [f"line {line}" for line, _ in rows[1:]]
  columns = {name: [row[i].strip() for _, row in rows[1:]] for i, name in enumerate(header)}
  return Table(str(path), columns, [f"{path}, {line}" for line in lines], lines)


def _read_sweep(folder: pathlib.Path) -> Table:
  folders = _run_folders(folder, _DEPTH)
  if not folders:
    raise UserError(f"{folder} holds no run: none of its folders has a config.json; give --input a sweep's folder.")
  records, kept, left_out = [], [], []
  for run in folders:
    result = _json(run / "result.json") if (run / "result.json").exists() else {}
    if result.get("status") == _FINISHED:
      records.append({**by_full_name(_json(run / "config.json")), **result})
      kept.append(run)
    else:
      left_out.append(str(run.relative_to(folder)))
  if not kept:
    raise UserError(f"None of the {len(folders)} runs in {folder} has finished; wait for them.")
  notes = []
  if left_out:
    notes.append(f"{len(left_out)} of {len(folders)} runs have not finished and are left out: {', '.join(left_out)}.")
  columns = {name: [record.get(name) for record in records] for name in dict.fromkeys(k for r in records for k in r)}
  return Table(str(folder), columns, [str(run / "result.json") for run in kept],
               [str(run.relative_to(folder)) for run in kept], notes, kept)


def _run_folders(folder: pathlib.Path, depth: int) -> list[pathlib.Path]:
  """Returns the folders of runs below a folder; what lies in a run is the run's own."""
  found = []
  for child in sorted(path for path in folder.iterdir() if path.is_dir()):
    if (child / "config.json").exists():
      found.append(child)
    elif depth > 1:
      found += _run_folders(child, depth - 1)
  return found


def _json(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError) as e:
    raise UserError(f"{path} is not JSON as a run writes it ({e}); mend it or take that run out of the sweep.") from e
  if not isinstance(record, dict):
    raise UserError(f"{path} is not a JSON object as a run writes it; mend it or take that run out of the sweep.")
  return record
