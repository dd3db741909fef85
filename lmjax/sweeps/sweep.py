"""What a sweep is: a space, who chooses in it, how many trials, and by what they are compared."""

import dataclasses
from typing import Any

from lmjax.config_checks import UserError, nearest
from lmjax.sweeps.space import Cube, Settings, Space, check_space, dimensions, distinct, draw, is_list, points

# Those whose trials are known before the first is run; the others choose by what has been seen.
PLANNED = ("grid", "random", "sobol", "halton")
DRIVERS = (*PLANNED, "tpe", "gp")
PRUNERS = ("none", "median", "asha", "hyperband")
MODES = ("min", "max")
# Trials by which tpe and gp come to know the space before they model it.
_MOST_FIRST = 8
# Draws for each point that they have found, after which a list is taken to be used up.
_DRAWS_A_POINT = 64


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep, as `get_sweep()` of an experiment file returns it and as flags change it.

  Attributes:
    space: of settings; see `lmjax.sweeps.space`.
    driver: grid tries all of a space without ranges; random, sobol and halton (both scrambled) draw; tpe and gp choose
      by what has been seen. None is grid where there are no ranges, and else sobol.
    num_trials: how many; None is all of a grid.
    metric: of result.json or, such as validation/accuracy, of the evaluations.
    mode: whether the best is the smallest (min) or the largest (max).
    pruner: stops trials that are behind others at their evaluations in the loop: median, asha or hyperband.
    seed: of what is drawn.
    retries: how often a trial that raises an error is run again.
  """
  space: Space
  driver: str | None = None
  num_trials: int | None = None
  metric: str = "eval_loss"
  mode: str = "min"
  pruner: str = "none"
  seed: int = 0
  retries: int = 1


def resolve(sweep: Sweep) -> Sweep:
  """Returns a sweep whose driver and number of trials are filled in.

  Raises:
    UserError: for a value that is not one of those it may have, and a driver that does not go with the space.
  """
  check_space(sweep.space, "The sweep's space")
  sweep = dataclasses.replace(sweep, driver=sweep.driver or ("grid" if is_list(sweep.space) else "sobol"))
  for name, known in (("driver", DRIVERS), ("pruner", PRUNERS), ("mode", MODES)):
    value = getattr(sweep, name)
    if value not in known:
      raise UserError(f"The sweep's {name} is {value!r}, which it does not know{nearest(str(value), known)}")
  for name, low in (("num_trials", 1), ("seed", 0), ("retries", 0)):
    value = getattr(sweep, name)
    if value is not None and (not isinstance(value, int) or value < low):
      raise UserError(f"The sweep's {name} is {value!r}, but it must be a whole number of at least {low}.")
  if sweep.num_trials is None and sweep.driver != "grid":
    raise UserError(f"The sweep's driver is {sweep.driver}, which needs to know how many trials to make; give "
                    "--num_trials.")
  if sweep.driver in PLANNED:
    return dataclasses.replace(sweep, num_trials=len(planned(sweep)))
  return sweep


def planned(sweep: Sweep) -> list[Settings | Cube]:
  """Returns the trials that do not depend on what others have shown, in order.

  A longer sweep begins with those of a shorter one. What is drawn twice, from lists, is there once, and draws go on
  until there are `num_trials`, or no more to be found. tpe and gp begin with a scrambled Sobol sequence, as choices,
  for they learn from these.

  Args:
    sweep: resolved.
  """
  if sweep.driver == "grid":
    return distinct(points(sweep.space))[:sweep.num_trials]
  if sweep.driver in PLANNED:
    return _drawn(sweep)
  return list(_by_settings(sweep.space, "sobol", min(_MOST_FIRST, sweep.num_trials), sweep.seed).values())


def planned_settings(sweep: Sweep) -> list[Settings]:
  """Returns the settings of the planned trials."""
  return [draw(sweep.space, one) if isinstance(one, Cube) else one for one in planned(sweep)]


def cubes(space: Space, kind: str, count: int, seed: int) -> list[Cube]:
  """Returns who draws from a space.

  Args:
    space: to draw from.
    kind: random, sobol or halton; the latter two, scrambled, fill the space evenly (Owen 1998).
    count: how many.
    seed: of the scrambling and of random numbers.
  """
  size = max(1, len(list(dimensions(space))))
  return [Cube(space, point) for point in _coordinates(kind, size, count, seed)]


def definition(sweep: Sweep) -> dict[str, Any]:
  """Returns what may not change while a sweep goes on, as what JSON holds."""
  kept = {name: getattr(sweep, name) for name in ("driver", "metric", "mode", "pruner", "seed")}
  return {**kept, "space": repr(sweep.space)}


def _drawn(sweep: Sweep) -> list[Settings]:
  count = sweep.num_trials
  while True:
    found = distinct([draw(sweep.space, cube) for cube in _by_settings(
        sweep.space, sweep.driver, count, sweep.seed).values()])
    if len(found) >= sweep.num_trials or count >= _DRAWS_A_POINT * len(found):
      return found[:sweep.num_trials]
    count *= 2


def _by_settings(space: Space, kind: str, count: int, seed: int) -> dict[str, Cube]:
  """Returns the draws, and of those that come to the same settings the first."""
  found: dict[str, Cube] = {}
  for cube in cubes(space, kind, count, seed):
    found.setdefault(repr(draw(space, cube)), cube)
  return found


def _coordinates(kind: str, size: int, count: int, seed: int) -> Any:
  """Returns points in the unit cube, [count, size]."""
  import numpy as np
  rng = np.random.default_rng(seed)
  if kind == "random":
    return rng.random((count, size))
  from scipy.stats import qmc
  if kind == "halton":
    return qmc.Halton(size, scramble=True, rng=rng).random(count)
  # The sequence is balanced at powers of two, which scipy insists on in a warning.
  return qmc.Sobol(size, scramble=True, rng=rng).random_base2(max(0, count - 1).bit_length())[:count]
