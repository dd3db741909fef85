"""draw a run, or a sweep, as one self-contained report.html

Works for those that are still going, too.

  lmjax report --workdir=runs/quickstart
  lmjax report --workdir=runs/depth
"""

from absl import flags

REQUIRED = ("workdir",)
POSITIONAL = "workdir"


def define_flags(flag_values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", None, "Workdir of a run or of a sweep.", flag_values=flag_values)
  flags.DEFINE_string("storage", None, "URL of the database that keeps a sweep's trials, where one does.",
                      flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  from lmjax import report
  print(report.write_report(flag_values.workdir, flag_values.storage))
