"""The forms that a scaling law may have: loss as a function of size N, tokens D and compute C.

A law is fitted in inner parameters, in which it is smooth and free of huge numbers: logarithms of positive values, and
sizes, tokens and compute relative to the middle of the runs (`Center`). `values` turns them into what papers print.
Everything works on a batch of parameters at once, for a bootstrap fits hundreds of resampled data sets.

Key: B batch (parameter vectors), R rows (runs), P parameters.
"""

import dataclasses
from typing import Callable

import numpy as np

_EXPONENTS = (1e-3, 5.0)  # Bounds; nothing that was ever measured comes near them.
_FLOORS = (0.02, 0.3, 0.6, 0.8, 0.93)  # Where E starts, as a part of the lowest loss.


@dataclasses.dataclass(frozen=True)
class Points:
  """Where runs stand.

  Attributes:
    size: number of parameters, [R].
    tokens: number of tokens, [R].
    flops: compute, [R].
  """
  size: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray

  def __len__(self) -> int:
    return len(self.size)

  def __getitem__(self, rows: np.ndarray) -> "Points":
    return Points(self.size[rows], self.tokens[rows], self.flops[rows])


@dataclasses.dataclass(frozen=True)
class Center:
  """Logarithms of size, tokens and compute in the middle of the runs."""
  size: float
  tokens: float
  flops: float

  @classmethod
  def of(cls, points: Points) -> "Center":
    return cls(*(float(np.mean(np.log(x))) for x in (points.size, points.tokens, points.flops)))

  def relative(self, points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log size, log tokens and log compute, each relative to the middle."""
    return (np.log(points.size) - self.size, np.log(points.tokens) - self.tokens, np.log(points.flops) - self.flops)


@dataclasses.dataclass(frozen=True)
class Law:
  """A form of the law.

  Attributes:
    name: as in --form.
    formula: as it is printed.
    log_loss: (theta_BP, relative logs) -> (log loss [B, R], its derivatives [B, R, P]).
    values: (theta_BP, Center) -> what is reported, each [B].
    optimum: what `values` gives -> (alpha, beta, A, B) of the two terms A/N^alpha + B/D^beta whose sum the best N and D
      make least, each [B]; None where the law does not tell size from tokens.
    starts: the loss -> first guesses [starts, P].
    bounds: of each inner parameter, given the loss: [P, 2].
  """
  name: str
  formula: str
  log_loss: Callable
  values: Callable
  optimum: Callable | None
  starts: Callable
  bounds: Callable

  def num_params(self) -> int:
    return self.starts(np.ones(1)).shape[1]


def _sum_of_exponentials(terms: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns the logarithm of the sum of the terms' exponentials, and each term's share of the sum."""
  total = np.logaddexp.reduce(terms)
  return total, [np.exp(term - total) for term in terms]


def _chinchilla(theta, logs):
  e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
  n, d, _ = logs
  total, (_, share_a, share_b) = shares = _sum_of_exponentials([e + 0 * n, a - alpha * n, b - beta * d])
  return total, np.stack([*shares[1], -share_a * n, -share_b * d], axis=-1)


def _chinchilla_values(theta, center):
  e, a, b, alpha, beta = theta.T
  return {"E": np.exp(e), "A": np.exp(a + alpha * center.size), "B": np.exp(b + beta * center.tokens), "alpha": alpha,
          "beta": beta}


def _shared(theta, logs):
  total, slopes = _chinchilla(theta[:, [0, 1, 2, 3, 3]], logs)
  return total, np.concatenate([slopes[..., :3], slopes[..., 3:].sum(axis=-1, keepdims=True)], axis=-1)


def _shared_values(theta, center):
  return _chinchilla_values(theta[:, [0, 1, 2, 3, 3]], center)


def _no_floor(theta, logs):
  a, b, alpha, beta = (theta[:, i, None] for i in range(4))
  n, d, _ = logs
  total, (share_a, share_b) = _sum_of_exponentials([a - alpha * n, b - beta * d])
  return total, np.stack([share_a, share_b, -share_a * n, -share_b * d], axis=-1)


def _no_floor_values(theta, center):
  a, b, alpha, beta = theta.T
  return {"A": np.exp(a + alpha * center.size), "B": np.exp(b + beta * center.tokens), "alpha": alpha, "beta": beta}


def _kaplan(theta, logs):
  a, b, ratio, alpha_d = (theta[:, i, None] for i in range(4))
  n, d, _ = logs
  total, (share_a, share_b) = _sum_of_exponentials([a - ratio * n, b - d])
  slopes = np.stack([alpha_d * share_a, alpha_d * share_b, -alpha_d * share_a * n, total], axis=-1)
  return alpha_d * total, slopes


def _kaplan_values(theta, center):
  a, b, ratio, alpha_d = theta.T
  return {"N_c": np.exp(center.size + a / ratio), "D_c": np.exp(center.tokens + b), "alpha_N": ratio * alpha_d,
          "alpha_D": alpha_d}


def _kaplan_optimum(values):
  ratio = values["alpha_N"] / values["alpha_D"]
  return ratio, np.ones_like(ratio), values["N_c"] ** ratio, values["D_c"]


def _compute(theta, logs):
  e, k, gamma = (theta[:, i, None] for i in range(3))
  c = logs[2]
  total, (share_e, share_k) = _sum_of_exponentials([e + 0 * c, k - gamma * c])
  return total, np.stack([share_e, share_k, -share_k * c], axis=-1)


def _compute_values(theta, center):
  e, k, gamma = theta.T
  return {"E": np.exp(e), "K": np.exp(k + gamma * center.flops), "gamma": gamma}


def _grid(*axes) -> np.ndarray:
  return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)


def _floor_starts(num_terms: int, num_exponents: int) -> Callable:
  """Returns guesses in which E takes a part of the loss and the terms share the rest evenly."""
  def starts(loss):
    grid = _grid(np.array(_FLOORS), *[np.array((0.05, 0.12, 0.25, 0.45, 0.8, 1.4))] * num_exponents)
    floor = np.log(grid[:, :1] * loss.min())
    rest = np.log((np.median(loss) - grid[:, :1] * loss.min()) / num_terms)
    return np.concatenate([floor, *[rest] * num_terms, grid[:, 1:]], axis=1)
  return starts


def _no_floor_starts(loss):
  grid = _grid(np.array((0.1, 0.5, 0.9)), *[np.array((0.01, 0.03, 0.07, 0.15, 0.3, 0.6))] * 2)
  return np.concatenate([np.log(np.median(loss) * np.stack([grid[:, 0], 1 - grid[:, 0]], 1)), grid[:, 1:]], axis=1)


def _kaplan_starts(loss):
  grid = _grid(np.array((0.1, 0.5, 0.9)), np.array((0.3, 0.7, 1.0, 1.5, 3.0)), np.array((0.03, 0.07, 0.15, 0.3, 0.6)))
  # The sum of both terms, to the power alpha_D, is the loss.
  total = np.log(np.median(loss)) / grid[:, 2]
  return np.stack([total + np.log(grid[:, 0]), total + np.log(1 - grid[:, 0]), grid[:, 1], grid[:, 2]], axis=1)


def _bounds(num_floors: int, num_free: int, num_exponents: int) -> Callable:
  """Returns bounds of a floor, of free terms, and of exponents.

  A floor lies below every loss but for noise and outliers, of which one that is far too low must not bound it.
  """
  def bounds(loss):
    return np.array([(np.log(loss.min()) - 12, np.log(np.median(loss)))] * num_floors + [(-np.inf, np.inf)] * num_free
                    + [_EXPONENTS] * num_exponents)
  return bounds


def _kaplan_bounds(loss):
  return np.array([(-np.inf, np.inf)] * 2 + [(1e-2, 1e2), _EXPONENTS])


_terms = lambda values: (values["alpha"], values["beta"], values["A"], values["B"])

LAWS = {law.name: law for law in (
    # Hoffmann et al. 2022, arXiv 2203.15556, equation 2.
    Law("chinchilla", "L = E + A/N^alpha + B/D^beta", _chinchilla, _chinchilla_values, _terms, _floor_starts(2, 2),
        _bounds(1, 2, 2)),
    Law("shared", "L = E + A/N^alpha + B/D^alpha", _shared, _shared_values, _terms, _floor_starts(2, 1),
        _bounds(1, 2, 1)),
    Law("no_floor", "L = A/N^alpha + B/D^beta", _no_floor, _no_floor_values, _terms, _no_floor_starts,
        _bounds(0, 2, 2)),
    # Kaplan et al. 2020, arXiv 2001.08361, equation 1.5.
    Law("kaplan", "L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D", _kaplan, _kaplan_values, _kaplan_optimum,
        _kaplan_starts, _kaplan_bounds),
    Law("compute", "L = E + K/C^gamma", _compute, _compute_values, None, _floor_starts(1, 1), _bounds(1, 1, 1)),
)}


def optimal(law: Law, values: dict[str, np.ndarray], flops_per_param_token: float) -> dict[str, np.ndarray]:
  """Returns how the best size and tokens grow with compute, by Hoffmann et al. 2022 (arXiv 2203.15556), equation 4.

  Under C = k N D the sum A/N^alpha + B/D^beta is least at N = G (C/k)^a and D = (C/k)^b / G, with
  a = beta / (alpha + beta), b = alpha / (alpha + beta) and G = (alpha A / (beta B))^(1 / (alpha + beta)).

  Args:
    law: the form, with an `optimum`.
    values: of its parameters, each [B].
    flops_per_param_token: k.

  Returns:
    `a`, `b`, `N_coefficient` and `D_coefficient`, each [B], such that N = N_coefficient C^a and D = D_coefficient C^b.
  """
  alpha, beta, size_term, token_term = law.optimum(values)
  a, b = beta / (alpha + beta), alpha / (alpha + beta)
  with np.errstate(divide="ignore", over="ignore"):  # Where runs do not tell a term from nothing, it may be 0.
    log_g = (np.log(alpha * size_term) - np.log(beta * token_term)) / (alpha + beta)
    log_k = np.log(flops_per_param_token)
    return {"a": a, "b": b, "N_coefficient": np.exp(log_g - a * log_k), "D_coefficient": np.exp(-log_g - b * log_k)}
