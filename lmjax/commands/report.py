"""draw a run as one self-contained report.html

Works for a run that is still going, too.

  lmjax report --workdir=runs/quickstart
"""

from absl import flags

REQUIRED = ("workdir",)
POSITIONAL = "workdir"


def define_flags(flag_values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", None, "Workdir of a run.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  from lmjax import report
  print(report.write_report(flag_values.workdir))
