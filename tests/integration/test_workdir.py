"""A workdir in use, read-only or on a full disk: one sentence, nothing half-written, and afterwards the run goes on."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest

from lmjax import train, workdir
from lmjax.commands import cli

SETTINGS = ("data.tokenizer=bytes", "data.source={texts}/notes/*.txt", "train.num_steps=8", "optim.warmup_steps=0",
            "train.sample_length=0", "eval.num_batches=1", "eval.final_num_batches=1", "tracking.tensorboard=false",
            "train.log_every_steps=1", "checkpoint.every_steps=2", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def command(texts, debug):
  """Returns `lmjax train` but for the workdir."""
  return ["train", debug, *(f"--config.{setting.format(texts=texts)}" for setting in SETTINGS)]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
  """Returns the workdir of a finished run."""
  folder = tmp_path_factory.mktemp("finished") / "run"
  assert cli.run([*command, f"--workdir={folder}"]) == 0
  return folder


@pytest.fixture
def fail(run_wrong):
  """Returns a function that runs lmjax, asserts that it ends with status 1 and a sentence, and gives the sentence."""
  def fail(*argv):
    status, err, line = run_wrong(*argv)
    assert status == 1 and "--debug" not in err and "never retrieved" not in err and err.endswith(".\n"), err
    return line
  return fail


@pytest.fixture
def disk(tmp_path):
  """Returns a function that mounts a disk of a size, or changes one that is; skips where mounting is not permitted."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = []

  def mount(options):
    again = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options]
    try:
      subprocess.run(["mount", *again, *([] if mounted else ["tmpfs"]), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
      pytest.skip(f"mounting is not permitted here: {e}")
    mounted.append(folder)
    return folder
  yield mount
  if mounted:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def snapshot(folder):
  return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def outcome(folder):
  """Returns what a run has computed: its losses and the digest of its parameters."""
  records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  losses = [(record["step"], name, record[name]) for record in records for name in record if "loss" in name]
  return losses, json.loads((folder / "result.json").read_text())["params_sha256"]


def fill(folder):
  """Uses up all room of a disk but for what is in a last page."""
  with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
    while True:
      file.write(bytes(4096))
      file.flush()


def assert_nothing_half_written(folder):
  assert [path for path in folder.rglob("*") if "tmp" in path.name or path.name == workdir.LOCK] == []


def test_a_workdir_in_use_is_refused_before_anything_else(fail, command, finished):
  with workdir.locked(finished):
    before = snapshot(finished)
    said = fail(*command, f"--workdir={finished}", "--config.data.source=nowhere")
    assert f"is in use by another run (process {os.getpid()} on " in said
    assert snapshot(finished) == before


def test_what_only_reads_a_workdir_may_do_so_while_it_is_in_use(finished, tmp_path, capsys):
  with workdir.locked(finished):
    before = snapshot(finished)
    assert cli.run(["eval", str(finished)]) == 0
    assert cli.run(["generate", str(finished), "--prompt=a", "--max_new_tokens=4"]) == 0
    assert cli.run(["convert", f"--source={finished}", f"--target={tmp_path / 'hf'}"]) == 0
    assert snapshot(finished) == before
    assert cli.run(["report", str(finished)]) == 0
  (finished / "report.html").unlink()


@pytest.mark.parametrize("name", ["run", "a/b/run"])
def test_a_read_only_disk_to_train_on(fail, command, disk, name):
  said = fail(*command, f"--workdir={disk('ro,size=1m') / name}")
  assert f"{name} cannot be written (Read-only file system); give a --workdir that can" in said


def test_a_finished_run_on_a_read_only_disk(fail, command, disk, finished, tmp_path, capsys):
  folder = shutil.copytree(finished, disk("size=64m") / "run")
  disk("ro")
  assert cli.run(["eval", str(folder)]) == 0
  assert cli.run(["generate", str(folder), "--prompt=a", "--max_new_tokens=4"]) == 0
  assert cli.run(["convert", f"--source={folder}", f"--target={tmp_path / 'hf'}"]) == 0
  assert "Read-only file system" in fail("report", folder)
  assert "Read-only file system" in fail(*command, f"--workdir={folder}")
  assert "Read-only file system" in fail("convert", f"--source={folder}", f"--target={folder.parent / 'hf'}")


def test_a_disk_that_is_full_before_the_run_begins(fail, command, disk):
  folder = disk("size=64k")
  fill(folder)
  assert "No space left on device" in fail(*command, f"--workdir={folder / 'run'}")
  assert [path.name for path in folder.iterdir()] == ["filler"]


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(fail, command, disk, finished):
  size = sum(path.stat().st_size for path in (finished / "checkpoints" / "2").rglob("*"))
  folder = disk(f"size={int(2.6 * size)}") / "run"
  said = fail(*command, f"--workdir={folder}")
  assert "checkpoints (No space left on device); make room" in said
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
  assert_nothing_half_written(folder)
  disk("size=64m")
  assert cli.run([*command, f"--workdir={folder}"]) == 0
  assert outcome(folder) == outcome(finished)


def test_a_disk_that_is_full_when_metrics_are_written(fail, command, disk, finished, monkeypatch):
  folder = disk("size=32m") / "run"

  class Filling(train.Tracker):
    def write(self, step, metrics):
      if step == 5:
        fill(folder.parent)
        for _ in range(100):  # Of the last page.
          super().write(step, metrics)
      super().write(step, metrics)
  with monkeypatch.context() as patched:
    patched.setattr(train, "Tracker", Filling)
    # Else a checkpoint that is still being written would be the first to find the disk full.
    said = fail(*command, f"--workdir={folder}", "--config.checkpoint.async_save=false")
  assert f"{folder} could not be written (No space left on device); make room" in said
  assert_nothing_half_written(folder)
  (folder.parent / "filler").unlink()
  assert cli.run([*command, f"--workdir={folder}"]) == 0
  assert outcome(folder) == outcome(finished)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_disk_that_is_full_while_data_is_prepared(fail, debug, texts, disk, tokenizer):
  folder = disk("size=16k")
  argv = ["data", debug, f"--config.data.source={texts}/notes/*.txt", f"--config.data.tokenizer={tokenizer}",
          "--config.data.tokenizer_vocab_size=400", f"--config.data.cache_dir={folder}"]
  said = fail(*argv)
  assert "No space left on device" in said and "config.data.cache_dir" in said
  # A trained tokenizer is whole, and may stay.
  assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".lock", ".json"}
  assert not [path for path in folder.rglob("*.tmp")]
  disk("size=4m")
  assert cli.run(argv) == 0


def test_a_disk_that_is_full_while_a_folder_is_converted(fail, disk, finished, tmp_path):
  folder = disk("size=64k")
  assert "No space left on device" in fail("convert", f"--source={finished}", f"--target={folder / 'hf'}")
  assert list(folder.iterdir()) == []
  assert cli.run(["convert", f"--source={finished}", f"--target={tmp_path / 'hf'}"]) == 0
  assert "No space left on device" in fail("convert", f"--source={tmp_path / 'hf'}", f"--target={folder / 'run'}")
  assert list(folder.iterdir()) == []
