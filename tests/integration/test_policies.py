"""What a run does when its loss stops being finite, or leaps: both are put into its batches."""

import json
import re

import numpy as np
import pytest

from lmjax import train
from lmjax.commands import cli
from lmjax.data import pipeline

NUM_STEPS, BAD_STEP = 16, 12
SETTINGS = ("data.source={texts}/notes/*.txt", "data.tokenizer=bytes", "data.seq_len=32", "model.num_layers=1",
            "model.embed_dim=32", "train.num_steps=16", "train.log_every_steps=1", "train.sample_length=0",
            "optim.warmup_steps=0", "optim.learning_rate=0.01", "checkpoint.every_steps=4", "eval.sets=()",
            "tracking.tensorboard=false")


def not_finite(batch):
  return {**batch, "weights": batch["weights"] * np.float32(np.nan)}


def surprising(batch):
  """The text ends at every place: the one thing that training has not seen."""
  return {**batch, "targets": np.full_like(batch["targets"], 256)}


@pytest.fixture
def run(texts, debug, tmp_path, monkeypatch, capsys):
  """Returns a function that trains with one batch changed, to (exit status, stderr, {step: (loss, whether its update
  was applied)}, result, steps of the checkpoints)."""
  train_batches = pipeline.train_batches
  monkeypatch.setattr(train, "_SPIKE_HISTORY", 8)

  def run(spoil, *settings):
    def batches(*args, start_step, **kwargs):
      for number, batch in enumerate(train_batches(*args, start_step=start_step, **kwargs), start_step + 1):
        yield spoil(batch) if number == BAD_STEP else batch
    monkeypatch.setattr(pipeline, "train_batches", batches)
    workdir = tmp_path / "run"
    capsys.readouterr()
    status = cli.run(["train", debug, f"--workdir={workdir}",
                      *(f"--config.{setting.format(texts=texts)}" for setting in (*SETTINGS, *settings))])
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((workdir / "result.json").read_text())
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    losses = {record["step"]: (record["loss"], record["applied"]) for record in records}
    return status, capsys.readouterr().err, losses, result, steps
  return run


BAD = {
    "nonfinite": (not_finite, "on_nonfinite", (), "is not finite"),
    "spike": (surprising, "on_spike", ("train.spike_threshold=1.0",), "is a spike"),
}


@pytest.mark.parametrize("kind", BAD)
def test_stop_keeps_what_was_saved_and_says_so_in_one_sentence(run, kind):
  spoil, setting, more, words = BAD[kind]
  status, err, losses, result, steps = run(spoil, f"train.{setting}=stop", *more)
  assert status in (1, 2) and "Traceback" not in err
  last = err.splitlines()[-1]
  assert re.match(rf"lmjax: error: The loss or gradient at step {BAD_STEP} {words} ", last)
  assert f"config.train.{setting}=skip" in last
  assert (result["status"], result["step"], result["params_sha256"]) == ("stopped", BAD_STEP, None)
  # Nothing is saved at that step, nor written of it.
  assert max(losses) == BAD_STEP - 1 and steps == [4, 8]


@pytest.mark.parametrize("kind", BAD)
def test_skip_drops_that_update_and_goes_on(run, kind):
  spoil, setting, more, words = BAD[kind]
  status, err, losses, result, steps = run(spoil, f"train.{setting}=skip", *more)
  assert status == 0 and f"at step {BAD_STEP}" in err and words in err
  assert [step for step, (_, applied) in losses.items() if not applied] == [BAD_STEP]
  bad, after = losses[BAD_STEP][0], losses[BAD_STEP + 1][0]
  assert bad is None if kind == "nonfinite" else bad > losses[BAD_STEP - 1][0] + 1
  assert after < losses[1][0] - 1
  assert (result["status"], result["step"], steps[-1]) == ("finished", NUM_STEPS, NUM_STEPS)
