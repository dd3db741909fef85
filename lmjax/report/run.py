"""The page of one run, from config.json, metrics.jsonl, result.json and samples.jsonl."""

import dataclasses
import html
import json
import math
import os
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax.config_checks import UserError, by_full_name
from lmjax.records import curves_of, read_json, read_lines
from lmjax.report import page as page_lib
from lmjax.report import pictures

# The order of the first columns of evaluations, and the metric that is no set's own.
_FIRST, _AVERAGE = ("loss", "perplexity", "bits_per_byte", "accuracy"), "tasks/average"
# Metrics of tasks that share an axis.
_SHARES = ("f1", "f1_macro", "matthews", "spearman", "span_f1", "rougeL", "exact_match")
# Where the time of a run goes, as `metrics.Clock` divides it.
_TIMES = {"start": "start and compiling", "data": "waiting for data", "step": "steps", "evaluation": "evaluation",
          "saving": "saving checkpoints", "other": "stopped, done again, other"}


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


def read_run(workdir: epath.PathLike) -> Run:
  """Reads the records of a run.

  Raises:
    UserError: where there is no run or nothing has been logged yet.
  """
  workdir = epath.Path(workdir)
  if not (workdir / "metrics.jsonl").exists():
    raise UserError(f"{workdir} has no metrics.jsonl, and no sweep.json, so it is the workdir neither of a run nor of "
                    "a sweep; give one that is.")
  curves = curves_of(read_lines(workdir / "metrics.jsonl"))
  if not curves:
    raise UserError(f"{workdir}/metrics.jsonl holds no metrics yet; wait until the run has logged its first step.")
  samples = workdir / "samples.jsonl"
  return Run(
      name=workdir.name or os.fspath(workdir), config=read_json(workdir / "config.json"), curves=curves,
      result=read_json(workdir / "result.json"), samples=read_lines(samples) if samples.exists() else [])


def page(run: Run) -> str:
  """Returns the page as HTML."""
  return page_lib.page(run.name, [
      _headline(run), _evaluations(run), _time(run), _processes(run),
      f'<div class="charts">{"".join(_charts(run))}</div>', _samples(run), page_lib.config_table(run.config),
      _result(run)])


# Words and tables.


def _headline(run: Run) -> str:
  def final(key: str, metric: str) -> float | None:
    return run.result[key] if key in run.result else run.last(metric)

  first_set = run.eval_sets[0] if run.eval_sets else ""
  tiles = [
      ("status", _status(run)),
      ("training loss", page_lib.number(final("train_loss", "loss"))),
      ("evaluation loss", page_lib.number(final("eval_loss", f"{first_set}/loss"))),
      ("bits per byte", page_lib.number(final("bits_per_byte", f"{first_set}/bits_per_byte"))),
      ("parameters", page_lib.large(final("num_params", "num_params"))),
      ("tokens seen", page_lib.large(final("num_tokens", "num_tokens"))),
      ("training FLOPs", page_lib.power(final("train_flops", "train_flops"))),
      ("tokens a second", page_lib.whole(final("tokens_per_second", "tokens_per_second"))),
      ("MFU", page_lib.percent(final("mfu", "mfu"))),
  ]
  return page_lib.tiles(tiles)


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
  rows = [f"<tr><th>{html.escape(s)}</th>" + "".join(f"<td>{page_lib.number(run.last(f'{s}/{n}'))}</td>" for n in names)
          + "</tr>" for s in run.eval_sets]
  average = run.last(_AVERAGE)
  if average is not None:
    rows.append(f'<tr><th>average of tasks</th><td colspan="{len(names)}">{page_lib.number(average)}</td></tr>')
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
                 f"<td>{seconds:,.1f} s</td><td>{page_lib.percent(seconds / total)}</td></tr>"
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




def _result(run: Run) -> str:
  if not run.result:
    return ""
  rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value if isinstance(value, str) else json.dumps(value))}"
          "</td></tr>" for name, value in by_full_name(run.result).items()]
  return ('<details><summary>Result</summary><div class="scroll"><table class="left">'
          f'{"".join(rows)}</table></div></details>')




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
      drawn.append(page_lib.figure(title, pictures.draw(title, series, x_label, x_scale or "linear", y_scale)))
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




