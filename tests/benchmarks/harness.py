"""What all benchmarks share: timing variants in turn, and printing what came out, with the machine it came from.

A shared or throttled machine is slower at one moment than at another, so variants are never timed one after the other
but in turn, round by round, and it is their medians and the ratios of those that a benchmark reports. Importing this
file makes lmjax importable from where it lies, so that a benchmark runs without being installed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any, Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
  sys.path.insert(0, str(ROOT))

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers", "torch",
             "transformers")


def parser(docstring: str = "") -> argparse.ArgumentParser:
  """Returns a parser of the flags that every benchmark takes; a benchmark adds its own."""
  result = argparse.ArgumentParser(description=docstring.partition("\n")[0])
  result.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it works")
  result.add_argument("--rounds", type=int, help="rounds of each comparison")
  result.add_argument("--json", help="write the JSON to this file instead of printing it as the last line")
  return result


def timed(function: Callable[[], None]) -> float:
  """Returns the seconds that a call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def interleave(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
  """Times variants in turn.

  Args:
    variants: what to call, by name; each must have done its work, on the device too, when it returns. What needs
      warming up has been called before.
    rounds: how often each is called. Every second round goes backwards, so that none always follows the same one.

  Returns:
    The seconds of each call, by name.
  """
  seconds = {name: [] for name in variants}
  for number in range(rounds):
    names = list(variants)
    for name in names if number % 2 == 0 else reversed(names):
      seconds[name].append(timed(variants[name]))
  return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
  """Returns the median of each list."""
  return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, rows: list[dict[str, Any]], notes: str = "") -> None:
  """Prints an aligned table, and the same as JSON with the date, the machine and the versions.

  The JSON goes to the file of `--json=FILE`, and is the last line printed where that flag is not given.

  Args:
    title: of the table.
    rows: one dict a line; columns stand in the order in which keys first appear, and a missing value is a dash.
    notes: printed below the table: what was compared with what, which peer was missing.
  """
  print(f"\n{title}\n\n{_table(rows)}\n")
  if notes:
    print(f"{notes}\n")
  result = {"title": title, **_machine(), "rows": rows, "notes": notes}
  path = parser().parse_known_args()[0].json
  if path:
    pathlib.Path(path).write_text(json.dumps(result, indent=2) + "\n")
  else:
    print(json.dumps(result), flush=True)


def _table(rows: list[dict[str, Any]]) -> str:
  columns = list(dict.fromkeys(key for row in rows for key in row))
  cells = [columns, *([_cell(row[key]) if key in row else "-" for key in columns] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  # Names to the left, figures to the right.
  left = [all(isinstance(row[key], str) for row in rows if key in row) for key in columns]
  lines = ["  ".join(cell.ljust(width) if is_name else cell.rjust(width)
                     for cell, width, is_name in zip(line, widths, left)).rstrip() for line in cells]
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: Any) -> str:
  if not isinstance(value, float):
    return "-" if value is None else str(value)
  digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
  return f"{value:,.{digits}f}"


def _machine() -> dict[str, Any]:
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "cpu": _cpu_model(),
          "cores": os.cpu_count(), "devices": _devices(), "versions": versions}


def _cpu_model() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _devices() -> list[str] | None:
  """Returns what JAX runs on, or None in a benchmark that has not imported it."""
  return [device.device_kind for device in sys.modules["jax"].devices()] if "jax" in sys.modules else None
