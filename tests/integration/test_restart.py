"""A run that is stopped and started again ends with the numbers of one that was not.

Two ways. A few combined cases run as a user runs them, in processes that are killed at a random moment, killed in the
middle of a save, and interrupted. Every optimizer, with every packing, a mixture, microbatches, averaging and dropout
among them, runs in this process, one of them on a mesh of eight devices; it is stopped by an exception after a step
that was not saved, and made anew. With --all every optimizer meets every packing and source, plain and with the rest.
"""

import itertools
import json
import math
import os
import random
import shutil
import signal
import time

import jax
import pytest

from lmjax import partitioning, train
from lmjax.commands.experiment import apply_overrides, load_experiment
from lmjax.config import from_config_dict

NUM_STEPS = 20
SETTINGS = ("train.num_steps=20", "train.log_every_steps=1", "train.sample_length=0", "optim.warmup_steps=5",
            "checkpoint.every_steps=5", "eval.every_steps=5", "eval.num_batches=1", "eval.final_num_batches=1",
            "tracking.tensorboard=false")
SINGLE, MIXTURE = "data.source={texts}/notes/*.txt", "data.source={texts}/notes/*.txt,{texts}/records.jsonl"
ACCUMULATION, AVERAGE, DROPOUT = "train.grad_accum_steps=2", "train.ema_decay=0.9", "model.dropout=0.1"
PACKINGS = {"concat": ("data.packing=concat",), "masked": ("data.packing=concat", "data.document_mask=true"),
            "best_fit": ("data.packing=best_fit",)}


def outcome(workdir):
  """Returns a run's (step, name, value) of all losses, and its result without what is timing."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [(record["step"], name, record[name]) for record in records for name in record if "loss" in name]
  result = json.loads((workdir / "result.json").read_text())
  timing = ("tokens_per_second", "mfu", "goodput")
  return losses, {name: value for name, value in result.items() if name not in timing and "seconds_" not in name}


def assert_whole(losses, result):
  assert [step for step, name, _ in losses if name == "loss"] == list(range(1, NUM_STEPS + 1))
  assert (result["status"], result["step"]) == ("finished", NUM_STEPS)


# As a user runs it. A step takes long enough that there is time to stop a run before its end.
PROCESS_SETTINGS = (*SETTINGS, "train.batch_size=64")
CASES = {
    # Settings, and the reading workers of the unbroken run and of each start of the broken one.
    "plain": ((SINGLE,), (0, 0, 0, 0, 0)),
    "combined": ((SINGLE, ACCUMULATION, AVERAGE, DROPOUT, *PACKINGS["best_fit"], "optim.name=muon"), (0, 0, 0, 0, 0)),
    "mixture": ((MIXTURE, "data.weights=(2.0,1.0)", DROPOUT, *PACKINGS["masked"], "optim.name=lion"), (0, 2, 1, 0, 2)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, texts, debug, command_line_in, tmp_path_factory):
  """Returns (a function from a number of start to the command, the outcome and the workdir of an unbroken run)."""
  settings, workers = CASES[request.param]

  def command(start, workdir, *more):
    flags = [setting.format(texts=texts) for setting in (*PROCESS_SETTINGS, *settings, *more)]
    return ["train", debug, f"--workdir={workdir}",
            *(f"--config.{flag}" for flag in (*flags, f"data.num_workers={workers[start]}"))]
  workdir = tmp_path_factory.mktemp("unbroken") / "run"
  command_line_in(workdir.parent).succeed(*command(0, workdir))
  return command, outcome(workdir), workdir


def wait_for(process, happened):
  """Waits until something has happened in the workdir of a running process."""
  deadline = time.monotonic() + 240
  while not happened():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    time.sleep(0.002)


def last_step(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def unfinished(workdir):
  folder = workdir / "checkpoints"
  return [path.name for path in folder.iterdir() if "tmp" in path.name] if folder.exists() else []


def committed(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def kill_in_a_save(process, workdir):
  """Kills a run while a checkpoint is half-written; it is held first, so that it cannot finish it meanwhile."""
  while True:
    wait_for(process, lambda: unfinished(workdir))
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the run ended before it could be killed in a save"
    if unfinished(workdir):
      break
    process.send_signal(signal.SIGCONT)
  process.kill()
  process.communicate(timeout=60)  # Its reading workers, which have the same pipes, end too.


def test_the_unbroken_run_is_whole(case):
  _, (losses, result), _ = case
  assert_whole(losses, result)
  evaluated = {name for _, name, _ in losses if name.startswith("validation")}
  for name in evaluated:
    assert [step for step, other, _ in losses if other == name] == [5, 10, 15, 20]
  assert evaluated and losses[0][2] > losses[-1][2] + 0.5


def test_killed_killed_in_a_save_and_interrupted(case, tmp_path, lmjax_command):
  command, expected, _ = case
  workdir = tmp_path / "run"

  process = lmjax_command.start(*command(1, workdir))
  wait_for(process, lambda: (workdir / "checkpoints" / "5").exists() and last_step(workdir) >= 6)
  delay = random.uniform(0.0, 0.1)
  time.sleep(delay)
  process.kill()
  process.communicate(timeout=60)
  assert process.returncode == -signal.SIGKILL and not (workdir / "result.json").exists(), f"killed after {delay} s"

  process = lmjax_command.start(*command(2, workdir, "checkpoint.every_steps=1"))
  kill_in_a_save(process, workdir)
  assert unfinished(workdir) and committed(workdir) and not (workdir / "result.json").exists()

  before = last_step(workdir)
  process = lmjax_command.start(*command(3, workdir))
  wait_for(process, lambda: last_step(workdir) > before)
  process.terminate()
  _, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  result = json.loads((workdir / "result.json").read_text())
  assert result["status"] == "interrupted" and 5 <= result["step"] < NUM_STEPS
  assert committed(workdir)[-1] == result["step"] and not unfinished(workdir)
  assert f"Interrupted after step {result['step']}" in err

  lmjax_command.succeed(*command(4, workdir))
  assert outcome(workdir) == expected


def flip_a_byte(checkpoint):
  """Flips one bit in the middle of the largest file of a checkpoint."""
  path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_damaged_checkpoint_falls_back_and_when_all_are_damaged_nothing_starts(case, tmp_path, lmjax_command):
  command, expected, unbroken = case
  workdir = shutil.copytree(unbroken, tmp_path / "run")
  assert committed(workdir) == [15, 20]
  flip_a_byte(workdir / "checkpoints" / "20")
  status, _, err = lmjax_command(*command(0, workdir))
  assert status == 0 and "The checkpoint of step 20" in err and "that of step 15 is used instead" in err
  assert outcome(workdir) == expected

  for step in (15, 20):
    flip_a_byte(workdir / "checkpoints" / str(step))
  before = (workdir / "metrics.jsonl").read_bytes()
  status, out, err = lmjax_command(*command(0, workdir))
  assert status in (1, 2) and out == "" and "Traceback" not in err
  assert err.splitlines()[-1].startswith(f"lmjax: error: All checkpoints in {workdir / 'checkpoints'} are damaged")
  assert (workdir / "metrics.jsonl").read_bytes() == before and committed(workdir) == [15, 20]


# In this process, each optimizer. An evaluation changes nothing and takes as long to compile.
SMALL_SETTINGS = (*SETTINGS, "model.num_layers=1", "model.embed_dim=32", "data.seq_len=32", "checkpoint.every_steps=4",
                  "eval.sets=()")
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
CHOSEN = {
    "adamw": (*MESH, MIXTURE, *PACKINGS["best_fit"], ACCUMULATION, AVERAGE, DROPOUT),
    "adafactor": (SINGLE, *PACKINGS["concat"], ACCUMULATION, DROPOUT),
    "lion": (MIXTURE, *PACKINGS["masked"], AVERAGE),
    "sgd": (SINGLE, *PACKINGS["best_fit"], DROPOUT),
    "muon": (MIXTURE, *PACKINGS["concat"], ACCUMULATION, AVERAGE),
    "schedule_free": (SINGLE, *PACKINGS["masked"], ACCUMULATION, DROPOUT),
    "sophia": (MIXTURE, *PACKINGS["best_fit"], DROPOUT),
}
ALL = [(name, *sources, *packing, *rest) for name, sources, packing, rest in itertools.product(
    CHOSEN, ((SINGLE,), (MIXTURE,)), PACKINGS.values(), ((), (ACCUMULATION, AVERAGE, DROPOUT)))]


class Stopped(Exception):
  """Stands for whatever ends a process."""


@pytest.fixture
def run(texts, debug, monkeypatch):
  """Returns a function that trains in a workdir, and raises Stopped before step `stop_at` where that is given."""
  make_train_step, make_mesh = train.make_train_step, partitioning.make_mesh

  def run(settings, workdir, stop_at=None):
    config = load_experiment(debug.removeprefix("--config="))
    apply_overrides(config, [setting.format(texts=texts) for setting in (*SMALL_SETTINGS, *settings)])
    num_devices = math.prod(size for size in config.mesh.values() if size > 0)
    monkeypatch.setattr(partitioning, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:num_devices]))

    def make(setup):
      step = make_train_step(setup)
      def one(state, *args):
        if int(state.step) + 1 == stop_at:
          raise Stopped
        return step(state, *args)
      return one
    monkeypatch.setattr(train, "make_train_step", make)
    train.train_and_evaluate(from_config_dict(config), str(workdir))
  return run


@pytest.mark.parametrize("name, settings", [
    *(pytest.param(name, settings, id=name) for name, settings in CHOSEN.items()),
    *(pytest.param(name, settings, marks=pytest.mark.slow) for name, *settings in ALL)])
def test_every_optimizer_goes_on_exactly(name, settings, run, tmp_path):
  settings = [*settings, f"optim.name={name}"] + ["optim.schedule=constant"] * (name == "schedule_free")
  run(settings, tmp_path / "unbroken")
  with pytest.raises(Stopped):
    run(settings, tmp_path / "broken", stop_at=11)
  assert committed(tmp_path / "broken")[-1] == 8 and last_step(tmp_path / "broken") >= 9
  run(settings, tmp_path / "broken")
  losses, result = outcome(tmp_path / "unbroken")
  assert_whole(losses, result)
  assert outcome(tmp_path / "broken") == (losses, result)
