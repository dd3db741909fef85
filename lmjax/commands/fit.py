"""fit a scaling law to finished runs, with intervals

Reads a sweep, whose folders are runs, or a CSV file with a row for each run, and prints the law as JSON; warnings go to
stderr. Intervals are of 95%, from drawing whole runs again and again. Of a sweep it also reads the runs' metrics.jsonl:
the envelope of their curves, and the critical batch size where train.gradient_noise was on.

  lmjax fit --input=runs/ladder --predict=1e9,2e10
  lmjax fit --input=runs/ladder --hold_out=1 --plot=ladder.png
  lmjax fit --input=runs.csv --size=params --flops=compute --loss=loss --form=auto
  lmjax fit --input=runs/sweep --best=optim.learning_rate --against=size

Conventions: N counts all parameters unless --params says otherwise, and C = 6 N D unless --flops names a column or
--flops_per_param_token and --attention say otherwise. Where --flops stands without --tokens, D follows from C.
"""

import json
import math
import pathlib
import sys

from absl import flags

from lmjax.config import UserError

REQUIRED = ("input",)
POSITIONAL = "input"

_TOKENS, _AGAINST, _FEWEST_RESAMPLES = "num_tokens", ("size", "tokens", "flops"), 100


def define_flags(flag_values: flags.FlagValues) -> None:
  text = lambda name, default, help_text: flags.DEFINE_string(name, default, help_text, flag_values=flag_values)
  number = lambda name, default, help_text: flags.DEFINE_integer(name, default, help_text, flag_values=flag_values)
  text("input", None, "Folder of a sweep, or a CSV file.")
  text("size", None, "Column of the number of parameters; by default the one that --params means.")
  text("tokens", None, "Column of the number of tokens; num_tokens where neither this nor --flops is given.")
  text("flops", None, "Column of compute, which is worked out where none is given.")
  text("loss", "eval_loss", "Column of the loss.")
  text("run", None, "Column that names the run, where a run has several rows; they are drawn together.")
  text("form", "chinchilla", "Form of the law: chinchilla, shared (alpha = beta), no_floor (E = 0), kaplan, compute, "
       "or auto for the one that foretells held-out runs best.")
  text("predict", "", "Runs to foretell: N,D or the compute alone, with semicolons between: '1e9,2e10;1e21'.")
  number("hold_out", 0, "How many runs, the largest in compute, are left out of the fit and foretold.")
  text("plot", None, "Picture that is drawn of the fit: a file that ends in .png, .svg or .pdf.")
  text("best", None, "Column of a setting, such as optim.learning_rate: fits how its best value grows, and no law of "
       "loss.")
  text("against", "size", "What --best grows with: size, tokens or flops.")
  text("params", None, "Which parameters N counts: total (the default), non_embedding or active.")
  flags.DEFINE_float("flops_per_param_token", 6.0, "k of C = k N D.", flag_values=flag_values)
  flags.DEFINE_boolean("attention", False, "Count the FLOPs of attention's scores, too, 6 layers width length a token.",
                       flag_values=flag_values)
  flags.DEFINE_boolean("drop_outliers", False, "Leave out runs far from the law, and fit again.",
                       flag_values=flag_values)
  flags.DEFINE_float("huber_delta", None, "Where Huber's loss turns linear, in log loss; 1.345 standard deviations of "
                     "the noise where it is not given.", flag_values=flag_values)
  number("bootstrap", 1000, "How often the runs are drawn.")
  number("seed", 0, "Seed of the draws.")


def main(flag_values: flags.FlagValues) -> None:
  _check(flag_values)
  predict = _targets(flag_values.predict)
  from lmjax.scaling import analysis, curves, runs
  from lmjax.scaling.counts import PARAM_COLUMNS
  table = runs.read_table(flag_values.input)
  columns = runs.Columns(
      size=flag_values.size or PARAM_COLUMNS[flag_values.params or "total"], loss=flag_values.loss,
      tokens=flag_values.tokens or (None if flag_values.flops else _TOKENS), flops=flag_values.flops,
      run=flag_values.run)
  found, count = runs.select(table, columns, flag_values.flops_per_param_token, flag_values.attention)
  if flag_values.best:
    result = analysis.best_value(found, table.numbers(flag_values.best, "best"), flag_values.best, flag_values.against)
  else:
    result = analysis.analyse(found, count, analysis.Settings(
        form=flag_values.form, num_resamples=flag_values.bootstrap, seed=flag_values.seed,
        huber_delta=flag_values.huber_delta, drop_outliers=flag_values.drop_outliers, predict=predict,
        hold_out=flag_values.hold_out, curve=flag_values.plot is not None))
    drawn, told = curves.while_training(table, found.points)
    result |= told
    if flag_values.plot:
      from lmjax.scaling import plots
      plots.write(plots.fit_figure(result, drawn), flag_values.plot)
  result["conventions"] = _conventions(flag_values, columns)
  print(json.dumps(_finite(result), indent=2, allow_nan=False))
  for warning in result["warnings"]:
    print(f"lmjax: warning: {warning}", file=sys.stderr)


def _check(flag_values: flags.FlagValues) -> None:
  """Raises a UserError for a flag whose value is not one of those it may have."""
  from lmjax.config_checks import nearest
  from lmjax.scaling.counts import PARAM_COLUMNS
  from lmjax.scaling.laws import LAWS
  for name, known in (("form", (*LAWS, "auto")), ("params", (*PARAM_COLUMNS, None)), ("against", _AGAINST)):
    if flag_values[name].value not in known:
      raise UserError(f"--{name} is {flag_values[name].value!r}, which it does not know"
                      f"{nearest(flag_values[name].value, [k for k in known if k])}")
  if flag_values.size and flag_values.params:
    raise UserError("--size and --params both say what N counts; give one.")
  if flag_values.bootstrap < _FEWEST_RESAMPLES:
    raise UserError(f"--bootstrap is {flag_values.bootstrap}, but an interval of 95% needs at least "
                    f"{_FEWEST_RESAMPLES} draws.")
  for name in ("seed", "hold_out"):
    if flag_values[name].value < 0:
      raise UserError(f"--{name} is {flag_values[name].value}, but it must be at least 0.")
  for name in ("flops_per_param_token", "huber_delta"):
    value = flag_values[name].value
    if value is not None and not 0 < value < math.inf:
      raise UserError(f"--{name} is {value}, but it must be a finite number above 0.")
  if flag_values.plot:
    plot = pathlib.Path(flag_values.plot)
    if plot.suffix not in (".png", ".svg", ".pdf") or not plot.parent.is_dir():
      raise UserError(f"The picture {plot} cannot be written; give --plot a file that ends in .png, .svg or .pdf, in a "
                      "folder that exists.")
  for name in ("predict", "hold_out", "plot"):
    if flag_values.best and flag_values[name].value:
      raise UserError(f"--{name} is about a law of loss, but with --best no law of loss is fitted; leave one out.")


def _targets(text: str) -> tuple[tuple[float, ...], ...]:
  targets = []
  for part in filter(None, (part.strip() for part in text.split(";"))):
    try:
      target = tuple(float(number) for number in part.split(","))
    except ValueError:
      target = ()
    if len(target) not in (1, 2) or not all(0 < number < math.inf for number in target):
      raise UserError(f"--predict has {part!r}, but it must be N,D (1e9,2e10) or a compute (1e21), above 0, with "
                      "semicolons between several.")
    targets.append(target)
  return tuple(targets)


def _conventions(flag_values: flags.FlagValues, columns) -> dict:
  k = f"{flag_values.flops_per_param_token:g}"
  formula = f"C = ({k} N + 6 layers width length) D" if flag_values.attention else f"C = {k} N D"
  return {
      "N": f"column {columns.size}",
      "D": f"column {columns.tokens}" if columns.tokens else f"from column {columns.flops} by {formula}",
      "C": f"column {columns.flops}" if columns.flops else formula, "loss": f"column {columns.loss}",
      "optimum": f"under C = {k} N D"}


def _finite(value):
  """Returns JSON without numbers that JSON does not know: they become null."""
  if isinstance(value, dict):
    return {name: _finite(v) for name, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
