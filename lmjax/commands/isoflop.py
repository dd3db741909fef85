"""lay out compute-optimal runs, from one dial: budgets or depths

Width, heads, batch, horizon and learning rate follow by formulas, which lmjax/scaling/isoflop.py states with their
sources. `get_sweep()` of experiments/sweeps/isoflop.py makes a sweep of the same runs.

  lmjax isoflop --config=experiments/quickstart.py --budgets=1e12,3e12,1e13 --total=1e14
  lmjax isoflop --config=experiments/gpt2.py --depths=4,6,8,12
  lmjax isoflop --config=experiments/gpt2.py --budgets=1e18,1e19 --law=fit.json --batch_multiple=8 --json=runs.json
"""

import dataclasses
import json
import os
from typing import Any, Mapping, Sequence

from absl import flags

from lmjax.commands import experiment
from lmjax.config import UserError

REQUIRED = ("config",)
POSITIONAL = None


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=flag_values)
  number = lambda name, default, help: flags.DEFINE_float(name, default, help, flag_values=flag_values)
  whole = lambda name, default, help: flags.DEFINE_integer(name, default, help, flag_values=flag_values)
  flags.DEFINE_list("budgets", [], "FLOPs of a run, with commas between: 1e18,3e18.", flag_values=flag_values)
  flags.DEFINE_list("depths", [], "Layers, with commas between: every one for each of --budgets, or without these each "
                    "as long as is best.", flag_values=flag_values)
  number("total", None, "FLOPs that all runs together may cost; what does not fit is left out, the largest first.")
  text("law", None, "What lmjax fit has printed, whose best sizes are taken in place of --tokens_per_param.")
  number("tokens_per_param", 20.0, "Tokens a parameter of the best run of a budget.")
  whole("sizes", 5, "Sizes for each budget.")
  number("span", 3.0, "How much smaller and larger than the best the outermost sizes are.")
  number("aspect", None, "Width over depth; the experiment's own unless it is given.")
  text("batch", "step_law", "Rule of the batch: step_law, deepseek or own, the experiment's.")
  number("batch_scale", 1.0, "What that batch is multiplied by.")
  whole("batch_multiple", 1, "Sequences of which a batch is a multiple.")
  text("rate", None, "Rule of the learning rate: step_law, deepseek, width, transfer or own; transfer where "
       "config.model.parametrization is not standard, and else step_law, unless it is given.")
  number("rate_scale", 1.0, "What that rate is multiplied by.")
  number("warmup_fraction", 0.05, "Share of the steps that warm up.")
  number("tokens_per_epoch", None, "Tokens of the training data, as lmjax data prints them, to tell epochs by.")
  text("json", None, "File that the runs are written to as JSON, with their settings.")


def main(flag_values: flags.FlagValues) -> None:
  os.environ["JAX_PLATFORMS"] = "cpu"  # Nothing runs; shapes are enough.
  config = experiment.read_config(flag_values)
  from lmjax.scaling import isoflop
  from lmjax.sweeps import ladder
  names = {field.name for field in dataclasses.fields(isoflop.Rules)}
  rules = isoflop.Rules(**{name: flag_values[name].value for name in names})
  total, per_epoch = flag_values.total, flag_values.tokens_per_epoch
  if per_epoch is not None and not per_epoch > 0:
    raise UserError(f"--tokens_per_epoch is {per_epoch:g}, but it must be above 0.")
  budgets, depths = _numbers(flag_values.budgets, "budgets", float), _numbers(flag_values.depths, "depths", int)
  runs = ladder.lay_out(config, budgets, depths, rules, total, _law(flag_values.law))
  if flag_values.json:
    _write(runs, flag_values.json)
  print("\n".join(table(runs, per_epoch)))
  asked, shown = (budgets, {run.budget for run in runs}) if budgets else (depths, {run.depth for run in runs})
  left_out = [f"{one:g}" for one in asked if one not in shown]
  if left_out:
    print(f"Beyond --total={total:g} and left out: {', '.join(left_out)}.")


def table(runs: Sequence[Any], tokens_per_epoch: float | None) -> list[str]:
  """Returns the lines of a table of runs, and their sum."""
  total = sum(run.train_flops for run in runs)
  columns = {
      "budget": lambda run: f"{run.budget:.3g}" if run.budget else "",
      "depth": lambda run: f"{run.depth}", "width": lambda run: f"{run.width:,}", "heads": lambda run: f"{run.heads}",
      "parameters": lambda run: f"{run.num_params:,}", "non-embedding": lambda run: f"{run.num_params_non_embedding:,}",
      "tokens": lambda run: f"{run.num_tokens:,}", "a parameter": lambda run: f"{run.num_tokens / run.num_params:.1f}",
      "steps": lambda run: f"{run.num_steps:,}", "batch": lambda run: f"{run.batch_size:,}",
      "rate": lambda run: f"{run.learning_rate:.3g}", "FLOPs": lambda run: f"{run.train_flops:.3g}",
      "share": lambda run: f"{run.train_flops / total:.1%}"}
  if tokens_per_epoch:
    columns["epochs"] = lambda run: f"{run.num_tokens / tokens_per_epoch:.2f}"
  rows = [list(columns), *([cell(run) for cell in columns.values()] for run in runs)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
  return [*("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows),
          f"{len(runs)} runs, {total:.3g} FLOPs"]


def _write(runs: Sequence[Any], path: str) -> None:
  try:
    with open(path, "w", encoding="utf-8") as file:
      json.dump([dataclasses.asdict(run) for run in runs], file, indent=2)
  except OSError as e:
    raise UserError(f"--json={path} cannot be written ({e.strerror}); give a file in a folder that exists.") from e


def _numbers(texts: Sequence[str], name: str, kind: type) -> list:
  try:
    return [kind(text) for text in texts]
  except ValueError as e:
    example = "1e18,3e18" if kind is float else "4,6,8"
    raise UserError(f"--{name} is {','.join(texts)!r}, but it must be numbers with commas between, such as {example}."
                    ) from e


def _law(path: str | None) -> Mapping[str, Any] | None:
  if path is None:
    return None
  try:
    with open(path, encoding="utf-8") as file:
      told = json.load(file)
  except (OSError, ValueError) as e:
    raise UserError(f"--law={path} cannot be read ({getattr(e, 'strerror', None) or e}); give a file of what lmjax fit "
                    "has printed.") from e
  if not isinstance(told, dict):
    raise UserError(f"--law={path} is not what lmjax fit prints; give a file of that.")
  return told
