"""The trials of a sweep: kept in Optuna's storage, where any number of workers find the next one to run.

A worker takes a trial by a lock on a file, which the system frees when the worker ends, however it ends. A trial that
is under way and whose lock is free is one whose worker has died: the next worker goes on with it. Asking for a trial
and ending one are turns, one worker's at a time, so that what is kept is never seen half done.

Files, in the sweep's folder:
  sweep.json        what the sweep is, and at its end its trials, best first.
  optuna.journal    the study, unless it is in a database.
  trials/NNN        the run of trial NNN.
  claims/           the locks.
"""

import contextlib
import json
import math
import os
import pathlib
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence
import warnings

import optuna
from optuna.trial import FrozenTrial, TrialState

from lmjax.config_checks import Refused, UserError
from lmjax.sweeps.choices import Asking, Noting
from lmjax.sweeps.rows import RECORD, Row, best_first, rows_of, settings_of
from lmjax.sweeps.space import Settings, draw
from lmjax.sweeps.storage import check_locks, joined, locked
from lmjax.sweeps.study import first_trials, open_study, waiting
from lmjax.sweeps.sweep import PLANNED, Sweep, cubes
from lmjax.workdir import is_local, write_whole

# A trial whose workers die so often before it has a further checkpoint is given up: it is what kills them.
_MOST_STARTS = 20
# From so many on it is run alone, so that it takes no others with it.
_MOST_STARTS_TOGETHER = 3
_TRIES_FOR_UNSEEN = 100


class Claim(NamedTuple):
  """A trial that this worker runs.

  Attributes:
    number: of the trial.
    settings: that its run has.
    folder: of its run.
    lock: the open file that keeps others from it.
    starts: how often it has been started from where it stands.
  """
  number: int
  settings: Settings
  folder: pathlib.Path
  lock: int
  starts: int = 1


class Board:
  """The trials of a sweep."""

  def __init__(self, sweep: Sweep, workdir: str | os.PathLike, storage: str | None = None,
               config: Mapping[str, Any] | None = None, train: Sequence[str] = ()):
    """Opens a sweep, or begins one; where no other board of it is open, failed trials that may be run again will be.

    Args:
      sweep: resolved.
      workdir: of the sweep; where several machines share it, a folder of a file system that they share.
      storage: URL of a database, such as sqlite:///FILE or postgresql://...; None keeps a journal in the workdir.
      config: the experiment that the trials vary, as what JSON holds.
      train: command of a run of it, without a trial's settings and folder, for those who are shown the trials.

    Raises:
      UserError: where the workdir holds another sweep; see `study.open_study`.
      Refused: where it cannot be written, or its file system has no locks.
    """
    if not is_local(workdir):
      raise UserError(f"The workdir {workdir} is in an object store, where workers cannot lock their trials; give a "
                      "folder of a file system, shared where several machines work on the sweep.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", ".*`gamma` has been deprecated", FutureWarning)  # There until Optuna 6.
    if sweep.driver == "gp":
      _check_torch()
    first = first_trials(sweep)  # A space that cannot be noted leaves nothing behind.
    self.sweep, self.workdir = sweep, pathlib.Path(workdir).absolute()
    try:
      (self.workdir / "claims").mkdir(parents=True, exist_ok=True)
      check_locks(self.workdir / "claims" / "try")
    except OSError as e:
      raise Refused(f"The workdir {workdir} cannot be written ({e.strerror}); give a --workdir that can.") from e
    with self._turn():
      self._open, alone = joined(self.workdir / "claims" / "open")
      try:
        self._study = open_study(sweep, self.workdir, storage, first, alone, config or {}, train)
      except BaseException:
        self.close()
        raise
    self._storage, self._id = self._study._storage, self._study._study_id

  def close(self) -> None:
    """Says that this board is no longer used; where no other is open, the next one may begin the study anew."""
    os.close(self._open)

  def take(self) -> Claim | None:
    """Returns the next trial for this worker: one whose worker has died, else a new one; None where there is none."""
    with self._turn():
      for claim in self._claims():
        if (twin := self._twin(claim)) is None:
          return claim
        self._repeat(claim, twin)
    return None

  def take_alike(self, first: Claim, alike: Callable[[Settings], str], most: int, workers: int) -> list[Claim]:
    """Returns more trials for a worker that has one, to be trained with it.

    Args:
      first: the one it has.
      alike: settings -> what those have in common that train together.
      most: how many at most, with the first.
      workers: between whom those that are alike are divided.
    """
    if first.starts > _MOST_STARTS_TOGETHER:  # It may be what kills the workers.
      return []
    with self._turn():
      known = [trial for trial in self._trials() if "settings" in trial.user_attrs and trial.number != first.number
               and not trial.state.is_finished()]
      kind = alike(first.settings)
      others = [trial for trial in known if alike(settings_of(trial.user_attrs["settings"])) == kind]
      most, claims = min(most, -(-(len(others) + 1) // workers)), []
      for trial in others:
        if len(claims) + 1 >= most:
          break
        if trial.user_attrs.get("starts_from", (-1, 0))[1] >= _MOST_STARTS_TOGETHER:
          continue
        if trial.state == TrialState.WAITING:
          self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        if claim := self._claim(trial.number):
          if (twin := self._twin(claim)) is not None:
            self._repeat(claim, twin)
          else:
            claims.append(claim)
    return claims

  def report(self, claim: Claim, count: int, value: float) -> bool:
    """Records the metric of an evaluation in the loop, the count-th; returns whether the trial is to stop."""
    if not math.isfinite(value):
      return False
    if count not in self._trial(claim.number).intermediate_values:
      self._storage.set_trial_intermediate_value(self._trial_id(claim.number), count, value)
    return self._study.pruner.prune(self._study, self._trial(claim.number))

  def end(self, claim: Claim, state: str, value: float | None = None, reason: str = "") -> None:
    """Ends a trial, once.

    Args:
      claim: of this worker, which is given back.
      state: complete, pruned, diverged or failed. Samplers learn that where a trial diverged is a bad place, and
        nothing from one that failed. gp, which learns from complete ones only, is told the worst value of any.
      value: of the metric, of a complete one.
      reason: in one line, of one that failed or diverged.
    """
    with self._turn():
      if not self._trial(claim.number).state.is_finished():
        if reason:
          self._note(claim.number, "reason", reason)
        if state == "diverged" and self.sweep.driver == "gp" and self.has_values():
          worst = max if self.sweep.mode == "min" else min
          state, value = "complete", worst(row.value for row in self.rows() if row.value is not None)
        self._study.tell(claim.number, value if state == "complete" else None, {
            "complete": TrialState.COMPLETE, "failed": TrialState.FAIL}.get(state, TrialState.PRUNED))
      self.leave(claim)

  def fails(self, claim: Claim) -> int:
    """Counts an error of a trial; returns how many there have been."""
    count = self._trial(claim.number).user_attrs.get("errors", 0) + 1
    self._note(claim.number, "errors", count)
    return count

  def leave(self, claim: Claim) -> None:
    """Gives a trial back, to be gone on with unless it has ended."""
    os.close(claim.lock)

  def put_back(self, claim: Claim) -> None:
    """Gives a trial back as if nobody had started it."""
    about = self._trial(claim.number).user_attrs
    self._note(claim.number, "starts", about["starts"] - 1)
    self._note(claim.number, "starts_from", [about["starts_from"][0], claim.starts - 1])
    self.leave(claim)

  def has_values(self) -> bool:
    """Returns whether any trial has been told with a value of the metric."""
    return any(row.value is not None for row in self.rows())

  def refuse(self, reason: str) -> None:
    """Has all who work on the sweep hear that it cannot be as it was asked for."""
    self._study.set_user_attr("refused", reason)

  def is_over(self) -> bool:
    """Returns whether every trial has ended and there will be no more; raises a UserError where it was refused."""
    with self._turn():
      if reason := self._study.user_attrs.get("refused"):
        raise UserError(reason)
      trials = self._trials()
      return all(trial.state.is_finished() for trial in trials) and not self._wants_more(trials)

  def starts(self) -> int:
    """Returns how often a trial has been started or gone on with."""
    return sum(trial.user_attrs.get("starts", 0) for trial in self._trials())

  def rows(self) -> list[Row]:
    """Returns the trials in the order of their numbers."""
    return rows_of(self._trials())

  def best_first(self) -> list[Row]:
    """Returns the trials, those that are complete first and the best of them at the top."""
    return best_first(self.rows(), self.sweep.mode)

  def write_record(self, trials: list[Mapping[str, Any]]) -> None:
    """Writes the trials into sweep.json."""
    with self._turn():
      record = json.loads((self.workdir / RECORD).read_text())
      write_whole(self.workdir / RECORD, json.dumps({**record, "trials": trials}, indent=2) + "\n")

  def folder(self, number: int) -> pathlib.Path:
    """Returns the folder of a trial's run."""
    return self.workdir / "trials" / f"{number:03}"

  def _claims(self) -> Iterator[Claim]:
    """Yields trials, locked: those whose workers have died, then new ones."""
    running = [trial.number for trial in self._trials() if trial.state == TrialState.RUNNING]
    yield from filter(None, map(self._claim, running))
    while any(trial.state == TrialState.WAITING for trial in self._trials()) or self._wants_more(self._trials()):
      self._study.sampler = self._sampler(len(self._trials()))
      if claim := self._claim(self._study.ask().number):
        yield claim

  def _wants_more(self, trials: list[FrozenTrial]) -> bool:
    own = [trial for trial in trials if "duplicate_of" not in trial.user_attrs]
    return self.sweep.driver not in PLANNED and len(own) < self.sweep.num_trials and not (
        self._study.user_attrs.get("exhausted"))

  def _sampler(self, count: int) -> optuna.samplers.BaseSampler:
    """Returns what chooses the next trial; with this seed it is a function of the trials before it."""
    import numpy as np
    seed = int(np.random.SeedSequence([self.sweep.seed, count]).generate_state(1)[0])
    if self.sweep.driver == "tpe":
      return optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True, gamma=_num_good)
    if self.sweep.driver == "gp":
      return optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
    return optuna.samplers.RandomSampler(seed=seed)

  def _claim(self, number: int) -> Claim | None:
    """Locks a trial that is under way and makes sure that its settings are known; None where it is not to be run."""
    lock = locked(self.workdir / "claims" / f"{number:03}")
    if lock is None:
      return None
    trial, folder = self._trial(number), self.folder(number)
    if "settings" not in trial.user_attrs:
      asked = optuna.Trial(self._study, self._trial_id(number))
      self._note(number, "settings", draw(self.sweep.space, Asking(self.sweep.space, asked)))
    step, before = _last_checkpoint(folder), trial.user_attrs.get("starts_from", [-1, 0])
    count = before[1] + 1 if step == before[0] else 1
    claim = Claim(number, settings_of(self._trial(number).user_attrs["settings"]), folder, lock, count)
    self._note(number, "starts", trial.user_attrs.get("starts", 0) + 1)
    self._note(number, "starts_from", [step, count])
    if count <= _MOST_STARTS:
      return claim
    self._note(number, "reason", f"its worker ended {_MOST_STARTS} times without a word or a new checkpoint")
    self._note(number, "errors", _MOST_STARTS)
    self._study.tell(number, state=TrialState.FAIL)
    os.close(lock)
    return None

  def _twin(self, claim: Claim) -> FrozenTrial | None:
    """Returns an earlier trial with the same settings."""
    same = lambda trial: settings_of(trial.user_attrs.get("settings")) == claim.settings
    return next((trial for trial in self._trials()[:claim.number] if same(trial)), None)

  def _repeat(self, claim: Claim, twin: FrozenTrial) -> None:
    """Ends a trial as its twin has ended, and has settings tried in its place that no trial has had."""
    self._note(claim.number, "duplicate_of", twin.number)
    if twin.state == TrialState.COMPLETE:
      self._study.tell(claim.number, twin.value)
    else:
      self._study.tell(claim.number, state=TrialState.FAIL)
    os.close(claim.lock)
    space, seen = self.sweep.space, [settings_of(trial.user_attrs.get("settings")) for trial in self._trials()]
    for point in cubes(space, "random", _TRIES_FOR_UNSEEN, self.sweep.seed + claim.number):
      noting = Noting(space, point)
      settings = draw(space, noting)
      if settings not in seen:
        self._study.add_trial(waiting(noting.params, noting.distributions, settings, {}))
        return
    self._study.set_user_attr("exhausted", True)

  def _trials(self) -> list[FrozenTrial]:
    return self._storage.get_all_trials(self._id, deepcopy=False)

  def _trial(self, number: int) -> FrozenTrial:
    return self._trials()[number]

  def _trial_id(self, number: int) -> int:
    return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

  def _note(self, number: int, name: str, value: Any) -> None:
    self._storage.set_trial_user_attr(self._trial_id(number), name, value)

  @contextlib.contextmanager
  def _turn(self) -> Iterator[None]:
    lock = locked(self.workdir / "claims" / "turn", wait=True)
    try:
      yield
    finally:
      os.close(lock)


def _check_torch() -> None:
  try:
    import torch  # noqa: F401
  except ImportError as e:
    raise Refused("The sweep's driver is gp, whose Gaussian process needs torch, which is not installed; pip install "
                  "'lmjax[sweeps]', or take --driver=tpe.") from e


def _num_good(count: int) -> int:
  """Returns how many of some trials TPE counts as good, a quarter (Bergstra et al. 2013, hyperopt), 25 at most.

  Optuna's tenth is one or two trials of the first twenty, which say little of how the good place is shaped.
  """
  return min(math.ceil(0.25 * count), 25)


def _last_checkpoint(folder: pathlib.Path) -> int:
  # Not by lmjax.checkpoint: the driver does without JAX.
  found = folder / "checkpoints"
  return max((int(path.name) for path in found.iterdir() if path.name.isdigit()), default=-1) if found.is_dir() else -1
