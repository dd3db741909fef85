"""The trials of a sweep, to be shown: also to one who takes no part in it, while it goes on or after it was killed."""

import dataclasses
import json
import math
import os
import pathlib
import shlex
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lmjax.config_checks import UserError
from lmjax.sweeps.space import Settings, as_flags
from lmjax.sweeps.storage import open_storage

JOURNAL = "optuna.journal"
RECORD = "sweep.json"

# What result.json calls what an evaluation calls SET/NAME, of the first set.
_OF_RESULT = {"eval_loss": "loss", "bits_per_byte": "bits_per_byte"}
_NAMES = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "complete",
          TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_ORDER = ("complete", "pruned", "running", "waiting", "diverged", "failed", "duplicate")


@dataclasses.dataclass(frozen=True)
class Row:
  """A trial, to be shown.

  Attributes:
    number: of the trial.
    state: waiting, running, complete, pruned, diverged, failed or duplicate.
    value: of the metric; None where there is none.
    settings: of its run; {} where they are not chosen yet.
    reason: why it failed, diverged or was stopped, or which trial it repeats.
  """
  number: int
  state: str
  value: float | None
  settings: Settings
  reason: str

  @property
  def ended(self) -> bool:
    return self.state not in ("waiting", "running")


class Found(NamedTuple):
  """What a sweep has come to.

  Attributes:
    sweep: what it is: driver, metric, mode, pruner, seed, space, and the experiment's config.
    train: command of a run of the experiment, without a trial's settings and folder; [] where it is not known.
    rows: the trials, best first.
  """
  sweep: Mapping[str, Any]
  train: Sequence[str]
  rows: Sequence[Row]


def rows_of(trials: Iterable[FrozenTrial]) -> list[Row]:
  """Returns Optuna's trials as they are shown."""
  rows = []
  for trial in trials:
    about = trial.user_attrs
    twin, state, reason = about.get("duplicate_of"), _NAMES[trial.state], about.get("reason", "")
    if twin is not None:
      state, reason = "duplicate", reason or f"the same settings as trial {twin}"
    elif state in ("pruned", "complete") and reason:
      state = "diverged"
    elif state == "pruned" and trial.last_step is not None:
      reason = f"behind others at evaluation {trial.last_step}"
    rows.append(Row(trial.number, state, trial.value if state != "diverged" else None,
                    settings_of(about.get("settings", {})), reason))
  return rows


def best_first(rows: Sequence[Row], mode: str) -> list[Row]:
  """Returns the trials, those that are complete first and the best of them at the top.

  Args:
    rows: of the trials.
    mode: whether the best is the smallest (min) or the largest (max).
  """
  sign = 1 if mode == "min" else -1
  return sorted(rows, key=lambda row: (
      _ORDER.index(row.state), math.inf if row.value is None else sign * row.value, row.number))


def evaluated_name(names: Iterable[str], metric: str) -> str | None:
  """Returns what evaluations call a metric, which may have its name in result.json; None where they have none.

  Args:
    names: of what was evaluated, in order.
    metric: by which trials are compared.
  """
  names = list(names)
  if metric in names:
    return metric
  short = _OF_RESULT.get(metric)
  return next((name for name in names if short and "/" in name and name.rpartition("/")[2] == short), None)


def may_be_evaluated(metric: str) -> bool:
  """Returns whether evaluations in the loop may have a metric; a run may have others at its end, or in its steps."""
  return "/" in metric or metric in _OF_RESULT


def settings_of(kept: Any) -> Any:
  """Returns settings as they were before JSON made lists of their tuples."""
  if isinstance(kept, Mapping):
    return {name: settings_of(value) for name, value in kept.items()}
  return tuple(map(settings_of, kept)) if isinstance(kept, (list, tuple)) else kept


def command(train: Sequence[str], settings: Settings, folder: str | os.PathLike) -> str:
  """Returns the command that makes one trial's run on its own; see `Found.train`."""
  return shlex.join([*train, *as_flags(settings), f"--workdir={folder}"])


def read(workdir: str | os.PathLike, storage: str | None = None) -> Found:
  """Reads a sweep, and changes nothing.

  Args:
    workdir: of the sweep.
    storage: URL of the database that keeps its trials; where it is None, those that a sweep at its end has written
      down will do.

  Raises:
    UserError: where the folder holds no sweep, or its trials are elsewhere.
  """
  folder = pathlib.Path(workdir)
  try:
    record = json.loads((folder / RECORD).read_text())
    sweep, kept, study = record["sweep"], record["storage"], record["study"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f"{folder / RECORD} is not as a sweep writes it ({e}); give the --workdir of a sweep.") from e
  if storage or kept == JOURNAL:
    opened, number = find_study(folder, storage, study)
    rows = rows_of(opened.get_all_trials(number))
  elif "trials" in record:
    rows = [Row(**{field.name: settings_of(trial[field.name]) for field in dataclasses.fields(Row)})
            for trial in record["trials"]]
  else:
    raise UserError(f"The sweep in {folder} keeps its trials in a database; give its URL by --storage.")
  return Found(sweep, record.get("train", []), best_first(rows, sweep["mode"]))


def find_study(folder: pathlib.Path, storage: str | None, study: str) -> tuple[BaseStorage, int]:
  """Returns where a begun sweep keeps its trials, and its study's number there; nothing is made.

  Args:
    folder: of the sweep.
    storage: URL of the database; None is the journal in the folder.
    study: its name.

  Raises:
    UserError: where there is no such study.
  """
  if storage is None and not (folder / JOURNAL).exists():
    raise UserError(f"{folder} has no {JOURNAL}, where its sweep keeps its trials; put it back, or give another "
                    "--workdir.")
  opened = open_storage(storage, folder / JOURNAL)
  try:
    return opened, opened.get_study_id_from_name(study)
  except KeyError as e:
    raise UserError(f"{'The database of --storage' if storage else folder / JOURNAL} holds no study {study}, which "
                    f"{folder / RECORD} names; give the one that the sweep was begun with, or another --workdir."
                    ) from e
