"""Pictures of a sweep's trials: all settings at once, curves, the metric against the learning rate, what matters."""

import html
import math
from typing import Any, Collection, Mapping, Sequence

import numpy as np

from lmjax.report import pictures
from lmjax.report import trials as trials_lib
from lmjax.report.page import figure, large
from lmjax.report.trials import Trial, short
from lmjax.sweeps.rows import evaluated_name
from lmjax.sweeps.space import is_number

# Curves in one picture; more hide each other.
_MOST_CURVES = 60
_CURVE_POINTS = 150
# Heights of what has no place between a setting's smallest and largest value, or a metric's.
_NOT_SET, _NO_RESULT = -0.1, 1.12
# As many trials without a result fade to half, so that they do not hide the others.
_FAINT = 20
# Lengths of runs that differ by more are drawn on a logarithmic axis.
_FAR = 8
# Settings by whose values the metric against the learning rate is divided, those first that scale a model.
_FIRST = ("model.embed_dim", "model.num_layers", "train.batch_size", "data.seq_len", "train.num_steps",
          "train.num_tokens")
_MOST_GROUPS, _MOST_DIVISIONS = 8, 4
_SCALE = '<span class="rank" role="img" aria-label="from the best to the worst"></span>'


def parallel(trials: Sequence[Trial], metric: str, mode: str, ranges: Collection[str]) -> str:
  """Returns the picture of all trials, a line each through its settings to its metric.

  Args:
    trials: of a sweep.
    metric: its name.
    mode: min or max.
    ranges: settings that were drawn from ranges, and so have ticks at round distances, not at their values.
  """
  fields = trials_lib.searched(trials)
  shares = ranks(trials, mode)
  if not fields or not shares:
    return ""
  values = [trial.value for trial in trials if trial.number in shares]
  columns = [(short(field), _positions(found, field in ranges)) for field, found in fields.items()]

  def on(axes):
    worst_first = sorted(trials, key=lambda trial: -shares.get(trial.number, 2.0))
    for trial in worst_first:
      if trial.row.state not in ("waiting", "running", "duplicate"):
        y = [place(trial.row.settings.get(field)) for field, (_, (place, _)) in zip(fields, columns)]
        y.append(_share(trial.value, values) if trial.number in shares else _NO_RESULT)
        _trial_line(axes, trial, range(len(y)), y, shares, faint=_FAINT / (_FAINT + len(trials) - len(shares)))
    for x, (name, (_, ticks)) in enumerate([*columns, (metric, _positions(values, True))]):
      axes.plot([x, x], [-0.04, 1.04], color=pictures.INK, linewidth=0.8)
      for at, text in ticks:
        _word(axes, text, x, at)
      if x < len(columns) and any(list(fields)[x] not in trial.row.settings for trial in trials):
        _word(axes, "not set", x, _NOT_SET)
      axes.annotate(_plain(name), (x, -0.16), ha="center", va="top", fontsize=8, fontweight="bold")
    if any(trial.row.state in ("pruned", "diverged", "failed") for trial in trials):
      _word(axes, "no result", len(columns), _NO_RESULT)
    axes.set(xlim=(-0.25, len(columns) + 0.45), ylim=(-0.24, 1.16), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)
  size = (max(9.0, 1.7 * (len(columns) + 1)), 3.8)
  note = (f"A line is a trial, its colour its place by {html.escape(metric)}, {_SCALE} from the best to the worst; "
          "dashed ones have no result. Point at a line or a row of the table to find the trial in all pictures.")
  return figure("All settings at once", pictures.picture("All settings at once", on, size), note)


def curves(trials: Sequence[Trial], metric: str, mode: str) -> list[str]:
  """Returns the pictures of training loss and of evaluations, a curve for each of a part of the trials."""
  shares = ranks(trials, mode)
  shown = _some(trials, shares)
  read = {trial.number: trial.curves() for trial in shown}
  which = (f"{len(shown)} of {len(trials)} trials: the best {_MOST_CURVES // 2}, and others evenly over the order."
           if len(shown) < len(trials) else "All trials that have logged any.")
  note = (f"{which} Colours are places by {html.escape(metric)}, {_SCALE} from the best to the worst; dashed ones have "
          "no result.")
  drawn = []
  evaluated = next((name for of in read.values() if (name := evaluated_name(of, metric))), None)
  for title, name in (("Training loss, smoothed", "loss"), (f"Evaluations: {evaluated}", evaluated)):
    lines = {number: found for number, of in read.items() if (found := _line(of, name)) is not None}
    if lines:
      on = lambda axes, lines=lines, name=name: _curves_on(axes, shown, lines, shares, name)
      drawn.append(figure(html.escape(title), pictures.picture(title, on), note if not drawn else ""))
  return drawn


def rates(trials: Sequence[Trial], metric: str, mode: str, ranges: Collection[str]) -> list[str]:
  """Returns pictures of the metric against the learning rate, one for each setting that divides the trials.

  Args:
    trials: of a sweep.
    metric: its name.
    mode: min or max.
    ranges: settings that were drawn from ranges; lines join only what was listed.
  """
  done = [trial for trial in trials if trial.value is not None]
  fields = trials_lib.searched(done)
  rate = next((field for field in fields if short(field) == "learning_rate"), None)
  if rate is None:
    return []
  done = [trial for trial in done if rate in trial.row.settings]
  divisions = [field for field, values in fields.items()
               if field not in {rate, "seed", *ranges} and len(values) <= _MOST_GROUPS]
  divisions.sort(key=lambda field: _FIRST.index(field) if field in _FIRST else len(_FIRST))
  drawn = []
  for field in divisions[:_MOST_DIVISIONS] or [None]:
    groups = {value: [trial for trial in done if field is None or trial.row.settings.get(field) == value]
              for value in (fields[field] if field else [None])}
    title = f"{metric} against learning rate" + (f", by {short(field)}" if field else "")
    on = lambda axes, field=field, groups=groups: _rates_on(axes, rate, field, groups, metric, mode, rate in ranges)
    note = ("A point is a trial; where rates were listed, lines join the best of each (the mean over seeds); a star is "
            "the best of all." if not drawn else "")
    drawn.append(figure(html.escape(title), pictures.picture(title, on), note))
  return drawn


def importance(shares: Mapping[str, float], method: str) -> str:
  """Returns the picture of how much each setting matters."""
  names = [short(field) for field in reversed(shares)]

  def on(axes):
    axes.barh(range(len(names)), [100 * share for share in reversed(shares.values())], color=pictures.SERIES[0])
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_xlabel("variance explained, %")
    axes.grid(False, axis="y")
    axes.tick_params(length=0)
  title = "Importance of settings"
  return figure(title, pictures.picture(title, on, (6, max(1.6, 0.4 * len(names) + 0.9))),
                f"By {method} over the complete trials, within the values that they had.")


def ranks(trials: Sequence[Trial], mode: str) -> dict[int, float]:
  """Returns the place of each trial that has a value among them, from 0, the best, to 1."""
  done = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
  done.sort(key=lambda trial: trial.value, reverse=mode == "max")
  return {trial.number: i / max(1, len(done) - 1) for i, trial in enumerate(done)}


def _some(trials: Sequence[Trial], shares: Mapping[int, float]) -> list[Trial]:
  """Returns the trials whose curves are drawn, the best first."""
  order = sorted((trial for trial in trials if trial.row.state != "duplicate"),
                 key=lambda trial: shares.get(trial.number, 2.0))
  half = _MOST_CURVES // 2
  if len(order) <= _MOST_CURVES:
    return order
  return order[:half] + [order[half + i] for i in pictures.evenly(len(order) - half, _MOST_CURVES - half)]


def _line(curves: Mapping[str, Any], name: str | None) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns tokens and values of a metric, finite and few; training loss smoothed."""
  if name not in curves:
    return None
  steps, values = curves[name]
  keep = np.isfinite(values)
  if not keep.any():
    return None
  tokens = np.interp(steps, *curves["num_tokens"]) if "num_tokens" in curves else steps
  x, y = tokens[keep], values[keep]
  even = pictures.evenly(len(y), _CURVE_POINTS)
  return x[even], (pictures.smoothed(y) if name == "loss" else y)[even]


def _curves_on(axes: Any, shown: Sequence[Trial], lines: Mapping[int, tuple], shares: Mapping[int, float], name: str
               ) -> None:
  for trial in reversed(shown):
    if trial.number in lines:
      _trial_line(axes, trial, *lines[trial.number], shares, marker="o" if len(lines[trial.number][0]) < 12 else None)
  ends = [y[len(y) // 8:] for number, (_, y) in lines.items() if number in shares] or [y for _, y in lines.values()]
  low, high = min(y.min() for y in ends), max(np.quantile(y, 0.98) for y in ends)
  # A trial that diverges, and the first steps, would make the rest a flat line.
  axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)
  lengths = [x[-1] for x, _ in lines.values()]
  if max(lengths) > _FAR * min(lengths):
    axes.set_xscale("log")
  axes.xaxis.set_major_formatter(lambda value, _: large(value) if value >= 0 else "")
  axes.set(xlabel="tokens", ylabel=_plain(f"{name}, nats" if name.endswith("loss") else name))
  axes.tick_params(length=0)


def _trial_line(axes: Any, trial: Trial, x: Sequence[float], y: Sequence[float], shares: Mapping[int, float],
                marker: str | None = None, faint: float = 1.0) -> None:
  done = trial.number in shares
  line, = axes.plot(x, y, color=pictures.rank_color(shares[trial.number]) if done else pictures.INK,
                    linewidth=1.3 if done else 0.9, alpha=0.85 if done else 0.5 * faint, marker=marker, markersize=3,
                    linestyle="-" if done else (0, (4, 3)))
  line.set_gid(f"trial-{trial.number}")


def _rates_on(axes: Any, rate: str, field: str | None, groups: Mapping[Any, list[Trial]], metric: str, mode: str,
              drawn: bool) -> None:
  found = sorted({trial.row.settings[rate] for group in groups.values() for trial in group})
  for color, (value, group) in zip(pictures.SERIES * 2, groups.items()):
    for trial in group:
      point, = axes.plot([trial.row.settings[rate]], [trial.value], "o", color=color, markersize=4, alpha=0.5)
      point.set_gid(f"trial-{trial.number}")
    best = {}
    for at in sorted({trial.row.settings[rate] for trial in group}):
      best[at] = trials_lib.best_of([trial for trial in group if trial.row.settings[rate] == at], mode)[0]
    if not best:
      continue
    top = (min if mode == "min" else max)(best, key=best.get)
    label = f"{short(field)} = {trials_lib.words(value)}: {top:.3g}" if field else f"best at {top:.3g}"
    if not drawn:
      axes.plot(list(best), list(best.values()), color=color, linewidth=1.6)
    axes.plot([top], [best[top]], "*", color=color, markersize=11, label=_plain(label))
  _rate_axis(axes, None if drawn else found)
  axes.set(xlabel="learning rate", ylabel=_plain(metric))
  axes.tick_params(length=0, which="both")
  axes.legend(frameon=False, labelcolor=pictures.INK, fontsize=8, title="best at" if field else None, title_fontsize=8,
              loc="center left", bbox_to_anchor=(1.0, 0.5))


def _rate_axis(axes: Any, listed: Sequence[float] | None) -> None:
  """Makes the x axis logarithmic, with ticks at the rates themselves where they were listed."""
  from matplotlib import ticker
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.FixedLocator(listed[::-(-len(listed) // 6)]) if listed else
                               ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def _word(axes: Any, text: Any, x: float, y: float) -> None:
  """Writes beside a point, over lines, which the page's own colour keeps off."""
  axes.annotate(_plain(text), (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, zorder=5,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": pictures.PAGE, "edgecolor": "none", "alpha": 0.75})


def _positions(values: Sequence[Any], drawn: bool):
  """Returns a function from a value to its height, 0 to 1, and the (height, text) of ticks."""
  if all(map(is_number, values)):
    distinct = sorted(set(values))
    marks = distinct if len(distinct) <= _MOST_GROUPS and not drawn else _marks(distinct)
    place = lambda value: _NOT_SET if value is None else _share(value, distinct)
    return place, [(place(mark), trials_lib.words(mark)) for mark in marks]
  names = list(dict.fromkeys(map(str, values)))
  spread = lambda i: i / max(1, len(names) - 1)
  place = lambda value: spread(names.index(str(value))) if str(value) in names else _NOT_SET
  return place, [(spread(i), name[:24]) for i, name in enumerate(names)]


def _marks(values: Sequence[float]) -> list[float]:
  """Returns five numbers that divide a range evenly."""
  low, high = values[0], values[-1]
  if trials_lib.is_log(values):
    return np.geomspace(low, high, 5).tolist()
  return np.linspace(low, high, 5).tolist()


def _share(value: float, values: Sequence[float]) -> float:
  low, high = min(values), max(values)
  if low == high:
    return 0.5
  if trials_lib.is_log(values):
    return math.log(value / low) / math.log(high / low)
  return (value - low) / (high - low)


def _plain(text: Any) -> str:
  """Returns text that matplotlib does not take for a formula."""
  return str(text).replace("$", r"\$")
