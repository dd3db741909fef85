"""Seeing a run at work: a trace, the share of useful time, and a warning when a step is compiled again."""

import json

from absl import logging
import jax
import jax.numpy as jnp
import pytest

from lmjax import watch
from lmjax.commands import cli

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
  import time
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
