"""Seeing a run at work: a trace, the share of useful time, and a warning when a step is compiled again."""

import json
import time

from absl import logging
import jax
import jax.numpy as jnp
import pytest

from lmjax import metrics, watch
from lmjax.commands import cli
from lmjax.peers import Peers

SMALL = ("data.tokenizer=bytes", "data.source={texts}/notes/*.txt", "optim.warmup_steps=0", "train.sample_length=0",
         "eval.num_batches=1", "eval.final_num_batches=1", "tracking.tensorboard=false", "train.log_every_steps=2")


def train(texts, debug, workdir, num_steps, *argv):
  flags = [f"--config.{setting.format(texts=texts)}" for setting in (*SMALL, f"train.num_steps={num_steps}")]
  assert cli.run(["train", debug, f"--workdir={workdir}", *flags, *argv]) == 0
  return json.loads((workdir / "result.json").read_text())


def test_a_trace_is_written_of_the_steps_asked_for(texts, debug, tmp_path):
  train(texts, debug, tmp_path / "run", 4, "--profile=2-3")
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  train(texts, debug, tmp_path / "plain", 4)
  assert not (tmp_path / "plain" / "profile").exists()


def test_goodput_counts_the_time_between_restarts(texts, debug, tmp_path, monkeypatch):
  first = train(texts, debug, tmp_path / "run", 6, "--config.optim.schedule=constant")
  assert 0 < first["goodput"] < 1
  line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
  assert 0 <= line["data_wait"] <= 1
  real = time.time
  monkeypatch.setattr(time, "time", lambda: real() + 1000)  # It stood still for long.
  second = train(texts, debug, tmp_path / "run", 12, "--config.optim.schedule=constant")
  assert 0 < second["goodput"] < first["goodput"] / 5


def test_compiling_a_step_again_is_told(monkeypatch):
  told = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: told.append(text % args))
  step = jax.jit(lambda x: x + 1)
  with watch.Recompilations() as recompilations:
    for number, size in enumerate((3, 3, 4, 4), 1):
      with recompilations.expected(number == 1, number):
        step(jnp.zeros(size))
  assert len(told) == 1 and told[0].startswith("Step 3 was compiled again")


@pytest.mark.parametrize("value", ["0", "5-3", "x", "1-"])
def test_steps_that_are_none_are_told(run_wrong, debug, value, tmp_path):
  status, _, line = run_wrong("train", debug, f"--workdir={tmp_path / 'run'}", f"--profile={value}")
  assert status == 2 and f"--profile is {value!r}" in line


def test_the_watchdog_shows_the_threads_of_a_run_that_stands_and_one_process_goes_on(monkeypatch, capfd):
  told = []
  monkeypatch.setattr(logging, "error", lambda text, *args: told.append(text % args))
  clock = metrics.Clock(1, 1.0, None)
  with watch.Watchdog(clock, 0.2, Peers()):
    time.sleep(0.5)
    assert told == []  # The first step compiles.
    clock.tick()
    with clock.paused("evaluation"):
      time.sleep(0.5)
    assert told == []
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
      time.sleep(0.01)
  assert told[0].startswith("No step has ended for 0.2 s. This is where each thread stands")
  assert "in test_the_watchdog_shows_the_threads" in capfd.readouterr().err
  with watch.Watchdog(clock, 0, Peers()):
    time.sleep(0.3)
  assert len(told) < 3


@pytest.fixture
def first_of(monkeypatch):
  """Returns a function from what each process says of its steps to what process 0 makes of it, and its warnings."""
  def first_of(*lines):
    warned, peers = [], Peers()
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    names = ("step_seconds", "host_seconds", "data_seconds")
    monkeypatch.setattr(peers, "_lines", {process: dict(zip(names, line)) for process, line in enumerate(lines)})
    return [peers.slowest(step) for step in (40, 50, 60)][0], warned
  return first_of


@pytest.mark.parametrize("lines, slowest, warns", [
    ([(1.0, 0.1, 0.0), (1.0, 0.2, 0.0), (1.0, 0.99, 0.9)], (2, 0.99, 0.2), True),  # The others wait for it.
    ([(1.0, 0.1, 0.0), (1.0, 0.2, 0.0), (1.0, 0.6, 0.5)], (2, 0.6, 0.2), False),  # Its devices are slower yet.
    ([(1.0, 0.9, 0.8), (1.0, 0.95, 0.9), (1.0, 0.99, 0.9)], (2, 0.99, 0.95), False)])  # All are slow.
def test_a_process_that_the_others_wait_for_is_told_once(first_of, lines, slowest, warns):
  found, warned = first_of(*lines)
  assert found == dict(zip(("slowest_process", "slowest_host_seconds", "median_host_seconds"), slowest))
  assert len(warned) == warns and all("Process 2 holds the others up: by step 50" in line for line in warned)
