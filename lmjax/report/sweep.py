"""The page of a sweep, from its trials and their runs; also while it goes on, or after its driver was killed."""

import collections
import dataclasses
import html
import os
import re
from typing import Any, Mapping, Sequence

from etils import epath

from lmjax.records import read_json, read_lines
from lmjax.report import laws, trial_pictures
from lmjax.report import page as page_lib
from lmjax.report import trials as trials_lib
from lmjax.report.script import SCRIPT, STYLE
from lmjax.report.trials import Trial, short
from lmjax.sweeps.space import is_number

# How the command of a run begins in a sweep that has not written it down.
_UNKNOWN = ("lmjax", "train", "--config=FILE")
_WITHOUT = ("failed", "diverged", "pruned", "duplicate")


@dataclasses.dataclass(frozen=True)
class SweepTrials:
  """What is known of a sweep.

  Attributes:
    workdir: of the sweep.
    about: driver, metric, mode, pruner, seed, space, and the experiment's config.
    trials: the best first.
  """
  workdir: epath.Path
  about: Mapping[str, Any]
  trials: Sequence[Trial]

  @property
  def best(self) -> Trial | None:
    return next((trial for trial in self.trials[:1] if trial.value is not None), None)

  @property
  def ranges(self) -> set[str]:
    """Settings that were drawn from ranges and not from lists."""
    return set(re.findall(r"Range\(field='([^']+)'", self.about.get("space", "")))


def read_sweep(workdir: epath.PathLike, storage: str | None = None) -> SweepTrials:
  """Reads a sweep and what its runs have come to.

  Raises:
    UserError: where the folder is not one of a sweep, or its trials are not to be found.
  """
  from lmjax.sweeps import rows as rows_lib
  workdir = epath.Path(os.path.abspath(workdir))
  found = rows_lib.read(workdir, storage)
  trials = []
  for row in found.rows:
    folder = workdir / "trials" / f"{row.number:03}"
    command = rows_lib.command(found.train or _UNKNOWN, row.settings, folder)
    trials.append(Trial(row, read_json(folder / "result.json"), folder, command))
  return SweepTrials(workdir, found.sweep, trials)


def page(sweep: SweepTrials) -> str:
  """Returns the page as HTML."""
  trials, metric, mode = sweep.trials, sweep.about["metric"], sweep.about["mode"]
  charts = [*trial_pictures.rates(trials, metric, mode, sweep.ranges),
            *trial_pictures.curves(trials, metric, mode)]
  told = trials_lib.importance(trials)
  if isinstance(told, str):
    matters = f"<h2>Importance of settings</h2><p>{told}</p>"
  else:
    charts, matters = [*charts, trial_pictures.importance(told[1], told[0])], ""
  return page_lib.page(sweep.workdir.name, [
      _about(sweep), _headline(sweep), _best(sweep), trial_pictures.parallel(trials, metric, mode, sweep.ranges),
      f'<div class="charts">{"".join(charts)}</div>' if charts else "", matters,
      *laws.sections(sweep.workdir, trials, mode), _table(sweep), _failures(sweep),
      page_lib.config_table(sweep.about.get("config", {})),
      f"<details><summary>Search space</summary><pre>{html.escape(str(sweep.about.get('space', '')))}</pre></details>",
      '<div id="told" role="status" hidden></div>'], STYLE, SCRIPT)


def _about(sweep: SweepTrials) -> str:
  about, fields = sweep.about, trials_lib.searched(sweep.trials)
  least = "smallest" if about["mode"] == "min" else "largest"
  pruner = "" if about["pruner"] == "none" else f", stopped early by {about['pruner']}"
  open_ones = sum(not trial.row.ended for trial in sweep.trials)
  going_on = f" {open_ones} trials have not ended; the same lmjax sweep goes on with them." if open_ones else ""
  over = ", ".join(fields) or "nothing that differs yet"
  return (f"<p>A sweep of {html.escape(over)}: trials chosen by {about['driver']}{pruner}, the best being the {least} "
          f"{html.escape(about['metric'])}; seed {about['seed']}.{going_on}</p>")


def _headline(sweep: SweepTrials) -> str:
  states = collections.Counter(trial.row.state for trial in sweep.trials)
  total = lambda name: sum(trial.result.get(name) or 0 for trial in sweep.trials) or None
  seconds = sum(trial.seconds or 0 for trial in sweep.trials)
  kinds = collections.Counter(_machine(trial.result) for trial in sweep.trials if trial.result)
  best = sweep.best
  return page_lib.tiles([
      (f"best {html.escape(sweep.about['metric'])}", page_lib.number(best.value if best else None)),
      ("best trial", str(best.number) if best else "–"),
      (f"of {len(sweep.trials)} trials", ", ".join(f"{count} {state}" for state, count in states.items()) or "none"),
      ("training FLOPs of all", page_lib.power(total("train_flops"))),
      ("tokens of all", page_lib.large(total("num_tokens"))),
      ("device time of all", page_lib.duration(seconds) if seconds else "–"),
      ("machine", "; ".join(kinds) or "–"),
      ("versions", _versions(sweep.trials))])


def _machine(result: Mapping[str, Any]) -> str:
  return f"{result.get('num_devices', 1)} × {result.get('device_kind', 'unknown')}"


def _versions(trials: Sequence[Trial]) -> str:
  found = dict.fromkeys(", ".join(f"{name} {v[name]}" for name in ("lmjax", "jax", "flax") if name in v)
                        for trial in trials if (v := trial.result.get("versions")))
  return "; ".join(found) or "–"


def _best(sweep: SweepTrials) -> str:
  best = sweep.best
  if best is None:
    return "<p>No trial is complete yet.</p>"
  edges = {"smallest": [], "largest": []}
  for field, values in trials_lib.searched([trial for trial in sweep.trials if trial.value is not None]).items():
    value = best.row.settings.get(field)
    ordered = is_number(value) and len(values) > 2 and field not in {"seed", *sweep.ranges}
    if ordered and value in (values[0], values[-1]):
      edges["smallest" if value == values[0] else "largest"].append(f"{field} {trials_lib.words(value)}")
  said = "".join(f"<li>Has the {end} that was tried of {html.escape(', '.join(fields))}: the best may lie beyond.</li>"
                 for end, fields in edges.items() if fields)
  return (f"<h2>The best trial</h2><p>{html.escape(_words(best))}</p>{_command(best)}"
          + (f'<ul class="warnings">{said}</ul>' if said else ""))


def _table(sweep: SweepTrials) -> str:
  """Returns the trials, a row each, with heads that sort them."""
  fields = list(trials_lib.searched(sweep.trials))
  names = [short(field) for field in fields]
  names = [field if names.count(name) > 1 else name for field, name in zip(fields, names)]
  heads = ["trial", "state", sweep.about["metric"], *names, "parameters", "tokens", "FLOPs", "device time",
           "command"]
  titles = ["", "", "", *fields, "", "", "training FLOPs", "seconds times devices", ""]
  head = "".join(
      f'<th scope="col"{" title=" + chr(34) + html.escape(title) + chr(34) if title else ""}>'
      + (f'<button type="button">{html.escape(name)}</button>' if name != "command" else "command") + "</th>"
      for name, title in zip(heads, titles))
  rows = "".join(_row(trial, fields) for trial in sweep.trials)
  return (f'<h2>Trials</h2><p>Press a head to sort by it, and again to turn the order round.</p><div class="scroll">'
          f'<table class="trials"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')


def _row(trial: Trial, fields: Sequence[str]) -> str:
  result, settings = trial.result, trial.row.settings
  cells = [_cell(trial.row.value, page_lib.number(trial.row.value))]
  cells += [_cell(settings.get(field), trials_lib.words(settings.get(field))) for field in fields]
  cells += [_cell(result.get(name), words(result.get(name))) for name, words in (
      ("num_params", page_lib.large), ("num_tokens", page_lib.large), ("train_flops", page_lib.power))]
  cells.append(_cell(trial.seconds, page_lib.duration(trial.seconds) if trial.seconds else "–"))
  state = html.escape(trial.row.state) + (f" <small>{html.escape(progress)}</small>" if (progress := _progress(trial))
                                          else "")
  return (f'<tr data-trial="{trial.number}" data-words="{html.escape(_words(trial))}">'
          f'<th scope="row" data-value="{trial.number}">{trial.number}</th>'
          f'<td class="state {html.escape(trial.row.state)}" data-value="{html.escape(trial.row.state)}">{state}</td>'
          f'{"".join(cells)}<td>{_command(trial, folded=True)}</td></tr>')


def _cell(value: Any, words: str) -> str:
  key = "" if value is None else html.escape(str(value))
  return f'<td data-value="{key}">{html.escape(words)}</td>'


def _words(trial: Trial) -> str:
  value = "" if trial.row.value is None else f", {page_lib.number(trial.row.value)}"
  return f"trial {trial.number}, {trial.row.state}{value}: {_settings(trial)}"


def _settings(trial: Trial) -> str:
  return ", ".join(f"{field} = {trials_lib.words(value)}" for field, value in trial.row.settings.items())


def _progress(trial: Trial) -> str:
  """Returns how far a trial is that is under way."""
  path = trial.folder / "metrics.jsonl"
  if trial.row.state != "running" or not path.exists() or not (records := read_lines(path, 2)):
    return ""
  config = read_json(trial.folder / "config.json")
  of = config["train"]["num_steps"] if "train" in config else None
  return f"step {records[-1]['step']:,}" + (f" of {of:,}" if of else "")


def _command(trial: Trial, folded: bool = False) -> str:
  code = f'<code>{html.escape(trial.command)}</code>'
  copy = f'<button type="button" class="copy" aria-label="copy the command of trial {trial.number}">copy</button>'
  if folded:
    return f'{copy}<details><summary>show</summary>{code}</details>'
  return f'<pre class="command">{copy}{code}</pre>'


def _failures(sweep: SweepTrials) -> str:
  """Returns the trials that ended without a result, and why."""
  rows = "".join(
      f'<tr data-trial="{trial.number}"><th>{trial.number}</th><td>{html.escape(trial.row.state)}</td>'
      f'<td class="words">{html.escape(trial.row.reason or "no reason was written down")}</td>'
      f'<td class="words">{html.escape(_settings(trial))}</td><td>{_command(trial, folded=True)}</td></tr>'
      for trial in sorted(sweep.trials, key=lambda trial: trial.number) if trial.row.state in _WITHOUT)
  if not rows:
    return "<h2>Trials without a result</h2><p>None has failed, diverged or been stopped.</p>"
  return ('<h2>Trials without a result</h2><div class="scroll"><table class="left failures"><tr><th>trial</th>'
          f"<th>how it ended</th><th>why</th><th>settings</th><th>command</th></tr>{rows}</table></div>")
