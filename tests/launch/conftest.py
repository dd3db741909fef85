"""Programs of a platform that stand in for the real ones: they note how they were called, and do as they are told."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Ends with the next status of NAME.statuses, and prints the next line of NAME.says, of which the last ones stay.
STAND_IN = """#!{python}
import json, os, pathlib, sys
folder, name = pathlib.Path({folder!r}), {name!r}
environment = {{key: os.environ[key] for key in {shown} if key in os.environ}}
with open(folder / "calls.jsonl", "a") as log:
  log.write(json.dumps([name, sys.argv[1:], environment, sys.stdin.read() if {reads} else ""]) + "\\n")
{body}
"""
SHOWN = ("JAX_PLATFORMS", "XLA_FLAGS", "LMJAX_DISTRIBUTED", "LMJAX_INTERRUPTED_STATUS", "JAX_COORDINATOR_ADDRESS",
         "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "PYTHONPATH", "SRUN_CPUS_PER_TASK")


class Platform:
  """A folder of stand-ins that comes first on PATH."""

  def __init__(self, folder):
    """Args: `folder`: where they are kept."""
    self.folder = folder
    self.environment = {name: value for name, value in os.environ.items()
                        if name not in SHOWN and not name.startswith("SLURM_")}
    self.environment.update(PATH=f"{folder}:{os.environ['PATH']}", LMJAX_POLL_S="0", TMPDIR=str(folder))

  def add(self, name, body="", reads=False):
    """Writes the program `name`, which runs the Python `body` once it has noted its call; returns its path."""
    path = self.folder / name
    path.write_text(STAND_IN.format(python=sys.executable, folder=str(self.folder), name=name, shown=SHOWN, body=body,
                                    reads=reads))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path

  @property
  def calls(self):
    """(name, arguments, environment, stdin) of each call."""
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def run(self, *argv, cwd=ROOT, **environment):
    """Returns the finished process of `bash ARGV...`."""
    return subprocess.run(["bash", *map(str, argv)], cwd=cwd, env={**self.environment, **environment}, timeout=60,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.fixture
def platform(tmp_path):
  folder = tmp_path / "bin"
  folder.mkdir()
  return Platform(folder)


@pytest.fixture
def root():
  """Returns the folder of lmjax."""
  return ROOT
