"""The help pages: of lmjax, of a command, and of all settings."""

import textwrap
import types
from typing import Mapping

from absl import flags

from lmjax.commands import experiment
from lmjax.config import settings_help

_WIDTH = 110


def command_flags(command: types.ModuleType) -> flags.FlagValues:
  """Returns the flags of a command, unparsed, with those that every command has."""
  flag_values = flags.FlagValues()
  flag_values.set_gnu_getopt(True)
  command.define_flags(flag_values)
  flags.DEFINE_boolean("debug", False, "Show the traceback of an error.", flag_values=flag_values)
  flags.DEFINE_boolean("help", False, "Show this help.", flag_values=flag_values)
  return flag_values


def overview(summaries: Mapping[str, str]) -> str:
  """Returns what `lmjax --help` prints."""
  lines = ["lmjax: language-model research in JAX and Flax.", "", "usage: lmjax COMMAND [flags]", ""]
  lines += [f"  {name:<12}{summary}" for name, summary in summaries.items()]
  lines += ["", "lmjax COMMAND --help explains a command."]
  return "\n".join(lines)


def command_help(command: types.ModuleType, name: str) -> str:
  """Returns what `lmjax NAME --help` prints."""
  flag_values = command_flags(command)
  lines = [f"lmjax {name}: {command.__doc__.strip()}", "", "Flags:"]
  for flag_name in flag_values:
    if flag_name == experiment.OVERRIDE_FLAG:
      lines += _entry("--config.GROUP.NAME=VALUE", "Changes one setting; --help_config lists them all.")
    else:
      lines += _entry(*_described(flag_values[flag_name], flag_name in command.REQUIRED))
  return "\n".join(lines)


def config_help() -> str:
  """Returns what `--help_config` prints: every setting with its default and meaning."""
  lines = ["Every setting and its default. An experiment file changes them, and so does a flag.", ""]
  for name, default, sentence in settings_help():
    lines += _entry(f"--config.{name}={default}", sentence, column=46)
  return "\n".join(lines)


def _described(flag: flags.Flag, required: bool) -> tuple[str, str]:
  """Returns how a flag is written and what it means."""
  if flag.boolean:
    return f"--{flag.name}", flag.help
  kind = {"string": "TEXT", "int": "N", "float": "X", "comma separated list of strings": "NAME,..."}[flag.flag_type()]
  if required:
    note = " Required."
  elif flag.default in (None, []):
    note = ""
  else:
    note = f" Default: {flag.default}."
  return f"--{flag.name}={kind}", flag.help + note


def _entry(head: str, text: str, column: int = 30) -> list[str]:
  """Returns the lines of a head with its text from `column` on, on its own lines where the head is long."""
  indent = " " * column
  if len(head) < column - 3:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {head}".ljust(column), subsequent_indent=indent)
  return [f"  {head}", *textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)]
