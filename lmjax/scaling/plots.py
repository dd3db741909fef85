"""Pictures of what scaling tools measure.

Fits: `loss_against_compute`, `isoflop` and `residuals` draw arrays on axes that they are given and style nothing but
their own marks; `fit_figure` puts what `lmjax fit` has found side by side. Parametrizations: `coordinates` and
`transfer` return the bytes of a PNG file.
"""

import io
from typing import Any, Mapping, Sequence

import numpy as np

from lmjax.config_checks import UserError
from lmjax.scaling.curves import Curve
from lmjax.scaling.minima import parabolas

_LAW, _RUN, _HELD_OUT = "#d6604d", "#2166ac", "#1b7837"
# matplotlib's style, and as many colours and markers as keep twenty lines apart.
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
          "axes.axisbelow": True, "font.size": 9}
_MARKERS = "os^Dv<>Pp*"
_NAMED = 8  # Colours that a legend has room for.


def loss_against_compute(axes: Any, flops: np.ndarray, loss: np.ndarray, *, law: Mapping[str, Sequence] | None = None,
                         held_out: Sequence[Mapping[str, Any]] = (), curves: Sequence[Curve] = ()) -> None:
  """Draws runs, the law at the best size for each compute, and runs that the law has not seen with their intervals.

  Args:
    axes: to draw on.
    flops: of the runs that were fitted.
    loss: of these.
    law: `flops`, `loss`, `low` and `high` of the law; None draws none.
    held_out: rows with `flops`, `loss`, `predicted` and `interval`.
    curves: of runs while they trained, of one kind.
  """
  for i, one in enumerate(curves):
    axes.plot(one.flops, one.loss, color=_RUN, alpha=0.25, linewidth=0.8,
              label=None if i else "evaluated on the way" if one.evaluated else "training loss")
  axes.plot(flops, loss, "o", color=_RUN, markersize=4, label="fitted runs")
  if law is not None:
    axes.plot(law["flops"], law["loss"], color=_LAW, linewidth=1.6, label="law at the best size")
    axes.fill_between(law["flops"], law["low"], law["high"], color=_LAW, alpha=0.15, linewidth=0)
  for i, row in enumerate(held_out):
    low, high = row["interval"] or [row["predicted"]] * 2
    axes.errorbar([row["flops"]], [row["predicted"]], [[row["predicted"] - low], [high - row["predicted"]]],
                  fmt="_", color=_LAW, capsize=4, markersize=10, label="foretold, 95%" if not i else None)
    axes.plot([row["flops"]], [row["loss"]], "*", color=_HELD_OUT, markersize=10,
              label="held out" if not i else None)
  # The ends of runs are what it is about: curves begin far above and far to the left of them.
  ends = lambda name, own: np.array([*own, *(row[name] for row in held_out)])
  bounds = [loss.min(), *(min([row["loss"], row["predicted"], *(row["interval"] or [])]) for row in held_out)]
  axes.set_xlim(0.5 * flops.min(), 1.5 * ends("flops", flops).max())
  axes.set_ylim(0.97 * min(bounds), 1.05 * ends("loss", loss).max())
  _log_log(axes, "training FLOPs", "loss")
  axes.legend(frameon=False)


def isoflop(axes: Any, flops: np.ndarray, varied: np.ndarray, loss: np.ndarray,
            minima: Sequence[Mapping[str, Any]] = (), what: str = "size") -> None:
  """Draws loss against size, or whatever was varied, with a parabola for each compute and its lowest point.

  Args:
    axes: to draw on.
    flops: of the runs; those within 10% share a colour and a parabola, and where they have not three different values
      of what was varied, they are left out.
    varied: of the runs, such as their sizes.
    loss: of the runs.
    minima: rows with `what` and `loss`, the lowest points; a None among them is left out.
    what: was varied.
  """
  import matplotlib
  each = parabolas(flops, varied)
  colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(each)))
  for i, (rows, color) in enumerate(zip(each, colors)):
    x, y = np.log(varied[rows]), loss[rows]
    named = i % -(-len(each) // _NAMED) == 0
    axes.plot(varied[rows], y, "o", color=color, markersize=4,
              label=f"{np.exp(np.log(flops[rows]).mean()):.1e}" if named else None)
    fine, fitted = np.linspace(x.min(), x.max(), 50), np.polyfit(x - x.mean(), y, 2)
    if fitted[0] > 0:
      axes.plot(np.exp(fine), np.polyval(fitted, fine - x.mean()), color=color, linewidth=1.2)
  known = [row for row in minima if row[what] is not None]
  axes.plot([row[what] for row in known], [row["loss"] for row in known], "x--", color=_LAW, linewidth=1.0,
            markersize=7)
  _log_log(axes, {"size": "parameters", "tokens": "tokens"}.get(what, what), "loss")
  axes.legend(frameon=False, title="FLOPs", fontsize="small")


def residuals(axes: Any, flops: np.ndarray, residual: np.ndarray, noise: float,
              held_out: Sequence[Mapping[str, Any]] = ()) -> None:
  """Draws how far each run lies from the law, in percent of loss, and the noise's standard deviation.

  Args:
    axes: to draw on.
    flops: of the runs.
    residual: log loss less the law's.
    noise: standard deviation of log loss about the law.
    held_out: as in `loss_against_compute`.
  """
  axes.axhline(0.0, color=_LAW, linewidth=1.2)
  axes.axhspan(-200 * noise, 200 * noise, color=_LAW, alpha=0.12, linewidth=0, label="two standard deviations")
  axes.plot(flops, 100 * np.asarray(residual), "o", color=_RUN, markersize=4)
  if held_out:
    axes.plot([row["flops"] for row in held_out],
              [100 * np.log(row["loss"] / row["predicted"]) for row in held_out], "*", color=_HELD_OUT, markersize=10)
  _log_x(axes, "training FLOPs")
  axes.set_ylabel("loss above the law, %")
  axes.legend(frameon=False)


def fit_figure(told: Mapping[str, Any], curves: Sequence[Curve] = ()) -> Any:
  """Returns a matplotlib Figure of what `lmjax fit` has found.

  Args:
    told: by `analysis.analyse`, with `curve` in it.
    curves: as in `loss_against_compute`.
  """
  rows, held_out = told["residuals"], told["held_out"]
  column = lambda name: np.array([row[name] for row in rows])
  found = told["isoflop"]
  figure, (row,) = _figure(1, 3 if found else 2, (14 if found else 10, 4.2), share=False)
  panels = iter(row)
  loss_against_compute(next(panels), column("flops"), column("loss"), law=told["curve"], held_out=held_out,
                       curves=curves)
  if found:
    isoflop(next(panels), column("flops"), column("size"), column("loss"), found["groups"])
  residuals(next(panels), column("flops"), column("residual"), told["noise"], held_out)
  return figure


def write(figure: Any, path: str) -> None:
  """Writes a figure to a file, whose ending says the kind: .png, .svg or .pdf.

  Raises:
    UserError: where it cannot be written, or the ending is none that matplotlib knows.
  """
  try:
    figure.savefig(path, dpi=110)
  except (OSError, ValueError) as e:
    raise UserError(f"The picture {path} cannot be written ({getattr(e, 'strerror', None) or e}); give a file that "
                    "ends in .png, .svg or .pdf in a folder that exists.") from e


def coordinates(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> bytes:
  """Draws changes of activations against size.

  Args:
    rows: of pictures, (what the size is, found by the name of the parametrization); found has `sizes` and, under
      `activations`, what `coordinate_check.summarize` returns.
  """
  columns = max(len(found) for _, found in rows)
  figure, panels = _figure(len(rows), columns, (4.2 * columns + 2.2, 3.6 * len(rows)))
  for row, (what, found) in zip(panels, rows):
    for axes, (kind, one) in zip(row, found.items()):
      for number, (name, values) in enumerate(sorted(one["activations"].items())):
        axes.plot(one["sizes"], [by_step[-1] for by_step in values["change"]], label=name, **_look(number, 20))
      _log_sizes(axes, one["sizes"], what)
      axes.set_yscale("log")
      axes.set_title(kind)
    row[0].set_ylabel("change since the start, root mean square")
    for axes in row[len(found):]:
      axes.set_axis_off()
    row[len(found) - 1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
  return _png(figure)


def transfer(panels: Sequence[tuple[str, str, Mapping[int, tuple[Sequence[float], Sequence[float]]]]]) -> bytes:
  """Draws the loss against the learning rate, a curve a size, with the best of each marked.

  Args:
    panels: (title, what the size is, (learning rates, losses) by size) of each picture; a loss that is not finite is
      left out.
  """
  figure, (row,) = _figure(1, len(panels), (4.0 * len(panels) + 0.4, 3.6))
  for axes, (title, what, curves) in zip(row, panels):
    for number, (size, (rates, losses)) in enumerate(sorted(curves.items())):
      look = _look(number, 10)
      axes.plot(rates, losses, label=f"{what} {size}", **look)
      best = min(zip(losses, rates), key=lambda point: point if point[0] == point[0] else (float("inf"), 0))
      axes.plot([best[1]], [best[0]], marker="o", markersize=11, fillstyle="none", color=look["color"])
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
  row[0].set_ylabel("loss")
  return _png(figure)


def _log_log(axes: Any, x: str, y: str) -> None:
  from matplotlib import ticker
  _log_x(axes, x)
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=np.arange(1, 10, 0.5)))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_ylabel(y)


def _log_x(axes: Any, x: str) -> None:
  """Makes the axis logarithmic, once all is drawn, with as many numbers as fit side by side."""
  from matplotlib import ticker
  axes.set_xscale("log")
  low, high = axes.get_xlim()
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e")))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set_xlabel(x)


def _figure(rows: int, columns: int, size: tuple[float, float], share: bool = True) -> tuple[Any, Any]:
  import matplotlib
  from matplotlib.figure import Figure
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row" if share else "none")


def _look(number: int, colors: int) -> dict[str, Any]:
  import matplotlib
  return {"color": matplotlib.colormaps[f"tab{colors}"](number % colors), "marker": _MARKERS[number % len(_MARKERS)],
          "markersize": 4, "linewidth": 1.3}


def _log_sizes(axes: Any, sizes: Sequence[int], what: str) -> None:
  from matplotlib import ticker
  axes.set_xscale("log", base=2)
  axes.set_xticks(sizes, [str(size) for size in sizes])
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel(what)


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
  return buffer.getvalue()
