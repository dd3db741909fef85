"""What the data cannot tell: a sentence for each reason to distrust a fitted parameter."""

from typing import Mapping, Sequence

import numpy as np

from lmjax.scaling.fit import Fit
from lmjax.scaling.laws import Points

_LINE = 0.15  # Spread of log D about a power of N below which the two move as one: 15%.
_WIDE = 3.0  # An interval whose ends are this factor apart says little of a floor or an exponent.
_NO_FLOOR = 0.01  # Of the lowest loss: an E below that is none.
_FEW = 5  # Degrees of freedom below which intervals are rough.
_SINGULAR = 1e-4  # Of the Jacobian with columns of length 1: a direction that moves no loss.
_SINGLE_TERMS = {"alpha": ("size", "sizes"), "beta": ("tokens", "numbers of tokens")}


def identifiability(fit: Fit, points: Points, loss: np.ndarray, num_runs: int,
                    intervals: Mapping[str, Sequence[float]]) -> list[str]:
  """Returns a sentence for each way in which the runs leave the law open.

  Args:
    fit: the law.
    points: of the runs.
    loss: of the runs.
    num_runs: how many there are.
    intervals: of the law's parameters.
  """
  said = []
  degrees = num_runs - len(fit.theta)
  if degrees < _FEW:
    said.append(f"{num_runs} runs leave {degrees} degrees of freedom beside the {len(fit.theta)} parameters, so the "
                "intervals are rough; add runs.")
  if fit.law.optimum is not None:
    said += design(points)
  floor = intervals.get("E")
  if floor is not None and floor[0] < _NO_FLOOR * loss.min():
    said.append("The interval of E includes 0: these runs do not reach far enough to tell a floor from a slow power "
                "law; add larger runs.")
  for name in ("E", "alpha", "beta", "gamma", "alpha_N", "alpha_D"):
    low, high = intervals.get(name, (1.0, 1.0))
    if high > _WIDE * low and not (name == "E" and low < _NO_FLOOR * loss.min()):
      said.append(f"The data do not identify {name}: its interval reaches from {low:.3g} to {high:.3g}.")
  if weak := _flat_direction(fit):
    said.append(f"Some change of {' and '.join(weak)} together leaves the fit as it is, so none of them can be trusted "
                "alone; add runs that tell them apart.")
  return said


def design(points: Points) -> list[str]:
  """Returns a sentence for each way in which the places of the runs alone leave a law of both terms open."""
  n, d = np.log(points.size), np.log(points.tokens)
  said = []
  for values, (what, many) in zip((n, d), _SINGLE_TERMS.values()):
    if len(np.unique(np.round(values, 2))) < 3:
      said.append(f"The runs have fewer than 3 different {many}, so the exponent of {what} cannot be told from its "
                  "factor and E; add others.")
  if said:
    return said
  slope, offset = np.polyfit(n, d, 1)
  if np.sqrt(np.mean((d - slope * n - offset) ** 2)) < _LINE:
    said.append(f"All runs lie on one line, tokens growing as size^{slope:.2g}, so the terms A/N^alpha and B/D^beta "
                "cannot be told apart; add runs with other ratios of tokens to size.")
  return said


def _flat_direction(fit: Fit) -> list[str]:
  """Returns the parameters of a combination that moves no loss, or []."""
  length = np.linalg.norm(fit.jacobian, axis=0)
  names = list(fit.values)
  if (length < 1e-9).any():
    return [names[i] for i in np.flatnonzero(length < 1e-9)] if len(names) == len(length) else names
  _, sizes, directions = np.linalg.svd(fit.jacobian / length, full_matrices=False)
  if sizes[-1] > _SINGULAR * sizes[0]:
    return []
  strong = np.abs(directions[-1]) > 0.3
  return [name for name, on in zip(names, strong) if on] if len(names) == len(strong) else names
