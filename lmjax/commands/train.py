"""train an experiment

Goes on from the last checkpoint where --workdir has one.

  lmjax train --config=experiments/quickstart.py --workdir=runs/quickstart
  lmjax train --config=experiments/gpt2.py:124M --workdir=runs/gpt2 --config.optim.learning_rate=3e-4
"""

import os
import sys

from absl import flags

from lmjax.commands import experiment

REQUIRED = ("config", "workdir")
POSITIONAL = None


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)
  flags.DEFINE_string("workdir", None, "Folder or object-store URL the run is written to.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  config = experiment.read_config(flag_values)
  from lmjax import train
  result = train.train_and_evaluate(config, flag_values.workdir)
  # What starts runs again on its own, as launch/worker.sh is used by, must tell a stopped one from a finished one.
  if result["status"] == "interrupted":
    sys.exit(int(os.environ.get("LMJAX_INTERRUPTED_STATUS", 0)))
