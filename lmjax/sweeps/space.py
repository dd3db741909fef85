"""Search spaces: which settings a sweep tries, built from small pieces.

    values("optim.name", ["adamw", "muon"])                   one setting, some values
    grid({"optim.learning_rate": [1e-3, 3e-3], ...})          every combination of several lists
    log_uniform("optim.learning_rate", 1e-4, 1e-2)            a range; also uniform and integer
    product(a, b)                                             every choice of a with every choice of b
    zipped(a, b)                                              the first of a with the first of b, and so on
    chain(a, b)                                               a's, then b's
    conditional("optim.name", {"adamw": None, "muon": b})     b where the setting has that value, and so on

A space without ranges is a list, `points`. Any space can be drawn from: a draw makes a choice in each of its
`dimensions`, and whoever chooses (numbers in a cube, Optuna) need not know what the choices are about.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Iterable, Iterator, Mapping, Protocol, Sequence

from lmjax.config import settings_help
from lmjax.config_checks import UserError, nearest

Settings = dict[str, Any]
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Values:
  """A setting and the values it may have."""
  field: str
  options: tuple


@dataclasses.dataclass(frozen=True)
class Range:
  """A setting and the numbers it may have, ends included; whole ones, `step` apart, where there is a step."""
  field: str
  low: float
  high: float
  log: bool = False
  step: int | None = None

  def at(self, share: float) -> float | int:
    """Returns the number that has this share of the range below it, 0 to 1."""
    if self.step and not self.log:
      return self.low + self.step * min(int(share * (count := (self.high - self.low) // self.step + 1)), count - 1)
    # A whole number has the same room on both sides.
    room = 0.5 if self.step else 0.0
    low, high = self.low - room, self.high + room
    number = math.exp(math.log(low) + share * math.log(high / low)) if self.log else low + share * (high - low)
    number = round(number) if self.step else number
    return min(max(number, self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Product:
  """Every choice of each part with every choice of the others."""
  parts: tuple["Space", ...]


@dataclasses.dataclass(frozen=True)
class Zipped:
  """The choices of all parts, which are equally many, side by side."""
  parts: tuple["Space", ...]


@dataclasses.dataclass(frozen=True)
class Chain:
  """The choices of one part, then those of the next."""
  parts: tuple["Space", ...]


@dataclasses.dataclass(frozen=True)
class Conditional:
  """A setting with, for each of its values, the space of what goes with it, or None."""
  field: str
  cases: tuple[tuple[Any, "Space | None"], ...]


Space = Values | Range | Product | Zipped | Chain | Conditional


class Chooser(Protocol):
  """Makes the choices of a draw; each is named by its place in the space."""

  def index(self, path: Path, options: Sequence[Any]) -> int:
    """Returns which of the options is taken."""

  def number(self, path: Path, of: Range) -> float | int:
    """Returns a number of a range."""


def values(field: str, options: Sequence[Any]) -> Values:
  """Returns the space of one setting with some values."""
  _check_field(field)
  if isinstance(options, (str, Mapping)) or not isinstance(options, Iterable):
    raise UserError(f"The search space gives {field} {options!r}, but it must be a list of values.")
  options = tuple(map(_plain, options))
  if not options:
    raise UserError(f"The search space gives {field} no values; give at least one.")
  twice = next((option for i, option in enumerate(options) if option in options[:i]), None)
  if twice is not None:
    raise UserError(f"The search space gives {field} the value {twice!r} twice; give each once.")
  return Values(field, options)


def grid(lists: Mapping[str, Sequence[Any]]) -> Product:
  """Returns every combination of some settings' values, the last setting changing fastest."""
  if not isinstance(lists, Mapping):
    raise UserError(f"grid() of the search space is given a {type(lists).__name__}, but it must be settings with their "
                    'values, such as grid({"seed": [0, 1]}).')
  return product(*(values(field, options) for field, options in lists.items()))


def uniform(field: str, low: float, high: float) -> Range:
  """Returns the numbers from low to high, all alike."""
  return _range(field, low, high)


def log_uniform(field: str, low: float, high: float) -> Range:
  """Returns the numbers from low to high, all factors alike."""
  return _range(field, low, high, log=True)


def integer(field: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Range:
  """Returns the whole numbers low, low + step, ... up to high; `log` makes all factors alike."""
  low, high, step = map(_plain, (low, high, step))
  if not all(isinstance(number, int) for number in (low, high, step)) or step < 1:
    raise UserError(f"The search space has integer({field!r}, {low!r}, {high!r}, step={step!r}), but its numbers must "
                    "be whole and the step at least 1.")
  if log and step > 1:
    raise UserError(f"The search space gives {field} both a step and log; give one of them.")
  return _range(field, low, low + (high - low) // step * step, log, step)


def product(*parts: Space) -> Product:
  """Returns every choice of each part with every choice of the others, the last part changing fastest."""
  _check_parts(parts, "product")
  _check_apart(parts)
  return Product(parts)


def zipped(*parts: Space) -> Zipped:
  """Returns the choices of the parts side by side; they must be lists of one length."""
  _check_parts(parts, "zipped")
  _check_apart(parts)
  lengths = [len(points(part)) for part in parts]
  if len(set(lengths)) > 1:
    raise UserError(f"The search space zips {' and '.join(' '.join(sorted(fields(part))) for part in parts)}, which "
                    f"have {' and '.join(map(str, lengths))} choices; give them equally many.")
  return Zipped(parts)


def chain(*parts: Space) -> Chain:
  """Returns the choices of the first part, then those of the second, and so on; a draw takes each part as often."""
  _check_parts(parts, "chain")
  return Chain(parts)


def conditional(field: str, cases: Mapping[Any, Space | None]) -> Conditional:
  """Returns a setting's values, each with the space of what goes with it.

  Args:
    field: the setting.
    cases: for each value what else is searched where the setting has it, or None.
  """
  if not isinstance(cases, Mapping):
    raise UserError(f"The search space gives conditional({field!r}) a {type(cases).__name__}, but it must be values "
                    "with what else is searched, such as {\"muon\": values(...)}, or None.")
  options = values(field, tuple(cases)).options
  for value, case in cases.items():
    if case is not None:
      check_space(case, f"What conditional({field!r}) has for {value!r}")
      _check_apart([Values(field, ()), case])
  return Conditional(field, tuple(zip(options, cases.values())))


def fields(space: Space) -> set[str]:
  """Returns the settings that a space is about."""
  own = {space.field} if hasattr(space, "field") else set()
  return own.union(*(fields(part) for part in _parts(space)))


def is_list(space: Space) -> bool:
  """Returns whether a space has no ranges, so that its points can be listed."""
  return not isinstance(space, Range) and all(map(is_list, _parts(space)))


def points(space: Space) -> list[Settings]:
  """Returns the points of a space, in order.

  Raises:
    UserError: where the space has a range.
  """
  if isinstance(space, Range):
    raise UserError(f"The search space has a range for {space.field}, of which no list can be made; give it values, or "
                    "draw from it, such as with --driver=sobol.")
  if isinstance(space, Values):
    return [{space.field: option} for option in space.options]
  if isinstance(space, Conditional):
    return [{space.field: value, **more} for value, case in space.cases for more in (points(case) if case else [{}])]
  lists = [points(part) for part in space.parts]
  if isinstance(space, Chain):
    return list(itertools.chain(*lists))
  side_by_side = zip(*lists) if isinstance(space, Zipped) else itertools.product(*lists)
  return [functools.reduce(lambda a, b: a | b, row) for row in side_by_side]


def distinct(found: Sequence[Settings]) -> list[Settings]:
  """Returns the settings without those that were there before."""
  kept: list[Settings] = []
  for point in found:
    if point not in kept:
      kept.append(point)
  return kept


def is_number(value: Any) -> bool:
  """Returns whether a value of a setting is a number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_space(given: Any, what: str) -> None:
  """Raises a UserError, which begins with `what`, for what is not a space."""
  if not isinstance(given, Space):
    raise UserError(f"{what} is of type {type(given).__name__}, but it must be a search space, such as values(...) or "
                    "grid({...}).")


def as_flags(settings: Settings) -> list[str]:
  """Returns the flags by which `lmjax train` gives a run these settings."""
  words = lambda value: str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(
      value)
  return [f"--config.{field}={words(value)}" for field, value in settings.items()]


def dimensions(space: Space, path: Path = ()) -> Iterator[tuple[Path, Space]]:
  """Yields the place of each choice that a draw may have to make, and the piece that it is about."""
  if not isinstance(space, Product):
    yield path, space
  if not isinstance(space, Zipped):  # One choice for all its parts.
    for i, part in enumerate(_children(space)):
      if part is not None:
        yield from dimensions(part, (*path, i))


def draw(space: Space, chooser: Chooser, path: Path = ()) -> Settings:
  """Returns the settings of one draw."""
  inside = lambda i: draw(_children(space)[i], chooser, (*path, i))
  if isinstance(space, Range):
    return {space.field: chooser.number(path, space)}
  if isinstance(space, Values):
    return {space.field: space.options[chooser.index(path, space.options)]}
  if isinstance(space, Conditional):
    i = chooser.index(path, [value for value, _ in space.cases])
    value, case = space.cases[i]
    return {space.field: value, **(inside(i) if case else {})}
  if isinstance(space, Product):
    return functools.reduce(lambda a, b: a | b, map(inside, range(len(space.parts))))
  rows = points(space) if isinstance(space, Zipped) else range(len(space.parts))
  i = chooser.index(path, rows)
  return rows[i] if isinstance(space, Zipped) else inside(i)


class Cube:
  """Chooses by the coordinates of a point in the unit cube, one for each dimension of a space."""

  def __init__(self, space: Space, point: Sequence[float]):
    self._shares = dict(zip((path for path, _ in dimensions(space)), point))

  def index(self, path: Path, options: Sequence[Any]) -> int:
    return min(int(self._shares[path] * len(options)), len(options) - 1)

  def number(self, path: Path, of: Range) -> float | int:
    return of.at(float(self._shares[path]))


def _plain(value: Any) -> Any:
  """Returns a value of NumPy as Python's, and a list as a tuple."""
  value = value.tolist() if hasattr(value, "tolist") else value
  return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _children(space: Space) -> Sequence[Space | None]:
  if isinstance(space, Conditional):
    return [case for _, case in space.cases]
  return getattr(space, "parts", ())


def _parts(space: Space) -> list[Space]:
  return [part for part in _children(space) if part is not None]


def _check_parts(parts: tuple[Space, ...], piece: str) -> None:
  """Raises a UserError where there are no parts, or one is not a space."""
  if not parts:
    raise UserError(f"The search space has an empty {piece}(); give it at least one part.")
  for part in parts:
    check_space(part, f"A part of {piece}()")


def _check_field(field: str) -> None:
  """Raises a UserError for a setting that does not exist."""
  known = [name for name, _, _ in settings_help()]
  if field in known:
    return
  within = [name for name in known if name.startswith(f"{str(field).partition('.')[0]}.")]
  last = [name for name in known if name.rpartition(".")[2] == field]
  hint = f"; did you mean {last[0]!r}?" if last else nearest(str(field), within or known)
  raise UserError("The search space has a setting " + repr(field) + " that does not exist" + (
      hint if hint.startswith("; did") else "; lmjax train --help_config lists them all."))


def _check_apart(parts: Sequence[Space]) -> None:
  """Raises a UserError where two parts that hold at once are about the same setting."""
  seen: set[str] = set()
  for part in parts:
    if both := sorted(seen & fields(part)):
      raise UserError(f"Two parts of the search space set {both[0]} at once; leave it to one of them.")
    seen |= fields(part)


def _range(field: str, low: float, high: float, log: bool = False, step: int | None = None) -> Range:
  _check_field(field)
  low, high = _plain(low), _plain(high)
  if not (is_number(low) and is_number(high) and -math.inf < low < high < math.inf) or log and low <= 0:
    raise UserError(f"The search space has {field} from {low!r} to {high!r}, but a range goes from a number"
                    f"{' above 0' if log else ''} to a larger one.")
  return Range(field, low, high, log, step)
