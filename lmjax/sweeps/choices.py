"""A space's choices in Optuna's words, and who makes them there."""

from typing import Any, Iterable, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lmjax.sweeps.space import (
  Chooser,
  Conditional,
  Path,
  Range,
  Settings,
  Space,
  Values,
  Zipped,
  dimensions,
  is_number,
  points,
)


def by_field(space: Space, settings: Settings) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
  """Returns the parameters of a trial whose settings are known, one a setting, and what they are drawn from.

  Beside a range a value that is no number, such as None, has no parameter, for Optuna has no choice between the two.
  """
  options: dict[str, list] = {}
  ranges: dict[str, list[Range]] = {}
  for _, piece in dimensions(space):
    if isinstance(piece, Range):
      ranges.setdefault(piece.field, []).append(piece)
    else:
      for field, value in _options(piece):
        options.setdefault(field, []).append(value)
  params, distributions = {}, {}
  for field, value in settings.items():
    if field in ranges:
      if is_number(value):
        distributions[field], params[field] = _around(ranges[field], filter(is_number, options.get(field, []))), value
    else:
      distributions[field] = CategoricalDistribution(list(dict.fromkeys(map(_label, options[field]))))
      params[field] = _label(value)
  return params, distributions


class Asking:
  """Lets a trial of Optuna choose, by its study's sampler."""

  def __init__(self, space: Space, trial: optuna.Trial):
    self._names, self._trial = _names(space), trial

  def index(self, path: Path, options: Sequence[Any]) -> int:
    name, distribution = self._names[path], _of_options(options)
    if isinstance(distribution, IntDistribution):
      return self._trial.suggest_int(_ranked(name), distribution.low, distribution.high)
    return distribution.choices.index(self._trial.suggest_categorical(name, distribution.choices))

  def number(self, path: Path, of: Range) -> float | int:
    if of.step:
      return self._trial.suggest_int(self._names[path], of.low, of.high, step=of.step, log=of.log)
    return self._trial.suggest_float(self._names[path], of.low, of.high, log=of.log)


class Noting:
  """Lets another choose, and notes the choices as Optuna's parameters, so that a sampler learns from them."""

  def __init__(self, space: Space, chooser: Chooser):
    self._names, self._chooser = _names(space), chooser
    self.params: dict[str, Any] = {}
    self.distributions: dict[str, BaseDistribution] = {}

  def index(self, path: Path, options: Sequence[Any]) -> int:
    index, distribution = self._chooser.index(path, options), _of_options(options)
    if isinstance(distribution, IntDistribution):
      self._note(_ranked(self._names[path]), index, distribution)
    else:
      self._note(self._names[path], distribution.choices[index], distribution)
    return index

  def number(self, path: Path, of: Range) -> float | int:
    number = self._chooser.number(path, of)
    self._note(self._names[path], number, IntDistribution(of.low, of.high, of.log, of.step) if of.step else
               FloatDistribution(of.low, of.high, of.log))
    return number

  def _note(self, name: str, value: Any, distribution: BaseDistribution) -> None:
    self.params[name], self.distributions[name] = value, distribution


def _around(ranges: Sequence[Range], options: Iterable[float]) -> FloatDistribution | IntDistribution:
  """Returns a range around some ranges and numbers; logarithmic where they are, and no number is 0 or below."""
  ends = [*options, *(end for one in ranges for end in (one.low, one.high))]
  kind = IntDistribution if all(isinstance(end, int) for end in ends) else FloatDistribution
  return kind(min(ends), max(ends), log=min(ends) > 0 and all(one.log for one in ranges))


def _options(piece: Space) -> list[tuple[str, Any]]:
  """Returns (setting, value) of a choice among some."""
  if isinstance(piece, Values):
    return [(piece.field, option) for option in piece.options]
  if isinstance(piece, Conditional):
    return [(piece.field, value) for value, _ in piece.cases]
  return [pair for point in points(piece) for pair in point.items()] if isinstance(piece, Zipped) else []


def _of_options(options: Sequence[Any]) -> CategoricalDistribution | IntDistribution:
  """Returns what a choice is drawn from: of growing numbers the place, for near ones are alike, and else a word."""
  if all(map(is_number, options)) and len(options) > 2 and not isinstance(options, range) and list(options) in (
      sorted(options), sorted(options, reverse=True)):
    return IntDistribution(0, len(options) - 1)
  return CategoricalDistribution([_label(option) for option in options])


def _ranked(name: str) -> str:
  return f"{name} (place in the list)"


def _label(value: Any) -> Any:
  """Returns a value as one of those that Optuna keeps."""
  return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _names(space: Space) -> Mapping[Path, str]:
  """Returns a name for each choice: its setting, with its place where there are several of that setting."""
  found = [(path, getattr(piece, "field", type(piece).__name__.lower())) for path, piece in dimensions(space)]
  names = [name for _, name in found]
  place = lambda path: ".".join(str(i + 1) for i in path)
  return {path: name if names.count(name) == 1 else f"{name} ({place(path)})" for path, name in found}
