"""train an experiment

Goes on from the last checkpoint where --workdir has one.

  lmjax train --config=experiments/quickstart.py --workdir=runs/quickstart
  lmjax train --config=experiments/gpt2.py:124M --workdir=runs/gpt2 --config.optim.learning_rate=3e-4
"""

import os
import re
import sys

from absl import flags

from lmjax.commands import experiment
from lmjax.config import UserError

REQUIRED = ("config", "workdir")
POSITIONAL = None


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)
  flags.DEFINE_string("profile", None, "Steps to write a trace of for XProf, such as 20 or 20-25.",
                      flag_values=flag_values)
  flags.DEFINE_string("workdir", None, "Folder or object-store URL the run is written to.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  config = experiment.read_config(flag_values)
  profile = _steps(flag_values.profile)
  from lmjax import train
  result = train.train_and_evaluate(config, flag_values.workdir, profile)
  # What starts runs again on its own, as launch/worker.sh is used by, must tell a stopped one from a finished one.
  if result["status"] == "interrupted":
    sys.exit(int(os.environ.get("LMJAX_INTERRUPTED_STATUS", 0)))


def _steps(text: str | None) -> tuple[int, int] | None:
  """Returns the first and the last of some steps."""
  if text is None:
    return None
  match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
  first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
  if not 1 <= first <= last:
    raise UserError(f"--profile is {text!r}, but it must be a step from 1 on, or the first and last, such as 20-25.")
  return first, last
