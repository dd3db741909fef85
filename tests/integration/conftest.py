"""What the end-to-end tests share: texts to train on, and the command line as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lmjax.commands import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEBUG = f"--config={ROOT / 'experiments' / 'debug.py'}"


class CommandLine:
  """Runs lmjax in a process of its own, on one device."""

  def __init__(self, folder):
    """Args: `folder`: where the commands are run."""
    self._folder = folder
    # The tests' eight devices are not for these processes; their cache, which the environment names, is.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    self._environment = {**environment, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

  def start(self, *argv):
    """Returns the process of `lmjax ARGV...`."""
    return subprocess.Popen([sys.executable, "-m", "lmjax", *map(str, argv)], cwd=self._folder, env=self._environment,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  def __call__(self, *argv):
    """Returns (exit status, stdout, stderr) of `lmjax ARGV...`."""
    process = self.start(*argv)
    try:
      out, err = process.communicate(timeout=240)
    finally:
      process.kill()
    return process.returncode, out, err

  def succeed(self, *argv):
    """Returns what `lmjax ARGV...` prints to stdout, and asserts that all went well."""
    status, out, err = self(*argv)
    assert status == 0, err
    return out


@pytest.fixture(scope="session")
def command_line_in():
  """Returns a function from a folder to the command line there."""
  return CommandLine


@pytest.fixture
def lmjax_command(tmp_path):
  return CommandLine(tmp_path)


def _sentences(first, count):
  """Returns sentences that a model can learn something from, all different."""
  animals = ("cat", "dog", "fox", "hen", "owl", "yak", "élan")
  return [f"The {animals[i % 7]} saw {i} {animals[i * i % 7]}s, and {i % 3} of them ran away." for i in
          range(first, first + count)]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
  """Returns a folder of the same kind of text as notes/*.txt, records.jsonl, records.parquet, tokenizer.json and a
  prepared TFDS data set in lmjax_text/1.0.0."""
  pa = pytest.importorskip("pyarrow")
  from pyarrow import parquet
  pytest.importorskip("tensorflow_datasets")
  from lmjax.config import DataConfig
  from lmjax.data.tfds_builder import prepare_tfds
  from lmjax.data.tokenizer import train_bpe
  folder = tmp_path_factory.mktemp("texts")
  (folder / "notes").mkdir()
  for number in range(3):
    (folder / "notes" / f"{number}.txt").write_text("\n".join(_sentences(200 * number, 200)), encoding="utf-8")
  (folder / "notes" / "ignored.bin").write_bytes(bytes(range(256)))
  records = [" ".join(_sentences(10 * i, 10)) for i in range(60)]
  (folder / "records.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n"
                                                for i, text in enumerate(records)))
  parquet.write_table(pa.table({"text": records, "id": list(range(60))}), folder / "records.parquet")
  prepare_tfds(str(folder / "records.jsonl"), folder, DataConfig(validation_fraction=0.1))
  train_bpe(records, 280).save(folder / "tokenizer.json")
  return folder


@pytest.fixture
def read_metrics():
  """Returns a function from a workdir to the records of its metrics.jsonl."""
  return lambda workdir: [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def read_result():
  """Returns a function from a workdir to its result.json."""
  return lambda workdir: json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="session")
def debug():
  """Returns the flag that chooses experiments/debug.py."""
  return DEBUG


@pytest.fixture
def run_wrong(capsys):
  """Returns a function that runs lmjax in this process, for its status, what it printed on stderr, and the last line.

  It asserts what holds for every failure: nothing on stdout, no traceback, and an error at the end.
  """
  def run_wrong(*argv):
    capsys.readouterr()
    status = cli.run([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err, err
    line = err.splitlines()[-1]
    assert line.startswith("lmjax: error: "), err
    return status, err, line
  return run_wrong
