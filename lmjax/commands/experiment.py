"""Reads `--config=FILE[:ARG]` and `--config.GROUP.NAME=VALUE`: an experiment file, then what the command line changes.

The overrides themselves are parsed by ml_collections; this file makes every mistake on the way one sentence.
"""

import importlib.util
import inspect
import pathlib
import re
import traceback
import types
from typing import Any, Callable, Iterable

from absl import flags
import ml_collections
from ml_collections import config_flags

from lmjax import config as config_lib
from lmjax.config import Config
from lmjax.config_checks import DURATIONS, UNITS, UserError, nearest

# Overrides travel in this flag, because a flag of its own for each setting would drown the others.
OVERRIDE_FLAG = "config_override"


def define_config_flags(flag_values: flags.FlagValues) -> None:
  """Defines `--config`, the overrides and `--help_config`."""
  flags.DEFINE_string("config", None, "Experiment file, FILE.py or FILE.py:ARG where it takes an argument.",
                      flag_values=flag_values)
  flags.DEFINE_multi_string(OVERRIDE_FLAG, [], "", flag_values=flag_values)
  flags.DEFINE_boolean("help_config", False, "Show every setting.", flag_values=flag_values)


def takes_config(flag_values: flags.FlagValues) -> bool:
  """Returns whether `define_config_flags` has been called on these flags."""
  return OVERRIDE_FLAG in flag_values


def rewrite_overrides(argv: Iterable[str]) -> list[str]:
  """Turns `--config.a.b=c`, `--config.a.b c` and `--noconfig.a.b` into `--config_override=a.b=c`.

  Raises:
    UserError: for a setting that does not exist, naming the nearest, or that has no value.
  """
  kinds = _kinds()
  result, arguments = [], iter(argv)
  for argument in arguments:
    match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, flags=re.DOTALL)
    if not match:
      result.append(argument)
      continue
    negated, name, value = match.groups()
    if any(known.startswith(f"{name}.") for known in kinds):
      raise UserError(f"--config.{name} is a group of settings; write --config.{name}.NAME=VALUE.")
    if name not in kinds:
      raise UserError(f"--config.{name} is not a setting{_nearest_setting(name, kinds)}")
    if value is None and kinds[name] is bool:
      value = "false" if negated else "true"
    elif negated:
      raise UserError(f"--noconfig.{name} switches off what is true or false, but {name} is of type "
                      f"{kinds[name].__name__}; write --config.{name}=VALUE.")
    elif value is None:
      value = next(arguments, "--")
      if value.startswith("--"):
        raise UserError(f"--config.{name} has no value; write --config.{name}=VALUE.")
    result.append(f"--{OVERRIDE_FLAG}={name}={value}")
  return result


def read_config(flag_values: flags.FlagValues) -> Config:
  """Returns the experiment of `--config` with the overrides applied, checked.

  Raises:
    UserError: for whatever is wrong with the file, its argument, or a setting.
  """
  config = load_experiment(flag_values.config)
  apply_overrides(config, flag_values[OVERRIDE_FLAG].value)
  return config_lib.from_config_dict(config)


def load_experiment(spec: str) -> ml_collections.ConfigDict:
  """Runs `get_config` of an experiment file.

  Args:
    spec: `FILE.py` or `FILE.py:ARG`.

  Raises:
    UserError: where the file is missing, cannot be run, or refuses the argument.
  """
  path, has_argument, argument = spec.partition(":")
  get_config = _function(path, "get_config", "which an experiment file must define")
  arguments = (argument,) if has_argument else ()
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as e:
    wrong = (f"takes no argument, but {argument!r} was given; write --config={path}" if has_argument
             else f"needs an argument; write --config={path}:ARG")
    raise UserError(f"The experiment {path} {wrong}.") from e
  config = _guarded(path, lambda: get_config(*arguments))
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"get_config() of {path} returned {type(config).__name__}, but it must return the ConfigDict that "
                    "lmjax.config.base_config() makes.")
  return config


def load_sweep(spec: str) -> Any:
  """Runs `get_sweep` of an experiment file, with the argument of its `get_config` where it takes one.

  Args:
    spec: `FILE.py` or `FILE.py:ARG`, whose `get_config` has been run.

  Raises:
    UserError: where the file has no `get_sweep`, or it cannot be run.
  """
  path, has_argument, argument = spec.partition(":")
  get_sweep = _function(path, "get_sweep", "which says what a sweep tries; see lmjax/sweeps/__init__.py")
  takes = has_argument and inspect.signature(get_sweep).parameters
  return _guarded(path, lambda: get_sweep(*((argument,) if takes else ())))


def apply_overrides(config: ml_collections.ConfigDict, overrides: Iterable[str]) -> None:
  """Sets settings in place, in the order given.

  Args:
    config: an experiment's config.
    overrides: `GROUP.NAME=VALUE` each, with names that exist; a tuple given several times collects its values.

  Raises:
    UserError: for a value of the wrong type.
  """
  values: dict[str, list[str]] = {}
  for override in overrides:
    name, _, value = override.partition("=")
    values.setdefault(name, []).append(value)
  kinds, unset = _kinds(), set()
  for name, texts in values.items():
    if kinds[name] is tuple and len(texts) == 1 and re.fullmatch(r"[\w./-]+(,[\w./-]+)+", texts[0]):
      texts = texts[0].split(",")
    if texts[-1] in ("None", "none") and (kinds[name] is not str or name in _optional_texts()):
      unset.add(name)
      group, _, key = name.rpartition(".")
      with config.unlocked():
        (config[group] if group else config)[key] = None
    else:
      _set(config, name, [_plain_integer(text) for text in texts] if kinds[name] is int else texts, kinds[name])
  _keep_last_duration(config, values.keys() - unset)


def _keep_last_duration(config: ml_collections.ConfigDict, overridden: set[str]) -> None:
  """Clears the other units of each duration that a flag has set, so that what was said last counts."""
  for group, stem in DURATIONS:
    names = {unit: f"{group}.{stem}_{unit}" for unit in UNITS}
    if not overridden & set(names.values()):
      continue
    for unit, name in names.items():
      if name not in overridden:
        config[group][f"{stem}_{unit}"] = None


def _set(config: ml_collections.ConfigDict, name: str, texts: list[str], kind: type) -> None:
  argv = [f"--config.{name}={text}" for text in texts]
  flag_values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    flag_values(["lmjax", *argv])
  except (flags.Error, TypeError, ValueError) as e:
    words = {bool: "true or false", tuple: "a tuple such as '(\"a\", \"b\")'"}
    right = words[kind] if kind in words else f"a value of type {kind.__name__}"
    raise UserError(f"--config.{name} is {texts[-1]!r}, but it must be {right}.") from e


def _plain_integer(text: str) -> str:
  """Writes 1e6 as 1000000; what is no whole number is left for the parser to refuse."""
  try:
    number = float(text)
    return str(int(number)) if number.is_integer() else text
  except ValueError:
    return text


def _kinds() -> dict[str, type]:
  """Returns the type of every setting, by its dotted name."""
  base = config_lib.base_config()
  kinds = {}
  for name, _, _ in config_lib.settings_help():
    group, _, key = name.rpartition(".")
    kinds[name] = (base[group] if group else base).get_type(key)
  return kinds


def _optional_texts() -> set[str]:
  """Returns the names of the texts that may be None; to any other, such as remat_policy, "none" is a word."""
  return {name for name, default, _ in config_lib.settings_help() if default is None}


def _nearest_setting(name: str, known: Iterable[str]) -> str:
  """Like `nearest`, but a list of all settings would help nobody."""
  group = name.partition(".")[0]
  within = [k for k in known if k.startswith(f"{group}.")]
  hint = nearest(name, within or known)
  return hint if hint.startswith("; did you mean") else "; --help_config lists them all."


def _function(path: str, name: str, purpose: str) -> Callable[..., Any]:
  """Returns a function of an experiment file."""
  function = getattr(_load_module(path), name, None)
  if not callable(function):
    raise UserError(f"{path} has no function {name}(), {purpose}.")
  return function


def _load_module(path: str) -> types.ModuleType:
  if not pathlib.Path(path).is_file():
    raise UserError(f"--config={path} names no file (seen from {pathlib.Path.cwd()}); give the path of an experiment, "
                    "such as experiments/quickstart.py.")
  spec = importlib.util.spec_from_file_location("lmjax_experiment", path,
                                                loader=importlib.machinery.SourceFileLoader("lmjax_experiment", path))
  module = importlib.util.module_from_spec(spec)
  _guarded(path, lambda: spec.loader.exec_module(module))
  return module


def _guarded(path: str, call: Callable[[], Any]) -> Any:
  """Calls code of an experiment file; what it raises becomes one sentence with the line that raised it."""
  try:
    return call()
  except UserError:
    raise
  except SyntaxError as e:
    where = f"{e.filename}, line {e.lineno}," if e.filename else path
    raise UserError(f"{where} is not valid Python: {e.msg}.") from e
  except (Exception, SystemExit) as e:
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
    where = f"{path}, line {lines[-1]}," if lines else path
    typo = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(e))
    unknown = re.search(r"[Kk]ey ['\"](\w+)['\"] does not exist", str(e))
    if typo:
      raise UserError(f"{where} uses a setting {typo[2]!r} that does not exist; did you mean {typo[1]!r}?") from e
    if unknown:
      raise UserError(f"{where} uses a setting {unknown[1]!r} that does not exist"
                      f"{_nearest_setting(unknown[1], _kinds())}") from e
    raise UserError(f"{where} raised {type(e).__name__} ({' '.join(str(e).split())}); mend the file.") from e
