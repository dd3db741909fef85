"""evaluate a run

Prints a table, then the same as one line of JSON.

  lmjax eval --workdir=runs/quickstart
  lmjax eval --workdir=runs/quickstart --step=500 --sets=validation,train
"""

import json

from absl import flags

from lmjax.config import UserError

REQUIRED = ("workdir",)
POSITIONAL = "workdir"


def define_flags(flag_values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", None, "Workdir of a run.", flag_values=flag_values)
  flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the last one unless given.", flag_values=flag_values)
  flags.DEFINE_list("sets", None, "Names of evaluation sets of the run; all of them unless given.",
                    flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  if flag_values.sets == []:
    raise UserError("--sets is empty; name evaluation sets of the run, or leave it out for all of them.")
  import jax

  from lmjax import evaluate, partitioning, peers
  partitioning.join_processes()
  with peers.Peers():
    values = evaluate.evaluate_workdir(flag_values.workdir, step=flag_values.step, sets=flag_values.sets)
  if jax.process_index():
    return
  width = max(map(len, values))
  for name, value in values.items():
    print(f"{name:<{width}}  {value:.6g}")
  print(json.dumps(values))
