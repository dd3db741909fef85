"""A sweep's study in Optuna's storage: begun once, found again, and begun anew where trials are to be told again.

What Optuna has been told of a trial stays. So a study takes the place of the one before, with the same trials under
the same numbers, where failed trials are to be run again, or the values of another metric are to be read.
"""

import json
import os
import pathlib
import secrets
from typing import Any, Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lmjax.config_checks import Refused, UserError, by_full_name
from lmjax.sweeps.choices import Noting, by_field
from lmjax.sweeps.rows import JOURNAL, RECORD, find_study
from lmjax.sweeps.space import Cube, Settings, draw
from lmjax.sweeps.storage import open_storage
from lmjax.sweeps.sweep import Sweep, definition, planned
from lmjax.workdir import write_whole

# What a begun sweep may be given anew.
_MAY_CHANGE = ("metric", "mode")
_SHOWN = 50  # Letters of a setting on either side of where it has changed.


def waiting(params: dict, distributions: dict, settings: Settings, about: Mapping[str, Any]) -> FrozenTrial:
  """Returns a trial that is to be run, with what is noted about it."""
  return optuna.trial.create_trial(state=TrialState.WAITING, params=params, distributions=distributions,
                                   user_attrs={"settings": settings, **about})


def first_trials(sweep: Sweep) -> list[FrozenTrial]:
  """Returns the trials that are known before any is run."""
  trials = []
  for i, point in enumerate(planned(sweep)):
    if isinstance(point, Cube):
      noting = Noting(sweep.space, point)
      settings, params, distributions = draw(sweep.space, noting), noting.params, noting.distributions
    else:
      settings, (params, distributions) = point, by_field(sweep.space, point)
    trials.append(waiting(params, distributions, settings, {"planned": i}))
  return trials


def open_study(sweep: Sweep, workdir: pathlib.Path, url: str | None, first: Sequence[FrozenTrial], alone: bool,
               config: Mapping[str, Any], train: Sequence[str]) -> optuna.Study:
  """Finds the study of a sweep, or begins one; sweep.json, which names it, is written when all of it is there.

  Args:
    sweep: resolved.
    workdir: of the sweep; nobody else may be in this function with it.
    url: of the database; None is the journal in the workdir.
    first: trials that it has in any case.
    alone: whether nobody else works on the sweep.
    config: the experiment that the trials vary.
    train: command of a run of it.

  Raises:
    UserError: where the workdir holds another sweep, or trials of no known one, or the study is not in its storage.
    Refused: where the metric is another one while others work on the sweep.
  """
  kind, about = "a database" if url else JOURNAL, json.loads(json.dumps({**definition(sweep), "config": config}))
  record, new = _read(workdir, kind), {"storage": kind, "train": list(train), "sweep": about}
  if record is None:
    return _begin(sweep, workdir, open_storage(url, workdir / JOURNAL), new, first)
  _check_same(workdir, record["sweep"], about)
  storage, _ = find_study(workdir, url, record["study"])
  old = optuna.load_study(study_name=record["study"], storage=storage, pruner=_pruner(sweep))
  changed = [name for name in _MAY_CHANGE if record["sweep"][name] != about[name]]
  if changed and not alone:
    raise Refused(f"The sweep in {workdir} is being worked on with {changed[0]} = {record['sweep'][changed[0]]!r}, but "
                  f"now it is {about[changed[0]]!r}; wait for that or stop it, and the same command goes on.")
  trials = old.get_trials(deepcopy=False)
  if not changed and not (alone and any(_is_to_be_retried(trial, sweep.retries) for trial in trials)):
    _add_missing(old, first)
    return old
  study = _begin(sweep, workdir, storage, new, first, [_anew(trial, bool(changed), sweep.retries) for trial in trials])
  if "exhausted" in old.user_attrs:
    study.set_user_attr("exhausted", True)
  optuna.delete_study(study_name=old.study_name, storage=storage)
  return study


def _begin(sweep: Sweep, workdir: pathlib.Path, storage: optuna.storages.BaseStorage, record: Mapping[str, Any],
           first: Sequence[FrozenTrial], before: Sequence[FrozenTrial] = ()) -> optuna.Study:
  """Makes a study with the trials of one before it, and then those that it has in any case, and writes it down."""
  name = f"{workdir.name}-{secrets.token_hex(4)}"
  study = optuna.create_study(storage=storage, study_name=name, pruner=_pruner(sweep),
                              direction="minimize" if sweep.mode == "min" else "maximize")
  study.set_metric_names([sweep.metric])
  for trial in before:
    study.add_trial(trial)
  _add_missing(study, first)
  write_whole(workdir / RECORD, json.dumps({"study": name, **record}, indent=2) + "\n")
  return study


def _read(workdir: pathlib.Path, kind: str) -> Mapping[str, Any] | None:
  """Returns what sweep.json says; None where no sweep has been begun."""
  path, trials = workdir / RECORD, workdir / "trials"
  if not path.exists():
    if trials.is_dir() and any(trials.iterdir()):
      raise UserError(f"{trials} has trials, but there is no {path}, which says of what sweep they are; put it back, "
                      "or give another --workdir.")
    return None
  try:
    record = json.loads(path.read_text())
    was, _, _ = record["storage"], record["study"], [record["sweep"][name] for name in _MAY_CHANGE]
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{path} is not as a sweep writes it ({e}); put it back, or give another --workdir.") from e
  if was != kind:
    raise UserError(f"The sweep in {workdir} keeps its trials in {was}, but --storage "
                    f"{'is not given' if kind == JOURNAL else 'names a database'}; give what it was begun with.")
  return record


def _check_same(workdir: pathlib.Path, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
  old, new = by_full_name(before), by_full_name(about)
  # What only one of them has is a setting that another version of lmjax has, or has not.
  changed = next((field for field in old if field in new and field not in _MAY_CHANGE and old[field] != new[field]),
                 None)
  if changed is not None:
    was, now = _where_they_part(repr(old[changed]), repr(new[changed]))
    raise UserError(f"The sweep in {workdir} has {changed} = {was}, but now it is {now}; to go on keep what it was, "
                    "for another sweep give another --workdir.")


def _where_they_part(*texts: str) -> list[str]:
  """Returns what two long texts have where they begin to differ; short ones as they are."""
  first = len(os.path.commonprefix(texts))
  low, high = max(0, first - _SHOWN), first + _SHOWN
  return [text if len(text) <= 2 * _SHOWN else f"{'... ' * bool(low)}{text[low:high]}{' ...' * (high < len(text))}"
          for text in texts]


def _add_missing(study: optuna.Study, first: Sequence[FrozenTrial]) -> None:
  there = {trial.user_attrs.get("planned") for trial in study.get_trials(deepcopy=False)}
  for trial in first:
    if trial.user_attrs["planned"] not in there:
      study.add_trial(trial)


def _is_to_be_retried(trial: FrozenTrial, retries: int) -> bool:
  about = trial.user_attrs
  return trial.state == TrialState.FAIL and "duplicate_of" not in about and about.get("errors", 0) <= retries


def _anew(trial: FrozenTrial, retold: bool, retries: int) -> FrozenTrial:
  """Returns a trial for the study that takes the place of its own.

  Args:
    trial: that nobody runs now.
    retold: whether values of another metric are wanted, which whoever takes the trial finds in its folder.
    retries: see `Sweep`.
  """
  about, state = trial.user_attrs, trial.state
  ended = state.is_finished() and not _is_to_be_retried(trial, retries)
  if ended and not retold:
    return trial
  if ended and "duplicate_of" in about:
    state = TrialState.FAIL
  elif ended and "reason" in about:
    state = TrialState.FAIL if state == TrialState.FAIL else TrialState.PRUNED
  else:
    state = TrialState.WAITING
  forgotten = ("reason", "starts_from") if state == TrialState.WAITING else ()
  return optuna.trial.create_trial(
      state=state, params=trial.params, distributions=trial.distributions,
      user_attrs={name: value for name, value in about.items() if name not in forgotten},
      intermediate_values={} if retold else trial.intermediate_values)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
  """Returns what stops trials, which counts in evaluations."""
  return {
      "none": optuna.pruners.NopPruner,
      "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
      "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
      "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, reduction_factor=3),
  }[sweep.pruner]()
