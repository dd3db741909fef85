"""Pictures in a page: drawn by matplotlib, then SVG whose size and colours are the page's.

What has the gid `trial-N` becomes an element with `data-trial="N"`, by which the page's script finds it.
"""

import html
import io
import itertools
import re
from typing import Any, Callable, Sequence

import numpy as np

# Points a curve is drawn with; more could not be told apart at this size.
_MAX_POINTS = 800
# matplotlib writes these colours, the page replaces them by CSS variables that differ in light and dark mode.
INK, _GRID, PAGE = "#010203", "#010204", "#010205"
SERIES = [f"#0102{10 + i:02x}" for i in range(6)]
# Those of `lmjax.scaling.plots`, which are the first series' on a light page.
_LIGHT = ("#2166ac", "#d6604d", "#1b7837", "#8e5ea2", "#b8860b", "#35978f")
_RANK = "#0103"
# Curves without noise, which smoothing would only falsify.
_EXACT = ("Learning rate",)

Series = tuple[str, np.ndarray, np.ndarray, bool]


def rank_color(share: float) -> str:
  """Returns the colour of a place in an order, 0 for the best and 1 for the worst."""
  return f"{_RANK}{round(255 * min(max(share, 0.0), 1.0)):02x}"


def picture(title: str, draw: Callable[[Any], None], size: tuple[float, float] = (6, 3.4)) -> str:
  """Returns one picture as an SVG element.

  Args:
    title: of the picture, which readers of screens read out.
    draw: draws on the axes that it is given.
    size: in inches, of which only the ratio is kept.
  """
  import matplotlib
  from matplotlib.figure import Figure
  style = {"svg.fonttype": "none", "svg.hashsalt": title, "text.color": INK, "axes.edgecolor": _GRID,
           "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 10,
           "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
           "grid.linewidth": 0.8, "axes.axisbelow": True}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  return _inline(buffer.getvalue(), title)


def draw(title: str, series: Sequence[Series], x_label: str, x_scale: str, y_scale: str) -> str:
  """Returns a picture of curves.

  Args:
    title: of the picture.
    series: (label, x, y, whether to mark the points) of each curve.
    x_label: what x is, with its unit.
    x_scale: linear or log; the latter where all is above 0.
    y_scale: as `x_scale`.
  """
  def on(axes):
    for color, (label, x, y, marked) in zip(itertools.cycle(SERIES), series):
      _curve(axes, label, x, y, marked, color)
    axes.set_xlabel(x_label)
    positive = {"x": all((x > 0).all() for _, x, _, _ in series), "y": all((y > 0).all() for _, _, y, _ in series)}
    axes.set_xscale(x_scale if positive["x"] else "linear")
    if y_scale == "log" and positive["y"]:
      log_ticks(axes.yaxis)
    axes.tick_params(length=0, which="both")
    if len(series) > 1:
      axes.legend(frameon=False, labelcolor=INK)
  return picture(title, on)


def log_ticks(axis: Any) -> None:
  """Makes an axis logarithmic, with ticks at 1, 2 and 5 times powers of ten."""
  from matplotlib import ticker
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
  axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axis.set_minor_locator(ticker.NullLocator())


def thinned(y: np.ndarray, most: int = _MAX_POINTS) -> np.ndarray:
  """Returns the indices of the lowest and highest value of each stretch, so that no spike is lost."""
  if len(y) <= most:
    return np.arange(len(y))
  stretches = np.array_split(np.arange(len(y)), most // 2)
  return np.unique([stretch[pick(y[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)])


def smoothed(y: np.ndarray) -> np.ndarray:
  """Returns the mean over about a fiftieth of the curve around each point, less near its start, where it falls fast."""
  index = np.arange(len(y))
  half = np.minimum(len(y) // 100, index // 4)
  low, high = index - half, np.minimum(index + half, len(y) - 1) + 1
  sums = np.concatenate([[0.0], np.cumsum(y)])
  return (sums[high] - sums[low]) / (high - low)


def evenly(count: int, most: int = _MAX_POINTS) -> np.ndarray:
  """Returns the indices of at most so many points, evenly spread, the first and the last among them."""
  return np.unique(np.linspace(0, count - 1, most).astype(int))


def _curve(axes: Any, label: str, x: np.ndarray, y: np.ndarray, marked: bool, color: str) -> None:
  if marked or len(x) < 30:
    axes.plot(x, y, color=color, label=label, linewidth=1.8, marker="o", markersize=4)
    return
  if label in _EXACT:
    axes.plot(x, y, color=color, label=label, linewidth=1.8)
    return
  kept = thinned(y)
  axes.plot(x[kept], y[kept], color=color, linewidth=0.8, alpha=0.3)
  smooth, even = smoothed(y), evenly(len(x))
  axes.plot(x[even], smooth[even], color=color, label=label, linewidth=1.8)


def _inline(svg: str, title: str) -> str:
  """Makes matplotlib's file an element of the page: its size and colours are the page's, its ids nobody else's."""
  svg = svg[svg.index("<svg"):]
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
  label = html.escape(title)
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', lambda m: f'{m[1]} role="img" aria-label="{label}"', svg, count=1)
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r' id="trial-(\d+)"', r' data-trial="\1"', svg)
  used = set(re.findall(r"#([\w.-]+)", svg))
  svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
  svg = svg.replace(INK, "currentColor").replace(_GRID, "var(--line)").replace(PAGE, "var(--page)")
  for i, colors in enumerate(zip(SERIES, _LIGHT)):
    for color in colors:
      svg = svg.replace(color, f"var(--series-{i})")
  svg = re.sub(_RANK + "([0-9a-f]{2})", lambda m: f"color-mix(in oklab, var(--worst) {int(m[1], 16) / 2.55:.0f}%, "
               "var(--best))", svg)
  # Colours that a picture took from elsewhere: towards the ink, so that none is lost in the dark.
  return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: f"color-mix(in oklab, {m[0]} 75%, currentColor)", svg)
