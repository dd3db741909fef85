"""Pictures of what scaling tools measure, as the bytes of a PNG file."""

import io
from typing import Any, Mapping, Sequence

# matplotlib's style, and as many colours and markers as keep twenty lines apart.
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
          "axes.axisbelow": True, "font.size": 9}
_MARKERS = "os^Dv<>Pp*"


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


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
  import matplotlib
  from matplotlib.figure import Figure
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row")


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
