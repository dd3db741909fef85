"""What the commands share: finding the one asked for, its flags, and how mistakes are told.

Exit status: 0 done, 1 something failed, 2 the request was wrong, 130 interrupted. A run that a signal has stopped, its
state saved, ends with 0, or with what LMJAX_INTERRUPTED_STATUS says.
"""

import errno
import importlib
import logging
import os
import re
import sys
import traceback
import types

from absl import flags
from absl import logging as absl_logging

import lmjax
from lmjax.commands import experiment, help_text
from lmjax.config import settings_help
from lmjax.config_checks import Refused, UserError, nearest

COMMANDS = ("train", "eval", "generate", "convert", "data", "plan", "sweep", "report", "fit", "isoflop", "coordcheck")
# Of several, each would do the whole work and write over the others'.
_ONE_PROCESS = ("generate", "convert", "sweep", "isoflop", "coordcheck")


def run(argv: list[str]) -> int:
  """Runs one command.

  Args:
    argv: the command's name and its flags.

  Returns:
    The exit status.
  """
  try:
    return _run(argv)
  except UserError as e:
    return _fail(str(e), 1 if isinstance(e, Refused) else 2, argv)
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:  # The reader of our output, such as head, has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except Exception as e:  # Whatever it is, a user reads one sentence and can ask for the rest.
    return _fail(_of_the_machine(e) or f"{type(e).__name__}: {' '.join(str(e).split())} (run again with --debug for "
                 "the traceback)", 1, argv)


def parse(command: types.ModuleType, name: str, argv: list[str]) -> flags.FlagValues:
  """Reads the flags of a command.

  Args:
    command: its module.
    name: its name.
    argv: what stands after the name.

  Returns:
    The flag values.

  Raises:
    UserError: for an unknown flag, a wrong value, a stray argument, or a required flag that is missing.
  """
  flag_values = help_text.command_flags(command)
  # What --config.NAME is to --config, --sweep.NAME is to the sweep.
  argv = [re.sub(r"^--?(no)?sweep\.", r"--\1", argument) if name == "sweep" else argument for argument in argv]
  if experiment.takes_config(flag_values):
    argv = experiment.rewrite_overrides(argv)
  try:
    positional = flag_values(["lmjax", *argv])[1:]
  except flags.UnrecognizedFlagError as e:
    raise UserError(f"lmjax {name} has no flag --{e.flagname}{_nearest_flag(e.flagname, flag_values)}") from e
  except flags.IllegalFlagValueError as e:
    flag, value = re.match(r"flag --(\w+)=(.*?):", str(e), re.DOTALL).groups()
    raise UserError(f"lmjax {name} cannot read its flags: flag --{flag}={value} must be of type "
                    f"{flag_values[flag].flag_type()}.") from e
  except (flags.Error, ValueError) as e:  # The latter for --nodebug=3.
    raise UserError(f"lmjax {name} cannot read its flags ({' '.join(str(e).split())}); lmjax {name} --help lists "
                    "them.") from e
  if _wants_help(flag_values):
    return flag_values
  if positional and command.POSITIONAL and not flag_values[command.POSITIONAL].present:
    flag_values[command.POSITIONAL].value = positional.pop(0)
  if positional:
    raise UserError(f"lmjax {name} does not know what to do with {positional[0]!r}; flags are written --name=value, "
                    f"and lmjax {name} --help lists them.")
  for required in command.REQUIRED:
    flag = flag_values[required]
    if flag.value is None or (flag.value == "" and required != "prompt"):  # An empty prompt is one, too.
      raise UserError(f"lmjax {name} needs --{required}: {flag.help}")
    if flag.present > 1:
      raise UserError(f"lmjax {name} has --{required} more than once; give one.")
  return flag_values


def _nearest_flag(name: str, flag_values: flags.FlagValues) -> str:
  """Like `nearest`; a setting without its `config.GROUP.` is told in full."""
  if experiment.takes_config(flag_values):
    for setting, _, _ in settings_help():
      if setting.rpartition(".")[2] == name:
        return f"; did you mean --config.{setting}?"
  return nearest(name, set(flag_values) - {experiment.OVERRIDE_FLAG})


def _run(argv: list[str]) -> int:
  if not argv or argv[0] in ("--help", "-h", "-help", "help"):
    print(help_text.overview(_summaries()))
    return 0 if argv else 2
  name, rest = argv[0], argv[1:]
  if name not in COMMANDS:
    raise UserError(f"lmjax has no command {name!r}{nearest(name, COMMANDS)}")
  command = _load(name)
  flag_values = parse(command, name, ["--help" if arg == "-h" else arg for arg in rest])
  if flag_values.help:
    print(help_text.command_help(command, name))
  elif _wants_help(flag_values):
    print(help_text.config_help())
  else:
    _check_processes(name)
    _log_to_terminal(debug="--debug" in argv)
    command.main(flag_values)
  return 0


def _of_the_machine(e: Exception) -> str | None:
  """Returns a sentence for what the machine lacks, wherever that has shown itself; None for anything else."""
  if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):  # The latter is how XLA calls it.
    asked = re.search(r"allocat\w+ ([\d.]+ ?\w*)", str(e))
    return (f"There is not enough memory{f' (for {asked[1]})' if asked else ''}; lower config.train.batch_size, raise "
            "config.train.grad_accum_steps, set config.model.remat_policy=full, or split the model by mesh.fsdp.")
  if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
    return f"{e.filename or 'A file'} could not be written ({e.strerror}); make room, or write to another place."
  if isinstance(e, ImportError) and "install gcsfs" in str(e):
    return "A gs:// path needs gcsfs, which is not installed; pip install gcsfs."
  return None


def _check_processes(name: str) -> None:
  if name in _ONE_PROCESS and "JAX_NUM_PROCESSES" in os.environ and os.environ["JAX_NUM_PROCESSES"] != "1":
    raise UserError(f"lmjax {name} runs in one process, but JAX_NUM_PROCESSES is {os.environ['JAX_NUM_PROCESSES']}; "
                    "start it once, without that variable.")


def _load(name: str) -> types.ModuleType:
  return importlib.import_module(f"lmjax.commands.{name}")


def _summaries() -> dict[str, str]:
  """Returns each command's name and the first line of its help, in the order they are listed."""
  return {name: _load(name).__doc__.splitlines()[0] for name in COMMANDS}


def _wants_help(flag_values: flags.FlagValues) -> bool:
  return flag_values.help or (experiment.takes_config(flag_values) and flag_values.help_config)


class _Terminal(logging.Handler):
  """Prints warnings and what lmjax itself has to say, a plain line each, above the progress bar where there is one."""

  def filter(self, record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.pathname.startswith(os.path.dirname(lmjax.__file__))

  def emit(self, record: logging.LogRecord) -> None:
    import tqdm
    level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    tqdm.tqdm.write(f"lmjax: {level}{record.getMessage()}", file=sys.stderr)


def _log_to_terminal(debug: bool) -> None:
  root = logging.getLogger()
  if not any(isinstance(handler, _Terminal) for handler in root.handlers):
    root.addHandler(_Terminal())
  absl_logging.set_verbosity(absl_logging.DEBUG if debug else absl_logging.INFO)


def _fail(sentence: str, status: int, argv: list[str]) -> int:
  if "--debug" in argv and sys.exc_info()[0] is not None:
    traceback.print_exc()
  print(f"lmjax: error: {sentence}", file=sys.stderr)
  return status
