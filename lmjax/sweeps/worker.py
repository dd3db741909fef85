"""A worker of a sweep: takes a trial, or several that train together, runs them, ends them, until there are none.

Trials run in the worker's own process, because a start of Python and JAX costs more than many a
small trial; what a crash takes with it is the process, which the driver starts again, and not the trial, which the next
worker goes on with from its checkpoint.

What is wrong with a trial fails that trial. What is wrong with the machine, such as a full disk, would fail all of them
one after another: it ends the worker, which puts its trials back; and so does a metric that they do not have.
"""

import json
import math
import pathlib
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from absl import logging
from etils import epath

from lmjax.config_checks import Refused, TooLarge, UserError, nearest
from lmjax.records import read_lines
from lmjax.sweeps.board import Board, Claim
from lmjax.sweeps.rows import evaluated_name
from lmjax.sweeps.space import Settings

# Of a trial that is not run again.
_ENDED = ("finished", "pruned")

Report = Callable[[int, Mapping[str, float]], bool]
RunTrial = Callable[[Settings, pathlib.Path, Report], Mapping[str, Any]]


class _Lacking(UserError):
  """The trials have not the metric by which they are to be compared."""


class Together(NamedTuple):
  """How a worker trains several trials at once.

  Attributes:
    alike: settings -> what those have in common that can train together.
    most: how many at most.
    workers: between whom they are divided.
    run: several (settings, folder, report) -> for each what a RunTrial returns, or the error that has ended it alone.
  """
  alike: Callable[[Settings], str]
  most: int
  workers: int
  run: Callable[[Sequence[tuple[Settings, pathlib.Path, Report]]], list[Mapping[str, Any] | Exception]]


def work(board: Board, run_trial: RunTrial, pause: float = 1.0, together: Together | None = None) -> bool:
  """Runs trials until all have ended.

  Args:
    board: of the sweep.
    run_trial: (settings, folder, report) -> what result.json holds. It goes on with what the folder has, calls `report`
      with the evaluation's number, from 1 on, and its metrics after each one in the loop, and stops with the status
      "pruned" where that says so.
    pause: seconds between looks for a trial, while others run the last ones.
    together: how several are run at once; None runs one after another.

  Returns:
    False where a signal has stopped it before.

  Raises:
    Refused: where the machine stands in the way of a trial, which is put back.
    UserError: where trials have not the sweep's metric; they are put back, to be told with another one.
  """
  while True:
    claim = board.take()
    if claim is None:
      if board.is_over():
        return True
      time.sleep(pause)
    elif not _run(board, [claim, *_more(board, claim, together)], run_trial, together):
      return False


def metric_of(result: Mapping[str, Any], folder: pathlib.Path, metric: str) -> float | None:
  """Returns a metric of a run: of its result, else of its last evaluation that had it; None where there is none."""
  if metric in result:
    return result[metric]
  return next((record[metric] for record in reversed(_records(folder)) if metric in record), None)


def _more(board: Board, claim: Claim, together: Together | None) -> list[Claim]:
  return board.take_alike(claim, together.alike, together.most, together.workers) if together else []


def _run(board: Board, claims: Sequence[Claim], run_trial: RunTrial, together: Together | None) -> bool:
  """Runs trials and ends them, or leaves them to be run again; returns whether the worker goes on."""
  outcomes = _ended(claims)  # There are some where a worker has died just after the end.
  todo = [claim for claim in claims if claim.number not in outcomes]
  if len(todo) > 1:
    try:
      made = together.run([(claim.settings, claim.folder, _reporter(board, claim)) for claim in todo])
      outcomes |= {claim.number: outcome for claim, outcome in zip(todo, made)}
    except _Lacking as e:
      outcomes |= {claim.number: e for claim in todo}
    except Exception:  # Of one of them, or of all together: alone each shows its own.
      logging.exception("Trials %s cannot train together and are run one after another.",
                        ", ".join(str(claim.number) for claim in todo))
      outcomes |= _ended(todo)
  goes_on, fault = True, None
  for claim in claims:
    if goes_on and claim.number not in outcomes:
      try:
        outcomes[claim.number] = run_trial(claim.settings, claim.folder, _reporter(board, claim))
      except Exception as e:
        outcomes[claim.number] = e
    # An error is not kept: it holds the arrays of its run.
    outcome = outcomes.pop(claim.number, {"status": "interrupted"})
    if found := _fault(board, claim, outcome):
      fault, goes_on = found, False
      board.put_back(claim)
    else:
      goes_on = _end(board, claim, outcome) and goes_on
  if isinstance(fault, _Lacking):
    board.refuse(str(fault))
  if fault:
    raise fault
  return goes_on


def _fault(board: Board, claim: Claim, outcome: Mapping[str, Any] | Exception) -> Exception | None:
  """Returns what is wrong with the machine or the sweep, so that any other trial would come to the same here."""
  if isinstance(outcome, Exception):
    of_all = isinstance(outcome, (Refused, _Lacking)) and not isinstance(outcome, TooLarge)
    return outcome if of_all and not _has_stopped(claim) else None
  metric = board.sweep.metric
  if outcome["status"] != "finished" or metric_of(outcome, claim.folder, metric) is not None or board.has_values():
    return None
  numbers = {name for found in (outcome, *_records(claim.folder)) for name, value in found.items()
             if isinstance(value, (int, float))}
  return _Lacking(f"The sweep's metric is {metric}, of which trial {claim.number} has no number"
                  f"{nearest(metric, numbers)}")


def _ended(claims: Sequence[Claim]) -> dict[int, Mapping[str, Any]]:
  """Returns the results of those trials that are not run again, by number."""
  found = {claim.number: _result(claim.folder) for claim in claims}
  return {number: result for number, result in found.items() if result.get("status") in _ENDED}


def _reporter(board: Board, claim: Claim) -> Report:
  def report(count: int, values: Mapping[str, float]) -> bool:
    sweep, name = board.sweep, evaluated_name(values, board.sweep.metric)
    if name is None and (sweep.pruner != "none" or "/" in sweep.metric):  # No later evaluation will have it.
      raise _Lacking(f"The sweep's metric is {sweep.metric}, which evaluations in the loop have not"
                     f"{nearest(sweep.metric, values) if values else '; they have no set to evaluate.'}")
    return name is not None and board.report(claim, count, values[name])
  return report


def _end(board: Board, claim: Claim, outcome: Mapping[str, Any] | Exception) -> bool:
  """Ends a trial by what it has come to, or leaves it to be run again; returns whether the worker goes on."""
  if isinstance(outcome, Exception):
    mistake = isinstance(outcome, UserError)
    reason = _line(str(outcome) if mistake else f"{type(outcome).__name__}: {outcome}")
    if _has_stopped(claim):
      board.end(claim, "diverged", reason=reason)
    elif mistake or board.fails(claim) > board.sweep.retries:
      board.end(claim, "failed", reason=reason)
    else:
      logging.error("Trial %d failed and is run again.", claim.number, exc_info=outcome)
      board.leave(claim)
    return True
  if outcome["status"] == "interrupted":
    board.leave(claim)
    return False
  if outcome["status"] == "pruned":
    board.end(claim, "pruned")
    return True
  value = metric_of(outcome, claim.folder, board.sweep.metric)
  if isinstance(value, (int, float)) and math.isfinite(value):
    board.end(claim, "complete", float(value))
  else:
    board.end(claim, "failed", reason=f"its {board.sweep.metric} is {value}, which is not a finite number")
  return True


def _has_stopped(claim: Claim) -> bool:
  """Has a loss that is not finite, or a spike, ended the run?"""
  return _result(claim.folder).get("status") == "stopped"


def _result(folder: pathlib.Path) -> Mapping[str, Any]:
  path = folder / "result.json"
  return json.loads(path.read_text()) if path.exists() else {}


def _records(folder: pathlib.Path) -> list[Mapping[str, Any]]:
  path = epath.Path(folder) / "metrics.jsonl"
  return read_lines(path) if path.exists() else []


def _line(text: str) -> str:
  return " ".join(text.split())
