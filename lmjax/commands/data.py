"""prepare and describe the data of an experiment, without training

  lmjax data --config=experiments/quickstart.py
  lmjax data --config=experiments/quickstart.py --config.data.source='notes/*.txt'
"""

from typing import Any, Mapping

from absl import flags

from lmjax.commands import experiment

REQUIRED = ("config",)
POSITIONAL = None


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)


def main(flag_values: flags.FlagValues) -> None:
  config = experiment.read_config(flag_values)
  from lmjax import finetune, objectives
  from lmjax.data import pipeline
  config = finetune.take_model(config)
  print("\n".join(table(pipeline.describe(config, *objectives.text_needs(config)))))


def table(description: Mapping[str, Any], indent: str = "") -> list[str]:
  """Returns the lines of a nested description: names on the left, numbers with separators, groups indented."""
  width = max(map(len, description), default=0)
  lines = []
  for name, value in description.items():
    if isinstance(value, Mapping):
      lines += [f"{indent}{name}", *table(value, indent + "  ")]
    elif isinstance(value, str) and "\n" in value:
      lines += [f"{indent}{name}", *(f"{indent}  | {line}" for line in value.splitlines())]
    else:
      lines.append(f"{indent}{name:<{width}}  {_readable(value)}")
  return lines


def _readable(value: Any) -> str:
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return f"{value:,.4g}" if isinstance(value, float) else str(value)
