"""Intervals by resampling whole runs, and what a new run will show.

Runs are drawn with replacement, and all rows of a run go together: points of one curve share their run's noise, and to
draw them one by one makes every interval too short. Percentiles of the refitted parameters are too narrow by the usual
small-sample factor, so they are taken further out, where Student's t has the wanted tails (the expanded percentile
interval of Hesterberg 2015, arXiv 1411.5279, section 3.3).
"""

import numpy as np

from lmjax.scaling.fit import Fit, solve
from lmjax.scaling.laws import Points

LEVEL = 0.95
_CHUNK = 500


def resample(fit: Fit, points: Points, loss: np.ndarray, runs: np.ndarray, num_resamples: int, seed: int
             ) -> np.ndarray:
  """Refits a law to resampled runs, each time from the law's own parameters.

  Args:
    fit: the law, fitted to these runs.
    points: of the rows.
    loss: of the rows.
    runs: which run each row belongs to, [rows] of 0, 1, ...
    num_resamples: B.
    seed: of the draws.

  Returns:
    Inner parameters, [B, P].
  """
  rng = np.random.default_rng(seed)
  num_runs, least = runs.max() + 1, min(len(fit.theta), runs.max() + 1)
  draws = rng.integers(0, num_runs, (num_resamples, num_runs))
  while len(poor := np.flatnonzero([len(np.unique(draw)) < least for draw in draws])):
    draws[poor] = rng.integers(0, num_runs, (len(poor), num_runs))  # Fewer runs than parameters tell nothing.
  counts = np.stack([np.bincount(draw, minlength=num_runs) for draw in draws])[:, runs].astype(float)
  logs, target, bounds = fit.center.relative(points), np.log(loss), fit.law.bounds(loss)
  return np.concatenate([
      solve(fit.law, logs, target, np.repeat(fit.theta[None], len(part), 0), fit.delta, bounds, weights=part)[0]
      for part in np.array_split(counts, -(-num_resamples // _CHUNK))])


def interval(values: np.ndarray, degrees: int) -> list[float]:
  """Returns the 95% interval of resampled values.

  Args:
    values: [B].
    degrees: of freedom: runs less parameters.
  """
  from scipy import special
  tail = special.ndtr(-special.stdtrit(max(degrees, 1), 0.5 + LEVEL / 2))
  with np.errstate(invalid="ignore"):  # Between infinite values, of what the runs leave open, lies no number.
    return [float(v) for v in np.quantile(values, [tail, 1 - tail])]


def predict(fit: Fit, theta_BP: np.ndarray, points: Points, degrees: int, seed: int) -> list[dict]:
  """Predicts the loss of runs that are not there.

  The interval holds both what is unknown of the law and the noise of a single run: to each resampled law is added a
  residual of the fit, with the parameters counted off. That the law goes on beyond the runs is taken for granted.

  Args:
    fit: the law.
    theta_BP: from `resample`.
    points: of the new runs.
    degrees: of freedom: runs less parameters.
    seed: of the draws.

  Returns:
    For each point `loss`, the `interval` of a single run there, and the `law_interval` of the law alone; these are None
    where laws that fit the runs as well foretell other losses.
  """
  rng = np.random.default_rng(seed)
  noise = fit.residuals * np.sqrt(len(fit.residuals) / max(len(fit.residuals) - len(fit.theta), 1))
  center, laws = fit.log_loss(points), fit.log_loss(points, theta_BP)
  repeats = -(-4000 // len(laws))
  runs = np.repeat(laws, repeats, axis=0)
  runs = runs + rng.choice(noise, runs.shape)
  told = lambda drawn, i, unknown: None if unknown else interval(np.exp(drawn[:, i]), degrees)
  return [{"loss": float(np.exp(center[i])), "interval": told(runs, i, unknown),
           "law_interval": told(laws, i, unknown)} for i, unknown in enumerate(fit.open_at(points))]
