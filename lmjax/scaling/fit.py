"""Fitting a law to runs: Huber's loss on the logarithm of the loss, from many starts.

The objective is that of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3, summed over runs and followed until it is
flat: a mean of tiny values stops an optimizer early and makes wrong parameters look certain (Besiroglu et al. 2024,
arXiv 2404.10102). Huber's delta follows the noise unless it is given: their 1e-3 is far below the noise between seeds,
where Huber's loss is nearly the absolute value and wastes a third of the runs.

Key: B batch (data sets or starts), R rows, P parameters.
"""

import dataclasses
import functools

import numpy as np

from lmjax.scaling.laws import Center, Law, Points

_EFFICIENT = 1.345  # Huber's delta in standard deviations: 95% as efficient as least squares where noise is normal.
_CUT_VARIANCE = 0.710165  # Of a standard normal variable that is cut off at 1.345 on either side.
_TO_SIGMA = 1.4826  # From a normal distribution's median absolute value to its standard deviation.
_LEAST_DELTA = 1e-5  # Losses are written with some five digits; residuals below that are rounding.
_FIRST_DELTA = 0.03
_SCREEN_STEPS, _NUM_STARTS = 12, 6
_STILL = 1e-9  # Length of a column of the Jacobian that moves no loss.
_SINGULAR = 1e-4  # Of the Jacobian with columns of length 1: a direction that moves no loss.
_PART = 0.03  # Of a direction: a smaller share of it is rounding.
_MOVED = 1e-3  # Of how a loss depends on all parameters: less is rounding.
_FACTORS = {"alpha": "A", "beta": "B", "gamma": "K", "alpha_N": "N_c", "alpha_D": "D_c"}


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law.

  Attributes:
    law: its form.
    center: of the runs.
    theta: the inner parameters, [P].
    delta: of Huber's loss.
    residuals: log loss less the law's, [R].
    jacobian: derivatives of the law's log loss, [R, P].
    scale: standard deviation of the noise of log loss, robust and with the parameters counted off.
  """
  law: Law
  center: Center
  theta: np.ndarray
  delta: float
  residuals: np.ndarray
  jacobian: np.ndarray
  scale: float

  @property
  def values(self) -> dict[str, float]:
    return {name: float(value[0]) for name, value in self.law.values(self.theta[None], self.center).items()}

  def log_loss(self, points: Points, theta_BP: np.ndarray | None = None) -> np.ndarray:
    """Returns the log loss at some points, of this fit's parameters [R] or of a batch of others [B, R]."""
    if theta_BP is None:
      return self.log_loss(points, self.theta[None])[0]
    return self.law.log_loss(theta_BP, self.center.relative(points))[0]

  def left_open(self) -> list[str]:
    """Returns the parameters, by their names in `values`, of which other values fit the runs as well."""
    names = list(self.values)
    found = {name for name, moved in zip(names, (np.abs(self._flat_directions) > _PART).any(axis=0)) if moved}
    if "alpha" in found and len(names) > len(self.theta):  # One exponent is both.
      found.add("beta")
    # What a term is at N = 1 or D = 1 follows by its exponent from what it is among the runs.
    return [name for name in names if name in found | {_FACTORS[exponent] for exponent in found & set(_FACTORS)}]

  def open_at(self, points: Points) -> np.ndarray:
    """Returns where laws that fit the runs as well have other losses, [R] booleans: there nothing is foretold."""
    slopes = self.law.log_loss(self.theta[None], self.center.relative(points))[1][0] / self._lengths
    moved = np.abs(slopes @ self._flat_directions.T)
    return (moved > _MOVED * np.linalg.norm(slopes, axis=1, keepdims=True)).any(axis=1)

  @property
  def _lengths(self) -> np.ndarray:
    """The columns of the Jacobian, by which parameters are measured; 1 where one moves no loss."""
    lengths = np.linalg.norm(self.jacobian, axis=0)
    return np.where(lengths > _STILL, lengths, 1.0)

  @property
  def _flat_directions(self) -> np.ndarray:
    """Unit changes of the parameters, in their lengths, that move the loss of no run, [F, P]."""
    columns = self.jacobian / self._lengths
    _, sizes, directions = np.linalg.svd(columns, full_matrices=len(columns) < columns.shape[1])
    return directions[np.append(sizes, np.zeros(len(directions) - len(sizes))) <= _SINGULAR * sizes[0]]


def fit_law(law: Law, points: Points, loss: np.ndarray, *, huber_delta: float | None = None) -> Fit:
  """Fits a law.

  Args:
    law: its form.
    points: of the runs.
    loss: of the runs, [R], above 0.
    huber_delta: where Huber's loss turns from square to linear, in log loss; None for 1.345 robust standard deviations
      of the residuals.

  Returns:
    The fit, which is the best of many starts.
  """
  center = Center.of(points)
  logs, target, bounds = center.relative(points), np.log(loss), law.bounds(loss)
  starts = np.clip(law.starts(loss), bounds[:, 0], bounds[:, 1])
  delta = huber_delta or _FIRST_DELTA
  screened, objective = solve(law, logs, target, starts, delta, bounds, max_steps=_SCREEN_STEPS)
  theta = _best(law, logs, target, delta, bounds, _distinct(screened, objective))
  if huber_delta is None:
    others = _distinct(screened, objective)[:2]
    for _ in range(3):
      delta = max(_EFFICIENT * _scale(law, theta, logs, target), _LEAST_DELTA)
      candidates, objective = solve(law, logs, target, np.stack([theta, *others]), delta, bounds)
      theta = candidates[objective.argmin()]
    theta = _best(law, logs, target, delta, bounds, theta[None])
  # L-BFGS crawls where the floor is nearly flat; a few steps of the other method end it.
  theta = solve(law, logs, target, theta[None], delta, bounds)[0][0]
  predicted, jacobian = law.log_loss(theta[None], logs)
  return Fit(law, center, theta, delta, target - predicted[0], jacobian[0], _scale(law, theta, logs, target))


def solve(law: Law, logs: tuple, target: np.ndarray, theta: np.ndarray, delta: float, bounds: np.ndarray, *,
          weights: np.ndarray | None = None, max_steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
  """Minimises Huber's loss for a batch of data sets or starts at once, by the method of Levenberg and Marquardt.

  Args:
    law: the form.
    logs: relative logs of the runs.
    target: log loss, [R] or [B, R].
    theta: where to start, [B, P].
    delta: of Huber's loss.
    bounds: of the parameters, [P, 2].
    weights: how often each row counts, [B, R]; None for once.
    max_steps: of each; a few hundred are far more than it needs.

  Returns:
    The parameters [B, P], and the objective [B].
  """
  theta = theta.copy()
  batch, num_params = theta.shape
  target = np.broadcast_to(target, (batch, target.shape[-1]))
  weights = np.broadcast_to(np.ones(1) if weights is None else weights, target.shape)
  objective = np.full(batch, np.inf)
  damping, active = np.full(batch, 1e-2), np.arange(batch)
  state = None
  for _ in range(max_steps):
    if state is None:
      objective[active], *state = _normal_equations(law, logs, target[active], theta[active], delta, weights[active])
    gradient, hessian = state
    diagonal = np.einsum("bpp->bp", hessian)
    scaled = hessian + (damping[active, None] * diagonal + 1e-14 * diagonal.max(1, keepdims=True) + 1e-300)[
        ..., None] * np.eye(num_params)
    step = np.linalg.solve(scaled, gradient[..., None])[..., 0]
    tried = np.clip(theta[active] + step, bounds[:, 0], bounds[:, 1])
    new, *new_state = _normal_equations(law, logs, target[active], tried, delta, weights[active])
    better = new <= objective[active]
    gained = np.where(better, objective[active] - new, np.inf)
    still = np.abs(tried - theta[active]).max(axis=1) < 1e-9 * (1 + np.abs(theta[active]).max(axis=1))
    theta[active] = np.where(better[:, None], tried, theta[active])
    objective[active] = np.where(better, new, objective[active])
    damping[active] = np.clip(damping[active] * np.where(better, 0.2, 6.0), 1e-12, 1e12)
    state = [np.where(better.reshape(-1, *[1] * (x.ndim - 1)), y, x) for x, y in zip(state, new_state)]
    on = ~(still | (gained <= 1e-13 * objective[active]) | (damping[active] >= 1e12))
    active, state = active[on], [x[on] for x in state]
    if not len(active):
      break
  return theta, objective


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
  """Returns Huber's loss: half the square up to delta, linear beyond."""
  size = np.abs(residuals)
  return np.where(size <= delta, 0.5 * residuals ** 2, delta * (size - 0.5 * delta))


def _normal_equations(law, logs, target, theta, delta, weights):
  """Returns the objective, minus its gradient, and the Gauss-Newton Hessian, of each of a batch."""
  predicted, jacobian = law.log_loss(theta, logs)
  residuals = target - predicted
  robust = weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
  gradient = np.einsum("br,brp->bp", robust * residuals, jacobian)
  hessian = np.matmul((jacobian * robust[..., None]).swapaxes(1, 2), jacobian)
  return (weights * huber(residuals, delta)).sum(axis=1), gradient, hessian


def _best(law, logs, target, delta, bounds, starts):
  """Returns the lowest end of L-BFGS from some starts."""
  from scipy import optimize

  def value_and_gradient(theta):
    predicted, jacobian = law.log_loss(theta[None], logs)
    residuals = target - predicted[0]
    # In units of delta squared, so that the tolerances below mean the same whatever the noise.
    slope = -np.clip(residuals, -delta, delta) @ jacobian[0]
    return huber(residuals, delta).sum() / delta ** 2, slope / delta ** 2

  # For a handful of numbers BLAS wakes every core, which on a busy machine takes sixty times as long.
  with _blas().limit(limits=1):
    ends = [optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds,
                              options={"ftol": 1e-14, "gtol": 1e-8, "maxiter": 300, "maxfun": 600})
            for start in starts]
  return min(ends, key=lambda end: end.fun).x


@functools.cache
def _blas():
  import scipy.linalg  # noqa: F401  Its BLAS must be loaded to be found.
  import threadpoolctl
  return threadpoolctl.ThreadpoolController()


def _distinct(thetas: np.ndarray, objective: np.ndarray) -> np.ndarray:
  """Returns the best few of a batch that are not the same."""
  kept = []
  for i in np.argsort(objective):
    if all(np.abs(thetas[i] - other).max() > 1e-2 for other in kept):
      kept.append(thetas[i])
    if len(kept) == _NUM_STARTS:
      break
  return np.stack(kept)


def _scale(law, theta, logs, target):
  return robust_scale(target - law.log_loss(theta[None], logs)[0][0], len(theta))


def robust_scale(residuals: np.ndarray, num_params: int) -> float:
  """Returns the standard deviation of residuals, with far ones cut off (Huber 1981, Robust Statistics, proposal 2).

  Args:
    residuals: [R].
    num_params: that were fitted, and are counted off.
  """
  free = max(len(residuals) - num_params, 1)
  scale = _TO_SIGMA * np.median(np.abs(residuals)) * np.sqrt(len(residuals) / free)
  for _ in range(50):
    if scale < 1e-12:
      break
    cut = np.minimum(np.abs(residuals), _EFFICIENT * scale)
    scale = np.sqrt((cut ** 2).sum() / free / _CUT_VARIANCE)
  return float(scale)
