"""Reading what runs have written, also while they are writing it."""

import json
import math
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax.config_checks import UserError


def read_json(path: epath.Path) -> Mapping[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as e:
    raise UserError(f"{path} is not JSON ({e}); the report needs the file as the run wrote it.") from e


def read_lines(path: epath.Path) -> list[Mapping[str, Any]]:
  records = []
  for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
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
  points: dict[str, dict[int, float]] = {}
  for record in records:
    for name, value in record.items():
      if name != "step":
        # Of a step that was logged twice the later line counts.
        points.setdefault(name, {})[record["step"]] = math.nan if value is None else float(value)
  return {name: (np.array(sorted(of)), np.array([of[step] for step in sorted(of)])) for name, of in points.items()}
