"""The best checkpoint is kept and read, and a run that gets no better stops, also where it was interrupted between."""

import json
import shutil

import jax
import numpy as np
import pytest

import lmjax
from lmjax import evaluate, metrics, partitioning, train
from lmjax.checkpoint.best import Best
from lmjax.commands.experiment import apply_overrides, load_experiment
from lmjax.config import EvalConfig, UserError, base_config, from_config_dict

SETTINGS = ("train.num_steps=20", "train.sample_length=0", "optim.warmup_steps=1", "checkpoint.every_steps=1",
            "checkpoint.keep_last=1", "eval.every_steps=2", "eval.best_metric=validation/loss",
            "tracking.tensorboard=false", "optim.schedule=constant")
# By step; it is best at 6, and from 8 on waits.
LOSSES = {2: 3.0, 4: 2.0, 6: 1.0, 8: 1.5, 10: 1.1, 12: 1.0, 14: 0.5, 16: 0.4, 18: 0.45, 20: 0.41}


@pytest.fixture
def run(texts, debug, monkeypatch):
  """Returns a function from a workdir and settings to a run's result; its evaluations are scripted."""
  seen, make_mesh = {}, partitioning.make_mesh
  monkeypatch.setattr(partitioning, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))

  def scripted(self, params, num_batches):
    seen[metrics.digest(params)] = None
    step = 2 * len(seen) if self.first is None else self.first + 2 * (len(seen) - 1)
    yield "validation/loss", LOSSES[min(step, 20)]

  def run(workdir, *settings, first=None):
    seen.clear()
    monkeypatch.setattr(evaluate.Evaluator, "first", first, raising=False)
    monkeypatch.setattr(evaluate.Evaluator, "__call__", scripted)
    config = load_experiment(debug.removeprefix("--config="))
    apply_overrides(config, [*SETTINGS, f"data.source={texts}/notes/*.txt", *settings])
    return train.train_and_evaluate(from_config_dict(config), str(workdir))
  return run


def steps_of(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_run_stops_and_what_is_read_of_it_is_its_best(run, tmp_path):
  result = run(tmp_path / "run", "eval.patience=3")
  # Equal is not better, so that three evaluations, those of steps 8, 10 and 12, are waited for.
  assert (result["status"], result["step"], result["best_step"]) == ("finished", 12, 6)
  assert steps_of(tmp_path / "run") == [6, 12]
  assert json.loads((tmp_path / "run" / "best.json").read_text()) == {"step": 6, "value": 1.0}
  again = run(tmp_path / "run", "eval.patience=3")
  assert again == result
  _, params = lmjax.load(tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
  (tmp_path / "run" / "best.json").unlink()
  _, expected = lmjax.load(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_run_that_was_interrupted_waits_on(run, tmp_path):
  run(tmp_path / "whole", "eval.patience=3")
  run(tmp_path / "broken", "eval.patience=3", "train.num_steps=9")
  result = run(tmp_path / "broken", "eval.patience=3", first=10)
  assert (result["step"], result["best_step"]) == (12, 6) and steps_of(tmp_path / "broken") == [6, 12]


def test_without_patience_the_best_of_all_is_kept(run, tmp_path):
  result = run(tmp_path / "run")
  assert (result["step"], result["best_step"]) == (20, 16) and steps_of(tmp_path / "run") == [16, 20]


def test_better_is_what_the_settings_say():
  cfg = EvalConfig(best_metric="a", best_mode="max", best_min_change=0.1, patience=2)
  first = Best().after(1, {"a": 0.5}, cfg)
  assert first == Best(1, 0.5, 0)
  close = first.after(2, {"a": 0.59}, cfg)
  assert close == Best(1, 0.5, 1) and not close.is_over(cfg) and close.after(3, {"a": 0.6}, cfg).is_over(cfg)
  assert close.after(3, {"a": 0.61}, cfg) == Best(3, 0.61, 0)
  nan = first.after(2, {"a": float("nan")}, cfg)
  assert nan == Best(1, 0.5, 1)


@pytest.mark.parametrize("metric, mode, better", [
    ("validation/loss", None, 0.4), ("validation/accuracy", None, 0.6), ("validation/sst2/f1", None, 0.6),
    ("tasks/average", None, 0.6), ("validation/calibration_error", None, 0.4), ("validation/bits_per_byte", None, 0.4),
    ("validation/replaced_accuracy", None, 0.6), ("validation/replaced_loss", None, 0.4),
    ("validation/accuracy", "min", 0.4), ("validation/loss", "max", 0.6)])
def test_what_is_better_follows_from_the_metric_unless_it_is_said(metric, mode, better):
  cfg = EvalConfig(best_metric=metric, best_mode=mode)
  steps = [Best().after(1, {metric: 0.5}, cfg).after(2, {metric: value}, cfg).step for value in (better, 1 - better)]
  assert steps == [2, 1]


@pytest.mark.parametrize("settings, told", [
    (dict(patience=3), "config.eval.patience is set, but config.eval.best_metric is None"),
    (dict(best_metric="validation/loss"), "best_metric is set, but nothing is evaluated in the loop")])
def test_what_does_not_go_together_is_told(settings, told):
  config = base_config()
  config.train.num_steps = 1
  config.eval.update(settings)
  with pytest.raises(UserError, match=told):
    from_config_dict(config)


def test_a_metric_that_there_is_not_is_told(run, tmp_path):
  with pytest.raises(UserError, match="best_metric is 'validation/los', which the evaluations do not give; did you"):
    run(tmp_path / "run", "eval.best_metric=validation/los")
