"""Where loss is least within each group of runs, and how that place grows: IsoFLOP curves, learning rates, batch sizes.

Each group is a parabola in the logarithm of what was varied (Hoffmann et al. 2022, arXiv 2203.15556, section 3.2); the
minima are fitted by a power law.
"""

import dataclasses

import numpy as np

from lmjax.scaling.bootstrap import LEVEL

_SAME = 0.1  # Values within this in logarithm are of one group: rounding to whole steps and layers moves them less.


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = coefficient * x^exponent, with 95% intervals, which are None where two points leave nothing to judge by."""
  coefficient: float
  exponent: float
  coefficient_interval: list[float] | None
  exponent_interval: list[float] | None


@dataclasses.dataclass(frozen=True)
class Minimum:
  """The minimum of one group.

  Attributes:
    at: the group's value of what the groups differ in, such as compute.
    num_runs: in it.
    best: the value of least loss; None where the parabola has no minimum among the runs.
    interval: of `best`, 95%.
    loss: at `best`.
    curvature: of the parabola; the second derivative of loss is twice that.
    log_variance: of log `best`.
  """
  at: float
  num_runs: int
  best: float | None
  interval: list[float] | None
  loss: float | None
  curvature: float
  log_variance: float | None


def groups(values: np.ndarray) -> np.ndarray:
  """Returns the group of each value, 0, 1, ... from the least on; a group reaches 10% beyond its least value."""
  found, group, first = np.empty(len(values), int), -1, -np.inf
  for i in np.argsort(values, kind="stable"):
    if np.log(values[i]) - first > _SAME:
      group, first = group + 1, np.log(values[i])
    found[i] = group
  return found


def parabolas(at: np.ndarray, varied: np.ndarray) -> list[np.ndarray]:
  """Returns the rows of each group of equal `at` with three different values of `varied` or more, as booleans."""
  group = groups(at)
  each = [group == i for i in range(group.max() + 1)]
  return [rows for rows in each if groups(varied[rows]).max() > 1]


def find_minima(at: np.ndarray, varied: np.ndarray, loss: np.ndarray) -> tuple[list[Minimum], int]:
  """Fits a parabola in log `varied` to each group of equal `at`.

  The noise is that of all groups together, for a few points about a parabola tell little of it.

  Args:
    at: what groups the runs, such as compute.
    varied: what was varied within a group, such as size.
    loss: of the runs.

  Returns:
    The minima of groups with at least three different values, and the degrees of freedom of the noise.
  """
  fitted, squares, degrees = [], 0.0, 0
  for rows in parabolas(at, varied):
    middle = np.log(varied[rows]).mean()
    x = np.log(varied[rows]) - middle
    design = np.stack([np.ones_like(x), x, x ** 2], axis=1)
    coefficients = np.linalg.lstsq(design, loss[rows], rcond=None)[0]
    squares += ((loss[rows] - design @ coefficients) ** 2).sum()
    degrees += len(x) - 3
    at_middle = float(np.exp(np.log(at[rows]).mean()))
    fitted.append((at_middle, middle, x, coefficients, np.linalg.inv(design.T @ design)))
  variance = squares / degrees if degrees else None
  return [_minimum(*one, variance, degrees) for one in fitted], degrees


def _minimum(at, middle, x, coefficients, inverse, variance, degrees) -> Minimum:
  from scipy import special
  c0, c1, c2 = coefficients
  place = -c1 / (2 * c2) if c2 > 0 else np.inf
  if not x.min() <= place <= x.max():
    return Minimum(at, len(x), None, None, None, float(c2), None)
  best = float(np.exp(middle + place))
  if variance is None:
    return Minimum(at, len(x), best, None, float(c0 + c1 * place / 2), float(c2), None)
  slope = np.array([0.0, -1 / (2 * c2), c1 / (2 * c2 ** 2)])  # Of the place by the coefficients.
  log_variance = float(variance * slope @ inverse @ slope)
  reach = special.stdtrit(degrees, 0.5 + LEVEL / 2) * np.sqrt(log_variance)
  return Minimum(at, len(x), best, [float(best * np.exp(-reach)), float(best * np.exp(reach))],
                 float(c0 + c1 * place / 2), float(c2), log_variance)


def power_law(x: np.ndarray, y: np.ndarray, log_variance: np.ndarray | None = None, degrees: int | None = None
              ) -> PowerLaw:
  """Fits a power law by least squares of logarithms.

  Args:
    x: at least two different values above 0.
    y: values above 0.
    log_variance: of log y, where it is known; points count by its inverse. Where they scatter more than that says, the
      intervals grow with the scatter.
    degrees: of freedom of `log_variance`.

  Returns:
    The law, with intervals by Student's t.
  """
  from scipy import special
  middle = np.log(x).mean()
  design = np.stack([np.ones(len(x)), np.log(x) - middle], axis=1)
  weights = np.ones(len(x)) if log_variance is None else 1 / np.maximum(log_variance, 1e-300)
  inverse = np.linalg.inv((design * weights[:, None]).T @ design)
  log_scale, exponent = solution = inverse @ (design * weights[:, None]).T @ np.log(y)
  free = len(x) - 2
  scatter = float((weights * (np.log(y) - design @ solution) ** 2).sum() / free) if free else None
  if log_variance is None:
    spread, degrees = scatter, free
  else:
    spread = max(1.0, scatter or 0.0)
  law = np.array([log_scale - exponent * middle, exponent])
  intervals = [None, None]
  if spread is not None:
    to_law = np.array([[1.0, -middle], [0.0, 1.0]])
    reach = special.stdtrit(degrees, 0.5 + LEVEL / 2) * np.sqrt(np.diag(to_law @ inverse @ to_law.T) * spread)
    intervals = [[float(low), float(high)] for low, high in zip(law - reach, law + reach)]
    intervals[0] = [float(np.exp(v)) for v in intervals[0]]
  return PowerLaw(float(np.exp(law[0])), float(exponent), *intervals)


def minimum_law(minima: list[Minimum], degrees: int) -> PowerLaw | None:
  """Returns the power law of the best values; None where fewer than two groups have one."""
  known = [minimum for minimum in minima if minimum.best is not None]
  if len(known) < 2:
    return None
  variances = None if known[0].log_variance is None else np.array([m.log_variance for m in known])
  return power_law(np.array([m.at for m in known]), np.array([m.best for m in known]), variances, degrees)


def frontier(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
  """Returns the envelope of loss against compute: points that no cheaper one equals, in the order of compute."""
  order = np.lexsort((loss, flops))
  lowest = np.minimum.accumulate(loss[order])
  return order[np.diff(lowest, prepend=np.inf) < 0]


def lower_hull(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
  """Returns the corners of the lower convex hull of log loss against log compute, as far as it falls.

  Unlike the frontier's, no point of it owes its place only to a gap in the budgets that were tried.
  """
  kept: list[int] = []
  x, y = np.log(flops), np.log(loss)
  for i in frontier(flops, loss):
    while len(kept) > 1 and ((x[kept[-1]] - x[kept[-2]]) * (y[i] - y[kept[-2]])
                             <= (y[kept[-1]] - y[kept[-2]]) * (x[i] - x[kept[-2]])):
      kept.pop()
    kept.append(int(i))
  return np.array(kept)
