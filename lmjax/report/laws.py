"""What a sweep's report says of scaling: IsoFLOP curves, the law, and what the next size would reach."""

import html
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax.config_checks import UserError
from lmjax.report import pictures
from lmjax.report import trials as trials_lib
from lmjax.report.page import figure, large, power
from lmjax.report.trials import Trial

# The next size is that much more compute than the largest run had.
_NEXT = 8.0
_RESAMPLES = 300


def sections(workdir: epath.Path, trials: Sequence[Trial], mode: str) -> list[str]:
  """Returns IsoFLOP curves and the law, or the sentences that say why the runs do not give them.

  Args:
    workdir: of the sweep.
    trials: of it.
    mode: by which the best of several settings is taken.
  """
  try:
    runs, count = _runs(workdir, trials, mode)
  except UserError as e:
    return ["<h2>Scaling law</h2>", _reasons([str(e)])]
  return [*_isoflop(runs), *_law(runs, count)]


def _runs(workdir: epath.Path, trials: Sequence[Trial], mode: str) -> tuple[Any, Any]:
  """Returns the finished runs of the best settings of each size and number of tokens, and how FLOPs are counted."""
  from lmjax.scaling import runs as runs_lib
  table = runs_lib.read_table(str(workdir))
  runs, count = runs_lib.select(table, runs_lib.Columns(size="num_params", loss="eval_loss", tokens="num_tokens"))
  by_folder = {trial.folder.name: trial for trial in trials}
  groups: dict[tuple, list[int]] = {}
  for i, (size, tokens) in enumerate(zip(runs.points.size, runs.points.tokens)):
    groups.setdefault((size, round(float(np.log(tokens)), 2)), []).append(i)
  kept = np.zeros(len(runs.loss), bool)
  for rows in groups.values():
    of = {i: by_folder[name] for i in rows if (name := runs.names[i].rpartition("/")[2]) in by_folder}
    best = trials_lib.best_of(list(of.values()), mode)
    numbers = {trial.number for trial in best[1]} if best else set()
    kept[[i for i, trial in of.items() if trial.number in numbers]] = True
  if not kept.any():
    raise UserError("No run of the sweep has both a finished result and a value of the metric.")
  return runs.keep(kept), count


def _isoflop(runs: Any) -> list[str]:
  from matplotlib import ticker

  from lmjax.scaling import analysis, plots
  found = analysis.isoflop(runs)
  if found is None:
    return []
  title = "IsoFLOP curves"

  def on(axes):
    plots.isoflop(axes, runs.points.flops, runs.points.size, runs.loss, found["groups"])
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: large(value))
    axes.set_ylabel("loss, nats")
  law = found["size"]
  note = ("Runs of equal compute, C = 6 N D, with parabolas in log N; crosses are their lowest points, which grow as "
          f"N = {law['coefficient']:.3g} C^{law['exponent']:.3f}{_interval(law['exponent_interval'])}.")
  return ["<h2>Best size for a compute</h2>",
          f'<div class="charts">{figure(title, pictures.picture(title, on, (6, 4.2)), note)}</div>']


def _law(runs: Any, count: Any) -> list[str]:
  from lmjax.scaling import analysis, plots, warn
  head = ["<h2>Scaling law</h2>"]
  open_ways = warn.design(runs.points)
  if open_ways:
    return [*head, _reasons(open_ways)]
  largest = float(runs.points.flops.max())
  try:
    told = analysis.analyse(runs, count, analysis.Settings(
        num_resamples=_RESAMPLES, predict=((_NEXT * largest,),), curve=True))
  except UserError as e:
    return [*head, _reasons([str(e)])]
  ahead, title = told["predictions"][0], "Loss against compute"
  if ahead["interval"] is None:
    return [*head, _reasons(told["warnings"])]

  def on(axes):
    plots.loss_against_compute(axes, runs.points.flops, runs.loss, law=told["curve"])
    low, high = ahead["interval"]
    axes.errorbar([ahead["flops"]], [ahead["loss"]], [[ahead["loss"] - low], [high - ahead["loss"]]], fmt="D",
                  color=pictures.SERIES[2], capsize=4, markersize=5, label=f"{_NEXT:g} times the compute, 95%")
    axes.set_ylabel("loss, nats")
    axes.legend(frameon=False)
  words = (f"<p>A run of {_NEXT:g} times the largest compute, {power(ahead['flops'])} FLOPs, is best at "
           f"{large(ahead['size'])} parameters and {large(ahead['tokens'])} tokens, and foretold to reach a loss of "
           f"<b>{ahead['loss']:.4f}</b> ({ahead['interval'][0]:.4f} to {ahead['interval'][1]:.4f}).</p>")
  warnings = "".join(f"<li>{html.escape(text)}</li>" for text in told["warnings"])
  return [*head, f'<div class="charts">{figure(title, pictures.picture(title, on), html.escape(told["formula"]))}'
          f"<div>{_params(told)}{words}</div></div>", f'<ul class="warnings">{warnings}</ul>' if warnings else ""]


def _params(told: Mapping[str, Any]) -> str:
  intervals, best = told["intervals"], told["compute_optimal"] or {"intervals": {}}
  rows = [(name, told[name], intervals[name]) for name in intervals]
  rows += [(f"{name}, of {what} = k C^{name}", best[name], best["intervals"][name])
           for name, what in (("a", "N"), ("b", "D")) if name in best["intervals"]]
  cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{value:.4g}</td><td>"
                  f"{'open' if found is None else '{:.4g} to {:.4g}'.format(*found)}</td></tr>"
                  for name, value, found in rows)
  return ('<div class="scroll"><table><tr><th></th><th>fitted</th><th>95% interval</th></tr>'
          f"{cells}</table></div><p>By {told['num_runs']} runs, the best of each size and number of tokens; noise "
          f"{told['noise']:.2%} of the loss. N counts all parameters, and C = 6 N D.</p>")


def _interval(found: Sequence[float] | None) -> str:
  return f" (exponent {found[0]:.3f} to {found[1]:.3f})" if found else ""


def _reasons(sentences: Sequence[str]) -> str:
  return ('<p class="warnings">No law can be fitted to these runs.</p><ul class="warnings">'
          + "".join(f"<li>{html.escape(text)}</li>" for text in sentences) + "</ul>")
