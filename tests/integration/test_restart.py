"""A run that is killed or interrupted and started again ends with the numbers of one that was not."""

import json
import random
import signal
import time

import pytest

NUM_STEPS = 20
# A step takes long enough that there is time to stop a run between its first checkpoint and its end.
SETTINGS = ("train.num_steps=20", "train.batch_size=64", "train.log_every_steps=1", "train.sample_length=0",
            "optim.warmup_steps=5", "checkpoint.every_steps=5", "eval.every_steps=5", "eval.num_batches=1",
            "eval.final_num_batches=1", "tracking.tensorboard=false")
COMBINED = ("train.grad_accum_steps=2", "train.ema_decay=0.9", "model.dropout=0.1", "data.packing=best_fit",
            "optim.name=muon")


@pytest.fixture(scope="module", params=[(), COMBINED], ids=["plain", "combined"])
def experiment(request, texts, debug, command_line_in, tmp_path_factory):
  """Returns (the command that trains, but for its workdir; the metrics and result of a run that nothing stopped)."""
  command = ["train", debug, f"--config.data.source={texts}/notes/*.txt",
             *(f"--config.{setting}" for setting in (*SETTINGS, *request.param))]
  workdir = tmp_path_factory.mktemp("unbroken") / "run"
  command_line_in(workdir.parent).succeed(*command, f"--workdir={workdir}")
  return command, *outcome(workdir)


def outcome(workdir):
  """Returns a run's (step, name, value) of all losses, and its result without what is timing."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [(record["step"], name, record[name]) for record in records for name in record if "loss" in name]
  result = json.loads((workdir / "result.json").read_text())
  return losses, {name: value for name, value in result.items() if name not in ("tokens_per_second", "mfu")}


def stop(process, workdir, how, delay):
  """Sends a signal `delay` seconds after the first checkpoint is there; returns the exit status."""
  deadline = time.monotonic() + 240
  while not (workdir / "checkpoints" / "5").is_dir():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    time.sleep(0.01)
  time.sleep(delay)
  process.send_signal(how)
  return process.wait(timeout=120)


def assert_same(workdir, experiment):
  _, losses, result = experiment
  found_losses, found_result = outcome(workdir)
  assert found_losses == losses
  assert found_result == result


def test_the_unbroken_run_is_whole(experiment):
  _, losses, result = experiment
  assert [step for step, name, _ in losses if name == "loss"] == list(range(1, NUM_STEPS + 1))
  assert [step for step, name, _ in losses if name == "validation/loss"] == [5, 10, 15, 20]
  assert losses[0][2] > losses[-1][2] + 0.5
  assert (result["status"], result["step"]) == ("finished", NUM_STEPS)


def test_killed_and_started_again(experiment, tmp_path, lmjax_command):
  command = [*experiment[0], f"--workdir={tmp_path / 'run'}"]
  delay = random.uniform(0.0, 0.5)
  status = stop(lmjax_command.start(*command), tmp_path / "run", signal.SIGKILL, delay)
  assert status == -signal.SIGKILL and not (tmp_path / "run" / "result.json").exists(), f"killed after {delay} s"
  lmjax_command.succeed(*command)
  assert_same(tmp_path / "run", experiment)


def test_interrupted_and_started_again(experiment, tmp_path, lmjax_command):
  command, workdir = [*experiment[0], f"--workdir={tmp_path / 'run'}"], tmp_path / "run"
  process = lmjax_command.start(*command)
  assert stop(process, workdir, signal.SIGTERM, random.uniform(0.0, 0.5)) == 0
  result = json.loads((workdir / "result.json").read_text())
  assert result["status"] == "interrupted" and 5 <= result["step"] < NUM_STEPS
  assert (workdir / "checkpoints" / str(result["step"])).is_dir()
  assert f"Interrupted after step {result['step']}" in process.stderr.read()
  lmjax_command.succeed(*command)
  assert_same(workdir, experiment)
