"""The whole of an analysis: runs in, what `lmjax fit` prints out."""

import dataclasses
import math
from typing import Any

import numpy as np

from lmjax.config_checks import UserError
from lmjax.scaling import bootstrap, choice, minima, warn
from lmjax.scaling.counts import FlopCount
from lmjax.scaling.fit import Fit, fit_law
from lmjax.scaling.laws import LAWS, Law, Points, optimal
from lmjax.scaling.runs import Runs

_FAR = 5.0  # Robust standard deviations from the law beyond which a run is shown as an outlier.
_ROUNDING = 1e-5  # Of log loss: what lies within that is no outlier, however well the others fit.


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to analyse.

  Attributes:
    form: name of a law, or auto for the one that foretells best.
    num_resamples: of the bootstrap.
    seed: of every draw.
    huber_delta: None for one that follows the noise.
    drop_outliers: whether runs far from the law are left out and the rest fitted again.
    predict: what to foretell: (size, tokens), or (flops,) for the best size and tokens of that compute.
    hold_out: how many runs, the largest in compute, are left out of the fit and foretold.
    curve: whether the law at the best size is worked out for a picture.
  """
  form: str = "chinchilla"
  num_resamples: int = 1000
  seed: int = 0
  huber_delta: float | None = None
  drop_outliers: bool = False
  predict: tuple[tuple[float, ...], ...] = ()
  hold_out: int = 0
  curve: bool = False


def analyse(runs: Runs, count: FlopCount, settings: Settings) -> dict[str, Any]:
  """Fits a law to runs and says how far it can be trusted.

  Args:
    runs: to fit.
    count: the FLOP convention, under which the optimum is sought.
    settings: how.

  Returns:
    What `lmjax fit` prints, ready for JSON.

  Raises:
    UserError: where there are no more runs than parameters.
  """
  notes = list(runs.table.notes)
  runs, largest = _hold_out(runs, settings.hold_out)
  law, scores = _choose(runs, settings)
  fit = fit_law(law, runs.points, runs.loss, huber_delta=settings.huber_delta)
  far = _outliers(fit)
  dropped = []
  if far.any() and settings.drop_outliers:
    dropped = [row for row in _rows(runs, fit, far) if row["outlier"]]
    runs = runs.keep(~far)
    law, scores = _choose(runs, settings)
    fit = fit_law(law, runs.points, runs.loss, huber_delta=settings.huber_delta)
    far = _outliers(fit)
  elif far.any():
    names = ", ".join(name for name, is_far in zip(runs.names, far) if is_far)
    notes.append(f"{far.sum()} of {len(far)} runs lie more than {_FAR:g} standard deviations from the law: {names}; "
                 "look at them, or leave them out with --drop_outliers.")
  notes += warn.settings(runs.points, runs.loss, runs.names)
  degrees = runs.num_runs - len(fit.theta)
  thetas = bootstrap.resample(fit, runs.points, runs.loss, runs.run, settings.num_resamples, settings.seed)
  drawn, left_open = law.values(thetas, fit.center), fit.left_open()
  intervals = {name: None if name in left_open else bootstrap.interval(values, degrees)
               for name, values in drawn.items()}
  notes += warn.identifiability(fit, runs.points, runs.loss, runs.num_runs, intervals)
  return {
      "form": law.name, "formula": law.formula, **fit.values, "intervals": intervals, "level": bootstrap.LEVEL,
      "compute_optimal": _optimum(fit, drawn, count, degrees), "noise": fit.scale, "huber_delta": fit.delta,
      "num_runs": runs.num_runs, "num_rows": len(runs.loss), "num_resamples": settings.num_resamples,
      "predictions": _predictions(fit, thetas, runs, count, settings, degrees),
      "held_out": _held_out(fit, thetas, largest, runs, settings, degrees),
      "curve": _curve(fit, thetas, runs, largest, degrees) if settings.curve else None,
      "residuals": _rows(runs, fit, far), "outliers": [n for n, is_far in zip(runs.names, far) if is_far],
      "dropped": dropped, "forms": [{**dataclasses.asdict(score), "error": score.error} for score in scores],
      "isoflop": isoflop(runs), "envelope": envelope(runs), "warnings": notes}


def isoflop(runs: Runs) -> dict[str, Any] | None:
  """Returns the best size and tokens of each compute that was spent in three ways or more, and their power laws.

  Args:
    runs: any; those of a compute of their own are left out.

  Returns:
    What is printed; None where there are fewer than two such groups.
  """
  points = runs.points
  found, degrees = minima.find_minima(points.flops, points.size, runs.loss)
  size_law = minima.minimum_law(found, degrees)
  if size_law is None:
    return None
  tokens_found, _ = minima.find_minima(points.flops, points.tokens, runs.loss)
  tokens_law = minima.minimum_law(tokens_found, degrees)
  return {"groups": [_group(m, "flops", "size") for m in found], "size": dataclasses.asdict(size_law),
          "tokens": dataclasses.asdict(tokens_law) if tokens_law else None}


def best_value(runs: Runs, values: np.ndarray, column: str, against: str) -> dict[str, Any]:
  """Fits how the best value of a setting, such as the learning rate or the batch size, grows with scale.

  Args:
    runs: that vary it.
    values: of the setting in each run.
    column: its name.
    against: size, tokens or flops, which groups the runs.

  Returns:
    What `lmjax fit --best` prints, ready for JSON.

  Raises:
    UserError: where no two groups of runs have a best value.
  """
  found, degrees = minima.find_minima(getattr(runs.points, against), values, runs.loss)
  law = minima.minimum_law(found, degrees)
  if law is None:
    known = sum(m.best is not None for m in found)
    raise UserError(f"{runs.table.source} has {known} groups of equal {against} with a best {column} among their runs, "
                    "but the law needs two; give three or more values of it on both sides of the best, at two or more "
                    "scales.")
  notes = [*runs.table.notes, *(
      f"The {m.num_runs} runs at {against} {m.at:.3g} have no least loss among their values of {column}; add runs."
      for m in found if m.best is None)]
  return {"best": column, "against": against, "formula": f"{column} = coefficient * {against}^exponent",
          **dataclasses.asdict(law), "level": bootstrap.LEVEL,
          "groups": [_group(m, against, column) for m in found], "warnings": notes}


def envelope(runs: Runs) -> dict[str, Any]:
  """Returns the runs that no cheaper one equals, the corners of their hull, and the power law through the hull."""
  points, loss = runs.points, runs.loss
  best, hull = minima.frontier(points.flops, loss), minima.lower_hull(points.flops, loss)
  law = minima.power_law(points.flops[hull], loss[hull]) if len(hull) > 1 else None
  sizes = minima.power_law(points.flops[hull], points.size[hull]) if len(hull) > 1 else None
  return {"frontier": [runs.names[i] for i in best], "hull": [runs.names[i] for i in hull],
          "loss": dataclasses.asdict(law) if law else None, "size": dataclasses.asdict(sizes) if sizes else None}


def _choose(runs: Runs, settings: Settings) -> tuple[Law, list[choice.Score]]:
  needed = min(law.num_params() for law in LAWS.values()) if settings.form == "auto" else (
      LAWS[settings.form].num_params())
  if runs.num_runs <= needed:
    held = f" besides the {settings.hold_out} held out" if settings.hold_out else ""
    raise UserError(f"{runs.table.source} gives {runs.num_runs} runs{held}, but the form {settings.form} needs at "
                    f"least {needed + 1} for its {needed} parameters; add runs, or choose a --form with fewer "
                    "parameters.")
  if settings.form != "auto":
    return LAWS[settings.form], []
  scores = choice.compare(runs.points, runs.loss, runs.run, settings.huber_delta, settings.seed)
  return LAWS[scores[0].form], scores


def _outliers(fit: Fit) -> np.ndarray:
  return np.abs(fit.residuals) > max(_FAR * fit.scale, _ROUNDING)


def _rows(runs: Runs, fit: Fit, far: np.ndarray) -> list[dict[str, Any]]:
  """Returns the rows with their residuals, and a mark on those that are far from the law."""
  return [{"run": runs.names[i], "size": float(runs.points.size[i]), "tokens": float(runs.points.tokens[i]),
           "flops": float(runs.points.flops[i]), "loss": float(runs.loss[i]),
           "predicted": float(runs.loss[i] * np.exp(-fit.residuals[i])), "residual": float(fit.residuals[i]),
           "outlier": bool(far[i])} for i in range(len(runs.loss))]


def _optimum(fit: Fit, drawn: dict[str, np.ndarray], count: FlopCount, degrees: int) -> dict[str, Any] | None:
  if fit.law.optimum is None:
    return None
  one = optimal(fit.law, {name: np.array([value]) for name, value in fit.values.items()}, count.per_param_token)
  many, unknown = optimal(fit.law, drawn, count.per_param_token), _is_open(fit)
  return {"formula": "N = N_coefficient * C^a, D = D_coefficient * C^b",
          **{name: float(value[0]) for name, value in one.items()},
          "intervals": {name: None if unknown else bootstrap.interval(values, degrees)
                        for name, values in many.items()}}


def _is_open(fit: Fit) -> bool:
  """Returns whether the runs leave open how the best size and tokens grow, which E has no part in."""
  return bool(set(fit.left_open()) - {"E"})


def _predictions(fit: Fit, thetas: np.ndarray, runs: Runs, count: FlopCount, settings: Settings, degrees: int
                 ) -> list[dict[str, Any]]:
  if not settings.predict:
    return []
  wanted = [_point(fit, target, count if len(target) == 1 else _own_count(runs.points)) for target in settings.predict]
  size, tokens, flops = (np.array(column) for column in zip(*wanted))
  told = bootstrap.predict(fit, thetas, Points(size, tokens, flops), degrees, settings.seed)
  largest = runs.points.flops.max()
  rows = [{"size": float(n), "tokens": float(d), "flops": float(c), "times_largest_run": float(c / largest), **one}
          for (n, d, c), one in zip(wanted, told)]
  for target, row in zip(settings.predict, rows):
    if len(target) == 1 and fit.law.optimum is None:
      row.update(size=None, tokens=None)
    elif len(target) == 1 and _is_open(fit):  # Of which size, too, is unknown.
      row.update(interval=None, law_interval=None)
  return rows


def _hold_out(runs: Runs, count: int) -> tuple[Runs, Runs | None]:
  """Returns the runs without those of the most compute, and these; None where there are to be none."""
  if not count:
    return runs, None
  compute = np.zeros(runs.num_runs)
  np.maximum.at(compute, runs.run, runs.points.flops)
  kept = np.isin(runs.run, np.argsort(compute, kind="stable")[:-count])
  if not kept.any():
    raise UserError(f"--hold_out is {count}, but {runs.table.source} has only {runs.num_runs} runs; hold out fewer.")
  return runs.keep(kept), runs.keep(~kept)


def _held_out(fit: Fit, thetas: np.ndarray, largest: Runs | None, runs: Runs, settings: Settings, degrees: int
              ) -> list[dict[str, Any]]:
  if largest is None:
    return []
  told = bootstrap.predict(fit, thetas, largest.points, degrees, settings.seed)
  most = runs.points.flops.max()
  return [{"run": name, "size": float(n), "tokens": float(d), "flops": float(c), "times_largest_run": float(c / most),
           "loss": float(loss), "predicted": one["loss"], "error": float(one["loss"] / loss - 1),
           "interval": one["interval"],
           "inside": bool(one["interval"][0] <= loss <= one["interval"][1]) if one["interval"] else None}
          for name, n, d, c, loss, one in zip(largest.names, largest.points.size, largest.points.tokens,
                                              largest.points.flops, largest.loss, told)]


def _curve(fit: Fit, thetas: np.ndarray, runs: Runs, largest: Runs | None, degrees: int) -> dict[str, list[float]]:
  """Returns the law at the best size and tokens for each compute, with its interval, over the runs' range."""
  points = runs.points
  last = points.flops.max() if largest is None else largest.points.flops.max()
  flops = np.geomspace(points.flops.min(), last, 40)
  count = _own_count(points)  # So that the law is drawn over the runs' own compute.
  size, tokens, _ = (np.array(column) for column in zip(*[_point(fit, (c,), count) for c in flops]))
  at = Points(size, tokens, flops)
  unknown = fit.open_at(at) | (fit.law.optimum is not None and _is_open(fit))
  low, high = zip(*[(math.nan, math.nan) if hidden else bootstrap.interval(np.exp(drawn), degrees)
                    for drawn, hidden in zip(fit.log_loss(at, thetas).T, unknown)])
  return {"flops": flops.tolist(), "loss": np.exp(fit.log_loss(at)).tolist(), "low": list(low), "high": list(high)}


def _own_count(points: Points) -> FlopCount:
  """Returns what runs themselves say of C = k N D, where C is a column of its own."""
  return FlopCount(float(np.exp(np.mean(np.log(points.flops / (points.size * points.tokens))))))


def _point(fit: Fit, target: tuple[float, ...], count: FlopCount) -> tuple[float, float, float]:
  """Returns size, tokens and compute of what is to be foretold."""
  k = count.per_param_token
  if len(target) == 2:
    return (*target, k * target[0] * target[1])
  flops, = target
  if fit.law.optimum is None:  # The law asks for nothing but compute.
    return math.exp(fit.center.size), math.exp(fit.center.tokens), flops
  best = optimal(fit.law, {name: np.array([value]) for name, value in fit.values.items()}, k)
  size = float(best["N_coefficient"][0] * flops ** best["a"][0])
  return size, flops / (k * size), flops


def _group(minimum: minima.Minimum, against: str, varied: str) -> dict[str, Any]:
  return {against: minimum.at, "num_runs": minimum.num_runs, varied: minimum.best, "interval": minimum.interval,
          "loss": minimum.loss, "curvature": minimum.curvature}
