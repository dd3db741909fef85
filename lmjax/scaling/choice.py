"""Choosing among forms by how well they foretell runs that they have not seen."""

import dataclasses

import numpy as np

from lmjax.scaling.fit import fit_law, solve
from lmjax.scaling.laws import LAWS, Law, Points

_NUM_FOLDS = 10
_FIRST_PARTS = (0.5, 0.65, 0.8)  # Of the runs in the order of compute: fitted, to foretell the rest.


@dataclasses.dataclass(frozen=True)
class Score:
  """How far a form is off, as mean absolute errors of log loss; None where there are too few runs to tell.

  Attributes:
    form: its name.
    num_params: that it has.
    fold_error: of runs held out ten at a time, or each alone where there are fewer.
    extrapolation_error: of the largest runs, foretold from the smaller ones.
  """
  form: str
  num_params: int
  fold_error: float | None
  extrapolation_error: float | None

  @property
  def error(self) -> float:
    """The geometric mean of both errors, by which forms are chosen."""
    known = [error for error in (self.fold_error, self.extrapolation_error) if error is not None]
    return float(np.exp(np.mean(np.log(np.maximum(known, 1e-12))))) if known else np.inf


def compare(points: Points, loss: np.ndarray, runs: np.ndarray, huber_delta: float | None, seed: int) -> list[Score]:
  """Scores every form, the best first.

  Args:
    points: of the rows.
    loss: of the rows.
    runs: which run each row belongs to; the rows of a run are held out together.
    huber_delta: as in `fit_law`.
    seed: of the folds.

  Returns:
    The scores; forms with as many parameters as runs or more are left out.
  """
  num_runs = runs.max() + 1
  order = np.random.default_rng(seed).permutation(num_runs)
  fold_of = np.empty(num_runs, int)
  fold_of[order] = np.arange(num_runs) % min(_NUM_FOLDS, num_runs)
  scores = []
  for law in LAWS.values():
    if num_runs > law.num_params():
      scores.append(Score(law.name, law.num_params(), _fold_error(law, points, loss, fold_of[runs], huber_delta),
                          _extrapolation_error(law, points, loss, runs, huber_delta)))
  return sorted(scores, key=lambda score: score.error)


def _fold_error(law: Law, points: Points, loss: np.ndarray, fold: np.ndarray, huber_delta: float | None
                ) -> float | None:
  weights = (fold != np.arange(fold.max() + 1)[:, None]).astype(float)
  if weights.sum(axis=1).min() <= law.num_params():
    return None
  fit = fit_law(law, points, loss, huber_delta=huber_delta)
  logs, target = fit.center.relative(points), np.log(loss)
  thetas, _ = solve(law, logs, target, np.repeat(fit.theta[None], len(weights), 0), fit.delta, law.bounds(loss),
                    weights=weights)
  errors = np.abs(target - law.log_loss(thetas, logs)[0])
  return float(errors[weights == 0].mean())


def _extrapolation_error(law: Law, points: Points, loss: np.ndarray, runs: np.ndarray, huber_delta: float | None
                         ) -> float | None:
  compute = np.zeros(runs.max() + 1)
  np.maximum.at(compute, runs, points.flops)
  rank = np.argsort(np.argsort(compute, kind="stable"), kind="stable")[runs]
  errors = []
  for part in _FIRST_PARTS:
    seen = rank < int(part * len(compute))
    if len(np.unique(runs[seen])) > law.num_params():
      fit = fit_law(law, points[seen], loss[seen], huber_delta=huber_delta)
      errors.append(np.abs(np.log(loss[~seen]) - fit.log_loss(points[~seen])).mean())
  return float(np.mean(errors)) if errors else None
