"""Reading what runs have written, also while they are writing it."""

import json
import math
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax.config_checks import UserError


def read_json(path: epath.Path) -> Mapping[str, Any]:
  """Returns what a file holds, or {} where there is none; raises a UserError where it is not JSON."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as e:
    raise UserError(f"{path} is not JSON ({e}); it must be as the run wrote it.") from e


def read_lines(path: epath.Path, most: int | None = None) -> list[Mapping[str, Any]]:
  """Returns the records of a file with one a line.

  Args:
    path: of metrics.jsonl or samples.jsonl.
    most: how many to return about; None is all. Evaluations, and the first and last records, are always among them.

  Raises:
    UserError: where a line is no record. The last one may be half written.
  """
  lines = list(enumerate(path.read_text().splitlines(keepends=True), start=1))
  if most is not None and len(lines) > most:
    every = -(-len(lines) // most)
    lines = [line for line in lines if line[0] % every == 1 or line[0] > len(lines) - 3 or '/loss"' in line[1]]
  records = []
  for number, line in lines:
    if not line.endswith("\n"):
      break  # The run is writing it now, or was killed while it did.
    try:
      record = json.loads(line)
      record["step"] = int(record["step"])
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f"{path}, line {number}, is not a JSON object with a step; mend or remove that line.") from e
    records.append(record)
  return records


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns (steps, values) of each metric, ordered by step; of a step that was logged twice the later line counts."""
  points: dict[str, dict[int, float]] = {}
  for record in records:
    for name, value in record.items():
      if name != "step":
        points.setdefault(name, {})[record["step"]] = math.nan if value is None else float(value)
  return {name: (np.array(sorted(of)), np.array([of[step] for step in sorted(of)])) for name, of in points.items()}
