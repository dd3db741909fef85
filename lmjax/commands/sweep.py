"""run many variants of an experiment, which its get_sweep() describes

Each trial is a normal run in --workdir/trials. The same command goes on after a stop or a crash, and more of it, on the
same machine or on others that share the folder, work on the same sweep: give each --machines=N, how many there are, so
that the first does not take all trials that train together. `optuna-dashboard DIR/optuna.journal` shows the sweep.

  lmjax sweep --config=experiments/sweeps/learning_rate.py --workdir=runs/rates --dry_run
  lmjax sweep --config=experiments/sweeps/learning_rate.py --workdir=runs/rates --workers=2
  lmjax sweep --config=experiments/sweeps/depth.py --workdir=runs/depth --driver=tpe --num_trials=20 --pruner=asha
"""

import contextlib
import copy
import dataclasses
import functools
import os
import sys
from typing import Any, Callable

from absl import flags

from lmjax.commands import experiment
from lmjax.config import Config, UserError, from_config_dict

REQUIRED = ("config", "workdir")
POSITIONAL = None

_OF_SWEEP = ("driver", "num_trials", "metric", "mode", "pruner", "seed", "retries")
_WAITS_FOR_RESULTS = ("median", "hyperband")  # Pruners that stop no trial before others are complete.
# Files, sockets and pipes of a process for each trial it trains (seven were counted), and for all else.
_FILES_OF_TRIAL, _OTHER_FILES = 16, 200
_INTERRUPTED = 75  # By which the driver knows that a worker has not run out of trials.


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)
  text = lambda name, help: flags.DEFINE_string(name, None, help, flag_values=flag_values)
  number = lambda name, help: flags.DEFINE_integer(name, None, help, flag_values=flag_values)
  text("workdir", "Folder the sweep is written to.")
  flags.DEFINE_integer("workers", 1, "Processes that run trials here, each with its own GPUs.",
                       flag_values=flag_values)
  flags.DEFINE_integer("machines", 1, "How many of this command share the folder: trials that can train together are "
                       "divided between the workers of all.", flag_values=flag_values)
  text("driver", "Who chooses: grid, random, sobol, halton, tpe or gp. This and the next six are get_sweep()'s unless "
       "given.")
  number("num_trials", "How many trials; a grid has all of its own.")
  text("metric", "What trials are compared by: a number of result.json, eval_loss by default, or of the evaluations, "
       "such as validation/accuracy. A begun sweep may go on with another metric and mode: no trial is trained again.")
  text("mode", "Whether the best is the smallest (min) or the largest (max).")
  text("pruner", "What stops trials that are behind at an evaluation in the loop: none, median, asha or hyperband. "
       "median and hyperband compare with complete trials, so that trials train one after another unless --stack is "
       "given.")
  number("seed", "Seed of what is drawn.")
  number("retries", "How often a trial that raises an error is run again; a later command with more runs failed "
         "trials again.")
  number("stack", "How many trials that differ in numbers only train together at most, in one compiled program: 1 has "
         "them run one after another; as many as fit unless given.")
  text("storage", "URL of a database that keeps the trials, such as sqlite:///FILE; a file in the workdir without.")
  text("topology", "Machine of a worker that --dry_run reckons with, as lmjax plan names them; else it is this one.")
  flags.DEFINE_boolean("dry_run", False, "List the trials with parameters, FLOPs and expected time, and run none.",
                       flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  for name in ("workers", "machines", "stack"):
    if flag_values[name].value is not None and flag_values[name].value < 1:
      raise UserError(f"--{name} is {flag_values[name].value}, but it must be at least 1.")
  sweep, base, make_config = _read(flag_values)
  most = flag_values.stack or (1 if sweep.pruner in _WAITS_FOR_RESULTS else None)
  if flag_values.dry_run:
    _list(sweep, make_config, flag_values.workdir, flag_values.topology, most)
    return
  from lmjax.sweeps import board as board_lib
  from lmjax.sweeps import driver
  os.environ.pop("LMJAX_DISTRIBUTED", None)  # Workers are runs of their own, not the processes of one.
  is_worker = "LMJAX_SWEEP_DRIVER" in os.environ
  environments = [] if is_worker else driver.divide_devices(flag_values.workers, os.environ)
  board = board_lib.Board(sweep, flag_values.workdir, flag_values.storage, dataclasses.asdict(base),
                          _train(flag_values))
  if is_worker:
    _work(board, make_config, most, flag_values.workers * flag_values.machines)
  else:
    _drive(board, flag_values, environments)


def _read(flag_values: flags.FlagValues) -> tuple[Any, Config, Callable[[dict], Config]]:
  """Returns the sweep, the experiment, and what makes it with some settings; all are checked.

  The file is run once, so that all trials are of the same, also where it is edited while they train.
  """
  from lmjax.sweeps import space as space_lib
  from lmjax.sweeps import sweep as sweep_lib
  overrides = flag_values[experiment.OVERRIDE_FLAG].value
  loaded = experiment.load_experiment(flag_values.config)

  def make_config(settings: dict) -> Config:
    config = copy.deepcopy(loaded)
    texts = [flag.removeprefix("--config.") for flag in space_lib.as_flags(settings)]
    experiment.apply_overrides(config, [*overrides, *texts])
    return from_config_dict(config)

  base = make_config({})
  sweep = experiment.load_sweep(flag_values.config)
  if isinstance(sweep, space_lib.Space):
    sweep = sweep_lib.Sweep(sweep)
  if not isinstance(sweep, sweep_lib.Sweep):
    raise UserError(f"get_sweep() of {flag_values.config} returned {type(sweep).__name__}, but it must return a "
                    "lmjax.sweeps.Sweep or a search space.")
  given = {name: flag_values[name].value for name in _OF_SWEEP if flag_values[name].value is not None}
  sweep = sweep_lib.resolve(dataclasses.replace(sweep, **given))
  searched = space_lib.fields(sweep.space)
  for override in overrides:
    if (name := override.partition("=")[0]) in searched:
      raise UserError(f"--config.{name} is given, but the sweep sets it in each trial; leave it to one of them.")
  in_loop = [unit for unit in ("steps", "tokens", "epochs")
             if getattr(base.eval, f"every_{unit}") or f"eval.every_{unit}" in searched]
  if sweep.pruner != "none" and not in_loop:
    raise UserError(f"The sweep's pruner is {sweep.pruner}, but nothing is evaluated in the loop; set "
                    "config.eval.every_steps.")
  if sweep.pruner != "none":
    from lmjax.sweeps.rows import may_be_evaluated
    if not may_be_evaluated(sweep.metric):
      raise UserError(f"The sweep's pruner is {sweep.pruner}, but its metric {sweep.metric} is none of those that "
                      "evaluations in the loop have; give --metric=eval_loss or another of them, or --pruner=none.")
  for number, settings in enumerate(sweep_lib.planned_settings(sweep)):
    try:
      make_config(settings)
    except UserError as e:
      raise UserError(f"Trial {number} of the sweep ({' '.join(space_lib.as_flags(settings))}) cannot work: {e}") from e
  return sweep, base, make_config


def _list(sweep: Any, make_config: Callable[[dict], Config], workdir: str, topology: str | None,
          most: int | None) -> None:
  from lmjax.sweeps import listing
  from lmjax.sweeps import space as space_lib
  from lmjax.sweeps import sweep as sweep_lib
  trials = sweep_lib.planned_settings(sweep)
  print("\n".join(listing.listing(trials, make_config, workdir, topology, space_lib.fields(sweep.space), most)))
  if sweep.driver not in sweep_lib.PLANNED and (more := sweep.num_trials - len(trials)) > 0:
    print(f"{more} more trials will be chosen by {sweep.driver}, by what these show.")


def _work(board: Any, make_config: Callable[[dict], Config], most: int | None, workers: int) -> None:
  import json

  from lmjax import stack
  from lmjax.sweeps import driver, stacking, worker
  from lmjax.sweeps.space import fields
  driver.follow_driver()
  train, searched = stack.Trainer(), fields(board.sweep.space)
  make_config = functools.partial(_made_once, {}, make_config)

  def trial(settings, folder, report):
    def by_number(step, values):
      # Trials with other batches make other steps; what they have in common is how often they were evaluated.
      every = json.loads((folder / "config.json").read_text())["eval"]["every_steps"]
      return report(step // every, values)
    config = make_config(settings)
    return stack.Trial(config, str(folder), by_number, stacking.numbers(config, searched))

  def alike(settings):
    try:
      return stacking.key(make_config(settings), searched)
    except UserError:  # A driver may choose what does not go together; alone it says so.
      return repr(settings)

  def run(trials):
    return train([trial(*one) for one in trials], alike(trials[0][0]))

  def run_trial(*one):
    outcome, = run([one])
    if isinstance(outcome, Exception):
      raise outcome
    return outcome

  most = min(most or board.sweep.num_trials, _num_with_files())
  together = worker.Together(alike, most, workers, run)
  if not worker.work(board, run_trial, together=together):
    sys.exit(_INTERRUPTED)


def _num_with_files() -> int:
  """Returns for how many trials this process may open files, after it has asked for as many as the system gives it."""
  import resource
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):  # Where there is no bound, some systems have one all the same.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, (soft - _OTHER_FILES) // _FILES_OF_TRIAL)


def _made_once(made: dict[str, Config], make_config: Callable[[dict], Config], settings: dict) -> Config:
  if (name := repr(settings)) not in made:
    made[name] = make_config(settings)
  return made[name]


def _drive(board: Any, flag_values: flags.FlagValues, environments: list[dict[str, str]]) -> None:
  from lmjax.config_checks import Refused
  from lmjax.sweeps import driver
  from lmjax.sweeps.rows import command
  if board.sweep.pruner in _WAITS_FOR_RESULTS and flag_values.stack is None:
    print(f"lmjax: the pruner {board.sweep.pruner} compares trials with complete ones, so that they train one after "
          "another; --stack=N has N train together.", file=sys.stderr)
  workers = driver.Workers([sys.executable, "-m", "lmjax", "sweep", *_again(flag_values)],
                           board.workdir / "workers", environments)
  if not driver.drive(board, workers):
    print("lmjax: interrupted; the same command goes on.", file=sys.stderr)
    sys.exit(int(os.environ.get("LMJAX_INTERRUPTED_STATUS", 0)))
  rows, train = board.best_first(), _train(flag_values)
  board.write_record([{**dataclasses.asdict(row), "workdir": str(board.folder(row.number)),
                       "command": command(train, row.settings, board.folder(row.number))} for row in rows])
  print("\n".join(driver.table(rows, board.sweep.metric)))
  if rows[0].state != "complete":
    reason = next((row.reason for row in rows if row.reason), "all were stopped early")
    raise Refused(f"None of the sweep's {len(rows)} trials has a result ({reason.rstrip('.')}); mend that, and the "
                  "same command, with more --retries, runs them again.")
  print(f"\nThe best, alone:\n  {command(train, rows[0].settings, f'{board.workdir}-best')}")


def _again(flag_values: flags.FlagValues) -> list[str]:
  """Returns the flags that were given."""
  argv = []
  for name in flag_values:
    flag = flag_values[name]
    if flag.present and flag.boolean:
      argv.append(f"--{'' if flag.value else 'no'}{name}")
    elif flag.present:
      argv += [f"--{name}={value}" for value in (flag.value if isinstance(flag.value, list) else [flag.value])]
  return argv


def _train(flag_values: flags.FlagValues) -> list[str]:
  """Returns the command of a run of the experiment, without a trial's settings and folder."""
  overrides = [f"--config.{override}" for override in flag_values[experiment.OVERRIDE_FLAG].value]
  return ["lmjax", "train", f"--config={flag_values.config}", *overrides]
