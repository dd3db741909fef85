"""Draws a run as one HTML page that needs nothing else: no network, no other file.

It reads what the run has written (config.json, metrics.jsonl, result.json, samples.jsonl), so it works on any machine
and for a run that is still going. The pictures are SVG inside the page, and their colours follow the reader's light or
dark mode.
"""

import dataclasses
import html
import io
import itertools
import json
import math
import os
import re
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax import config as config_lib
from lmjax.config_checks import UserError, by_full_name
from lmjax.workdir import write_whole

# Points a curve is drawn with; more could not be told apart at this size.
_MAX_POINTS = 800
# matplotlib writes these colours, the page replaces them by CSS variables that differ in light and dark mode.
_INK, _GRID = "#010203", "#010204"
# The order of the first columns of evaluations, and the metric that is no set's own.
_FIRST, _AVERAGE = ("loss", "perplexity", "bits_per_byte", "accuracy"), "tasks/average"
# Curves without noise, which smoothing would only falsify.
_EXACT = ("Learning rate",)
# Metrics of tasks that share an axis.
_SHARES = ("f1", "f1_macro", "matthews", "spearman", "span_f1", "rougeL", "exact_match")
# Where the time of a run goes, as `metrics.Clock` divides it.
_TIMES = {"start": "start and compiling", "data": "waiting for data", "step": "steps", "evaluation": "evaluation",
          "saving": "saving checkpoints", "other": "stopped, done again, other"}
_SERIES = [f"#0102{10 + i:02x}" for i in range(6)]


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir says about its run.

  Attributes:
    name: name of the workdir.
    config: config.json, or {} where it is missing.
    curves: (steps, values) of each metric, ordered by step; NaN where a value was not finite.
    result: result.json, or {} for a run that has not finished.
    samples: lines of samples.jsonl.
  """
  name: str
  config: Mapping[str, Any]
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
  result: Mapping[str, Any]
  samples: Sequence[Mapping[str, Any]]

  def last(self, metric: str) -> float | None:
    """Returns the last value of a metric, or None where there is none or it is not finite."""
    if metric not in self.curves:
      return None
    value = float(self.curves[metric][1][-1])
    return value if math.isfinite(value) else None

  @property
  def eval_sets(self) -> list[str]:
    """Names of the sets that were evaluated on, in the order they appear."""
    return [name.removesuffix("/loss") for name in self.curves if name.endswith("/loss")]

  @property
  def last_step(self) -> int:
    return max(int(steps[-1]) for steps, _ in self.curves.values())


def write_report(workdir: epath.PathLike) -> epath.Path:
  """Writes report.html into a run's workdir.

  Args:
    workdir: folder or object-store URL of a run.

  Returns:
    The path of the page.

  Raises:
    UserError: where there is no run or nothing has been logged yet.
  """
  run = read_run(workdir)
  path = epath.Path(workdir) / "report.html"
  write_whole(path, page(run))
  return path


def read_run(workdir: epath.PathLike) -> Run:
  """Reads the records of a run; see `write_report`."""
  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise UserError(f"There is no folder {workdir}; give the --workdir of a run.")
  if not (workdir / "metrics.jsonl").exists():
    raise UserError(f"{workdir} has no metrics.jsonl, so it is not the workdir of a run; give one that is.")
  curves = _curves(_json_lines(workdir / "metrics.jsonl"))
  if not curves:
    raise UserError(f"{workdir}/metrics.jsonl holds no metrics yet; wait until the run has logged its first step.")
  samples = workdir / "samples.jsonl"
  return Run(
      name=workdir.name or os.fspath(workdir), config=_json(workdir / "config.json"), curves=curves,
      result=_json(workdir / "result.json"), samples=_json_lines(samples) if samples.exists() else [])


def page(run: Run) -> str:
  """Returns the page as HTML."""
  title = html.escape(run.name)
  sections = [
      f"<h1>{title}</h1>", _headline(run), _evaluations(run), _time(run), _processes(run),
      f'<div class="charts">{"".join(_charts(run))}</div>',
      _samples(run), _config(run), _result(run)]
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
          f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
          f"<style>{_CSS}</style></head>\n<body><main>\n" + "\n".join(s for s in sections if s)
          + "\n</main></body></html>\n")


def _json(path: epath.Path) -> Mapping[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as e:
    raise UserError(f"{path} is not JSON ({e}); the report needs the file as the run wrote it.") from e


def _json_lines(path: epath.Path) -> list[Mapping[str, Any]]:
  records = []
  for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
    if not line.endswith("\n"):
      break  # The run is writing it now, or was killed while it did.
    try:
      record = json.loads(line)
      record["step"] = int(record["step"])
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f"{path}, line {number}, is not a JSON object with a step; mend or remove that line.") from e
    records.append(record)
  return records


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  points: dict[str, dict[int, float]] = {}
  for record in records:
    for name, value in record.items():
      if name != "step":
        # Of a step that was logged twice the later line counts.
        points.setdefault(name, {})[record["step"]] = math.nan if value is None else float(value)
  return {name: (np.array(sorted(of)), np.array([of[step] for step in sorted(of)])) for name, of in points.items()}


# Words and tables.


def _headline(run: Run) -> str:
  def final(key: str, metric: str) -> float | None:
    return run.result[key] if key in run.result else run.last(metric)

  first_set = run.eval_sets[0] if run.eval_sets else ""
  tiles = [
      ("status", _status(run)),
      ("training loss", _number(final("train_loss", "loss"))),
      ("evaluation loss", _number(final("eval_loss", f"{first_set}/loss"))),
      ("bits per byte", _number(final("bits_per_byte", f"{first_set}/bits_per_byte"))),
      ("parameters", _large(final("num_params", "num_params"))),
      ("tokens seen", _large(final("num_tokens", "num_tokens"))),
      ("training FLOPs", _power(final("train_flops", "train_flops"))),
      ("tokens a second", _whole(final("tokens_per_second", "tokens_per_second"))),
      ("MFU", _percent(final("mfu", "mfu"))),
  ]
  cells = "".join(f"<div><dt>{label}</dt><dd>{html.escape(value)}</dd></div>" for label, value in tiles)
  return f'<dl class="tiles">{cells}</dl>'


def _status(run: Run) -> str:
  if "status" in run.result:
    return str(run.result["status"])
  num_steps = run.config["train"]["num_steps"] if "train" in run.config else None
  return f"step {run.last_step:,}" + (f" of {num_steps:,}" if num_steps else "") + ", no result yet"


def _evaluations(run: Run) -> str:
  if not run.eval_sets:
    return ""
  names = _metrics(run)
  head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
  rows = [f"<tr><th>{html.escape(s)}</th>" + "".join(f"<td>{_number(run.last(f'{s}/{n}'))}</td>" for n in names)
          + "</tr>" for s in run.eval_sets]
  average = run.last(_AVERAGE)
  if average is not None:
    rows.append(f'<tr><th>average of tasks</th><td colspan="{len(names)}">{_number(average)}</td></tr>')
  return (f'<h2>Last evaluation</h2><div class="scroll"><table><tr><th>set</th>{head}</tr>{"".join(rows)}</table>'
          "</div>")


def _time(run: Run) -> str:
  """Returns where the time went since the run was first started, as a bar and a table."""
  found = {kind: run.result.get(f"seconds_{kind}", run.last(f"seconds_{kind}")) for kind in _TIMES}
  total = sum(found.values()) if None not in found.values() else 0.0
  if not total:
    return ""
  bar = "".join(f'<span style="flex: {seconds / total:.4f}; background: var(--series-{i})" '
                f'title="{_TIMES[kind]}"></span>' for i, (kind, seconds) in enumerate(found.items()))
  rows = "".join(f'<tr><th><span class="key" style="background: var(--series-{i})"></span>{_TIMES[kind]}</th>'
                 f"<td>{seconds:,.1f} s</td><td>{_percent(seconds / total)}</td></tr>"
                 for i, (kind, seconds) in enumerate(found.items()))
  return (f'<h2>Where the time went</h2><div class="bar">{bar}</div><div class="scroll"><table>{rows}'
          f"<tr><th>since the first start</th><td>{total:,.1f} s</td><td></td></tr></table></div>")


def _processes(run: Run) -> str:
  """Returns which processes were longest away from their devices, of a run that had several."""
  if "slowest_process" not in run.curves:
    return ""
  slowest, seconds = run.curves["slowest_process"][1], run.curves["slowest_host_seconds"][1]
  rows = "".join(f"<tr><th>process {int(process)}</th><td>{np.mean(slowest == process):.0%}</td>"
                 f"<td>{np.mean(seconds[slowest == process]):.3g} s</td></tr>" for process in np.unique(slowest))
  median = np.mean(run.curves["median_host_seconds"][1])
  return ('<h2>Processes that kept their devices waiting longest</h2><div class="scroll"><table><tr><th></th>'
          f"<th>was the one</th><th>of each step then</th></tr>{rows}"
          f"<tr><th>median of all</th><td></td><td>{median:.3g} s</td></tr></table></div>")


def _metrics(run: Run) -> list[str]:
  """Returns the metrics that any set has, in the order they appear; those of a language model's text come first."""
  found = [name.removeprefix(f"{s}/") for s in run.eval_sets for name in run.curves
           if name.startswith(f"{s}/") and "/" not in name.removeprefix(f"{s}/")]
  return [*dict.fromkeys([name for name in _FIRST if name in found] + found)]


def _samples(run: Run) -> str:
  if not run.samples:
    return ""
  blocks = [f"<h3>step {s['step']:,}</h3><pre><b>{html.escape(s['prompt'])}</b>{html.escape(s['text'])}</pre>"
            for s in reversed(run.samples[-5:])]
  return "<h2>Samples</h2>" + "".join(blocks)


def _config(run: Run) -> str:
  if not run.config:
    return ""
  defaults = by_full_name(json.loads(config_lib.to_json(config_lib.Config())))
  rows, changed = [], 0
  for name, value in by_full_name(run.config).items():
    differs = name not in defaults or value != defaults[name]
    changed += differs
    note = f" <i>default {html.escape(json.dumps(defaults[name]))}</i>" if differs and name in defaults else ""
    rows.append(f'<tr{" class=changed" if differs else ""}><th>{html.escape(name)}</th>'
                f"<td>{html.escape(json.dumps(value))}{note}</td></tr>")
  return (f"<details><summary>Config: {changed} of {len(rows)} settings differ from their defaults</summary>"
          f'<div class="scroll"><table class="left">{"".join(rows)}</table></div></details>')


def _result(run: Run) -> str:
  if not run.result:
    return ""
  rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value if isinstance(value, str) else json.dumps(value))}"
          "</td></tr>" for name, value in by_full_name(run.result).items()]
  return ('<details><summary>Result</summary><div class="scroll"><table class="left">'
          f'{"".join(rows)}</table></div></details>')


def _number(value: float | None) -> str:
  return "–" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"


def _percent(value: float | None) -> str:
  return "unknown" if value is None else f"{value:.1%}"


def _whole(value: float | None) -> str:
  return "–" if value is None else f"{value:,.0f}"


def _power(value: float | None) -> str:
  return "–" if value is None else f"{value:.2e}".replace("e+", "e")


def _large(value: float | None) -> str:
  """Writes 12345678 as 12.3 M."""
  if value is None:
    return "–"
  for exponent, letter in ((0, ""), (3, " K"), (6, " M"), (9, " B")):
    if value < 999.5 * 10 ** exponent:
      return f"{value / 10 ** exponent:.3g}{letter}"
  return f"{value / 1e12:.3g} T"


# Pictures.


def _charts(run: Run) -> list[str]:
  """Returns the figures whose metrics the run has."""
  charts = [("Loss", _loss_series(run, None), "step", "", "linear")]
  for metric, label in (("num_tokens", "tokens"), ("train_flops", "training FLOPs")):
    if metric in run.curves:
      charts.append((f"Loss against {label}", _loss_series(run, metric), label, "log", "linear"))
  shares = [(name, *run.curves[name], True) for name in (f"{s}/{metric}" for s in run.eval_sets for metric in _SHARES)
            if name in run.curves]
  if shares:
    charts.append(("Metrics of tasks", shares, "step", "", "linear"))
  for metric, title, scale in (("learning_rate", "Learning rate", "linear"), ("grad_norm", "Gradient norm", "log"),
                               ("tokens_per_second", "Tokens a second", "linear"), ("mfu", "MFU", "linear")):
    if metric in run.curves:
      charts.append((title, [(title, *run.curves[metric], False)], "step", "", scale))
  drawn = []
  for title, series, x_label, x_scale, y_scale in charts:
    series = [s for s in map(_finite, series) if len(s[1])]
    if series:
      drawn.append(f"<figure><figcaption>{title}</figcaption>"
                   f"{_draw(title, series, x_label, x_scale or 'linear', y_scale)}</figure>")
  return drawn


def _loss_series(run: Run, against: str | None) -> list[tuple[str, np.ndarray, np.ndarray, bool]]:
  """Returns (label, x, y, whether to mark the points) of the training loss and of each evaluation."""
  series = [("training", *run.curves["loss"], False)] if "loss" in run.curves else []
  series += [(name, *run.curves[f"{name}/loss"], True) for name in run.eval_sets]
  if against is None:
    return series
  # Evaluations carry only their step; both quantities grow by the same amount each step.
  return [(label, np.interp(steps, *run.curves[against]), values, marked) for label, steps, values, marked in series]


def _finite(series: tuple[str, np.ndarray, np.ndarray, bool]) -> tuple[str, np.ndarray, np.ndarray, bool]:
  label, x, y, marked = series
  keep = np.isfinite(x) & np.isfinite(y)
  return label, x[keep], y[keep], marked


def _draw(title: str, series: Sequence[tuple[str, np.ndarray, np.ndarray, bool]], x_label: str, x_scale: str,
          y_scale: str) -> str:
  """Returns one picture as an SVG element."""
  import matplotlib
  from matplotlib import ticker
  from matplotlib.figure import Figure
  style = {"svg.fonttype": "none", "svg.hashsalt": title, "text.color": _INK, "axes.edgecolor": _GRID,
           "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "font.size": 10,
           "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
           "grid.linewidth": 0.8, "axes.axisbelow": True}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for color, (label, x, y, marked) in zip(itertools.cycle(_SERIES), series):
      _curve(axes, label, x, y, marked, color)
    axes.set_xlabel(x_label)
    positive = {"x": all((x > 0).all() for _, x, _, _ in series), "y": all((y > 0).all() for _, _, y, _ in series)}
    axes.set_xscale(x_scale if positive["x"] else "linear")
    if y_scale == "log" and positive["y"]:
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
      axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(length=0, which="both")
    if len(series) > 1:
      axes.legend(frameon=False, labelcolor=_INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  return _inline(buffer.getvalue(), title)


def _curve(axes, label: str, x: np.ndarray, y: np.ndarray, marked: bool, color: str) -> None:
  if marked or len(x) < 30:
    axes.plot(x, y, color=color, label=label, linewidth=1.8, marker="o", markersize=4)
    return
  if label in _EXACT:
    axes.plot(x, y, color=color, label=label, linewidth=1.8)
    return
  kept = _thinned(y)
  axes.plot(x[kept], y[kept], color=color, linewidth=0.8, alpha=0.3)
  smooth = _smoothed(y)
  even = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).astype(int))
  axes.plot(x[even], smooth[even], color=color, label=label, linewidth=1.8)


def _thinned(y: np.ndarray) -> np.ndarray:
  """Returns the indices of the lowest and highest value of each stretch, so that no spike is lost."""
  if len(y) <= _MAX_POINTS:
    return np.arange(len(y))
  stretches = np.array_split(np.arange(len(y)), _MAX_POINTS // 2)
  return np.unique([stretch[pick(y[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)])


def _smoothed(y: np.ndarray) -> np.ndarray:
  """Returns the mean over about a fiftieth of the curve around each point, less near its start, where it falls fast."""
  index = np.arange(len(y))
  half = np.minimum(len(y) // 100, index // 4)
  low, high = index - half, np.minimum(index + half, len(y) - 1) + 1
  sums = np.concatenate([[0.0], np.cumsum(y)])
  return (sums[high] - sums[low]) / (high - low)


def _inline(svg: str, title: str) -> str:
  """Makes matplotlib's file an element of the page: its size and colours are the page's, its ids nobody else's."""
  svg = svg[svg.index("<svg"):]
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  used = set(re.findall(r"#([\w.-]+)", svg))
  svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
  svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
  for i, color in enumerate(_SERIES):
    svg = svg.replace(color, f"var(--series-{i})")
  return svg


_CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2126; --soft: #667079; --line: #dfe3e7; --tile: #f5f6f8;
  --series-0: #2166ac; --series-1: #d6604d; --series-2: #1b7837; --series-3: #8e5ea2; --series-4: #b8860b;
  --series-5: #35978f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --soft: #98a2ab; --line: #343a40;
  --tile: #1e2226; --series-0: #6db3f2; --series-1: #ff8f7a; --series-2: #6fcf7f; --series-3: #c99be0;
  --series-4: #e6c15c; --series-5: #6fd3c8; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; }
h3 { font-size: .85rem; font-weight: normal; color: var(--soft); margin: .8rem 0 .2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .6rem; margin: 0; }
.tiles div { background: var(--tile); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1rem;
  margin-top: 1.8rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; font-weight: normal; border-bottom: 1px solid var(--line); }
th:first-child, .left td { text-align: left; } th { color: var(--soft); }
.bar { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; margin-bottom: .5rem; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .5rem; }
.changed th, .changed td { font-weight: 600; color: var(--ink); }
.changed i { font-weight: normal; color: var(--soft); margin-left: .6rem; }
pre { background: var(--tile); border-radius: 8px; padding: .8rem; margin: 0; overflow-x: auto; font-size: .85rem; }
details { margin-top: 1.2rem; } summary { cursor: pointer; font-weight: 600; }
"""
