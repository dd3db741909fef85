"""What the data cannot tell: a sentence for each reason to distrust a fitted parameter."""

from typing import Mapping, Sequence

import numpy as np

from lmjax.scaling.fit import Fit
from lmjax.scaling.laws import Points

_LINE = 0.15  # Spread of log D about a power of N below which the two move as one: 15%.
_WIDE = 3.0  # An interval whose ends are this factor apart says little of a floor or an exponent.
_NO_FLOOR = 0.01  # Of the lowest loss: an E below that is none.
_FEW = 5  # Degrees of freedom below which intervals are rough.
_APART = 0.05  # Of log loss, between runs of one size and length: seeds differ by less.
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
    low, high = intervals.get(name) or (1.0, 1.0)
    if high > _WIDE * low and not (name == "E" and low < _NO_FLOOR * loss.min()):
      said.append(f"The data do not identify {name}: its interval reaches from {low:.3g} to {high:.3g}.")
  if weak := fit.left_open():
    said.append(f"Other values of {', '.join(weak)} fit these runs as well, so these have no interval, nor has what "
                "follows from them; add runs that tell them apart.")
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


def settings(points: Points, loss: np.ndarray, names: Sequence[str]) -> list[str]:
  """Returns a sentence where runs of the same size and tokens differ by what no seed does, as bad settings would.

  Args:
    points: of the rows.
    loss: of the rows.
    names: of the rows.
  """
  places: dict[tuple, list[int]] = {}
  for i, place in enumerate(zip(np.round(np.log(points.size), 2), np.round(np.log(points.tokens), 2))):
    places.setdefault(place, []).append(i)
  ends = [(min(rows, key=lambda i: loss[i]), max(rows, key=lambda i: loss[i])) for rows in places.values()]
  low, high = max(ends, key=lambda pair: loss[pair[1]] / loss[pair[0]])
  if np.log(loss[high] / loss[low]) < _APART:
    return []
  return [f"Runs of the same size and tokens differ by up to {loss[high] / loss[low] - 1:.0%} in loss ({names[low]} "
          f"and {names[high]}), and all are fitted; where their settings differ, keep the best of each."]
