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
import secrets
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence
import warnings

import optuna
from optuna.trial import FrozenTrial, TrialState

from lmjax.config_checks import Refused, UserError, by_full_name
from lmjax.sweeps.choices import Asking, Noting, by_field
from lmjax.sweeps.rows import JOURNAL, RECORD, Row, best_first, rows_of, settings_of
from lmjax.sweeps.space import Cube, Settings, draw
from lmjax.sweeps.storage import check_locks, locked, open_storage
from lmjax.sweeps.sweep import PLANNED, Sweep, cubes, definition, planned
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
    """Opens a sweep, or begins one.

    Args:
      sweep: resolved.
      workdir: of the sweep; where several machines share it, a folder of a file system that they share.
      storage: URL of a database, such as sqlite:///FILE or postgresql://...; None keeps a journal in the workdir.
      config: the experiment that the trials vary, as what JSON holds.
      train: command of a run of it, without a trial's settings and folder, for those who are shown the trials.

    Raises:
      UserError: where the workdir holds another sweep.
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
    self.sweep, self.workdir = sweep, pathlib.Path(workdir).absolute()
    try:
      (self.workdir / "claims").mkdir(parents=True, exist_ok=True)
      check_locks(self.workdir / "claims" / "try")
    except OSError as e:
      raise Refused(f"The workdir {workdir} cannot be written ({e.strerror}); give a --workdir that can.") from e
    with self._turn():
      about = json.loads(json.dumps({**definition(sweep), "config": config or {}}))
      name = self._identify(storage, about, train)
      self._storage = open_storage(storage, self.workdir / JOURNAL)
      self._study = optuna.create_study(
          storage=self._storage, study_name=name, load_if_exists=True, pruner=_pruner(sweep),
          direction="minimize" if sweep.mode == "min" else "maximize")
      if self._study.metric_names is None:
        self._study.set_metric_names([sweep.metric])
      self._id = self._storage.get_study_id_from_name(name)
      self._plan()

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
        nothing from one that failed.
      value: of the metric, of a complete one.
      reason: in one line, of one that failed or diverged.
    """
    with self._turn():
      if not self._trial(claim.number).state.is_finished():
        if reason:
          self._note(claim.number, "reason", reason)
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

  def is_over(self) -> bool:
    """Returns whether every trial has ended and there will be no more."""
    with self._turn():
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

  def _identify(self, storage: str | None, about: dict[str, Any], train: Sequence[str]) -> str:
    """Returns the study's name, which the first one to come writes down with what the sweep is."""
    path, kind = self.workdir / RECORD, "a database" if storage else JOURNAL
    if not path.exists():
      name = f"{self.workdir.name}-{secrets.token_hex(4)}"
      record = {"study": name, "storage": kind, "train": list(train), "sweep": about}
      write_whole(path, json.dumps(record, indent=2) + "\n")
      return name
    try:
      record = json.loads(path.read_text())
      was, before = record["storage"], record["sweep"]
    except (ValueError, KeyError) as e:
      raise UserError(f"{path} is not as a sweep writes it ({e}); put it back, or give another --workdir.") from e
    if was != kind:
      raise UserError(f"The sweep in {self.workdir} keeps its trials in {was}, but --storage "
                      f"{'names a database' if storage else 'is not given'}; give what it was begun with.")
    old, new = by_full_name(before), by_full_name(about)
    # What only one of them has is a setting that another version of lmjax has, or has not.
    changed = next((field for field in old if field in new and old[field] != new[field]), None)
    if changed is not None:
      raise UserError(f"The sweep in {self.workdir} has {changed} = {old[changed]!r}, but now it is "
                      f"{new[changed]!r}; to go on keep what it was, for another sweep give another --workdir.")
    return record["study"]

  def _plan(self) -> None:
    """Adds the trials that are known before any is run, unless they are there."""
    there = {trial.user_attrs.get("planned") for trial in self._trials()}
    for i, point in enumerate(planned(self.sweep)):
      if i in there:
        continue
      if isinstance(point, Cube):
        noting = Noting(self.sweep.space, point)
        settings, params, distributions = draw(self.sweep.space, noting), noting.params, noting.distributions
      else:
        settings, (params, distributions) = point, by_field(self.sweep.space, point)
      self._add(params, distributions, settings, {"planned": i})

  def _add(self, params: dict, distributions: dict, settings: Settings, about: Mapping[str, Any]) -> None:
    self._study.add_trial(optuna.trial.create_trial(
        state=TrialState.WAITING, params=params, distributions=distributions,
        user_attrs={"settings": settings, **about}))

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
        self._add(noting.params, noting.distributions, settings, {})
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


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
  """Returns what stops trials, which counts in evaluations."""
  return {
      "none": optuna.pruners.NopPruner,
      "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
      "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
      "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, reduction_factor=3),
  }[sweep.pruner]()


def _last_checkpoint(folder: pathlib.Path) -> int:
  # Not by lmjax.checkpoint: the driver does without JAX.
  found = folder / "checkpoints"
  return max((int(path.name) for path in found.iterdir() if path.name.isdigit()), default=-1) if found.is_dir() else -1
