"""A worker of a sweep: takes a trial, runs it, ends it, until there are none.

Trials run one after another in the worker's own process, because a start of Python and JAX costs more than many a
small trial; what a crash takes with it is the process, which the driver starts again, and not the trial, which the next
worker goes on with from its checkpoint.
"""

import json
import math
import pathlib
import time
from typing import Any, Callable, Mapping

from absl import logging

from lmjax.config_checks import Refused, UserError
from lmjax.sweeps.board import Board, Claim
from lmjax.sweeps.space import Settings

# What result.json calls what an evaluation calls SET/NAME, of the first set.
_OF_RESULT = {"eval_loss": "loss", "bits_per_byte": "bits_per_byte"}

Report = Callable[[int, Mapping[str, float]], bool]
RunTrial = Callable[[Settings, pathlib.Path, Report], Mapping[str, Any]]


def work(board: Board, run_trial: RunTrial, pause: float = 1.0) -> bool:
  """Runs trials until all have ended.

  Args:
    board: of the sweep.
    run_trial: (settings, folder, report) -> what result.json holds. It goes on with what the folder has, calls `report`
      with the evaluation's number, from 1 on, and its metrics after each one in the loop, and stops with the status
      "pruned" where that says so.
    pause: seconds between looks for a trial, while others run the last ones.

  Returns:
    False where a signal has stopped it before.
  """
  while True:
    claim = board.take()
    if claim is None:
      if board.is_over():
        return True
      time.sleep(pause)
    elif not _run(board, claim, run_trial):
      return False


def metric_of(result: Mapping[str, Any], folder: pathlib.Path, metric: str) -> float | None:
  """Returns a metric of a run: of its result, else of its last evaluation that had it; None where there is none."""
  if metric in result:
    return result[metric]
  path = folder / "metrics.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return next((record[metric] for record in reversed(records) if metric in record), None)


def _run(board: Board, claim: Claim, run_trial: RunTrial) -> bool:
  """Runs a trial and ends it, or leaves it to be run again; returns whether the worker goes on."""
  sweep = board.sweep

  def report(count: int, values: Mapping[str, float]) -> bool:
    value = _among(values, sweep.metric)
    return value is not None and board.report(claim, count, value)

  try:
    result = _result(claim.folder)  # There is one where a worker has died just after the end.
    if result.get("status") not in ("finished", "pruned"):
      result = run_trial(claim.settings, claim.folder, report)
  except Exception as e:
    mistake = isinstance(e, UserError)
    reason = _line(str(e) if mistake else f"{type(e).__name__}: {e}")
    if _result(claim.folder).get("status") == "stopped":  # By a loss that is not finite, or a spike.
      board.end(claim, "diverged", reason=reason)
    elif mistake and not isinstance(e, Refused) or board.fails(claim) > sweep.retries:
      board.end(claim, "failed", reason=reason)
    else:
      logging.exception("Trial %d failed and is run again.", claim.number)
      board.leave(claim)
    return True
  if result["status"] == "interrupted":
    board.leave(claim)
    return False
  if result["status"] == "pruned":
    board.end(claim, "pruned")
    return True
  value = metric_of(result, claim.folder, sweep.metric)
  if isinstance(value, (int, float)) and math.isfinite(value):
    board.end(claim, "complete", float(value))
  else:
    board.end(claim, "failed", reason=f"its {sweep.metric} is {value}, which is not a finite number")
  return True


def _result(folder: pathlib.Path) -> Mapping[str, Any]:
  path = folder / "result.json"
  return json.loads(path.read_text()) if path.exists() else {}


def _among(values: Mapping[str, float], metric: str) -> float | None:
  """Returns a metric, which may have the name that it has in result.json, among those of an evaluation."""
  if metric in values:
    return values[metric]
  short = _OF_RESULT.get(metric)
  return next((value for name, value in values.items() if short and name.rpartition("/")[2] == short), None)


def _line(text: str) -> str:
  return " ".join(text.split())
