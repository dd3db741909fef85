"""Trials that differ in numbers only: which they are, and that training them together is training each alone.

A model of one layer, D = 16, T = 16, on a short text. What is compiled is kept on disk, so that programs that are alike
are compiled once for all tests.
"""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from lmjax import checkpoint, partitioning, stack, train
from lmjax.config import base_config, from_config_dict
from lmjax.config_checks import Refused
from lmjax.sweeps import stacking

RATE = "optim.learning_rate"
RATES = [1e-3, 3e-3, 1e-2, 3e-2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("\n\n".join(f"The {'cat dog fox hen owl yak'.split()[i % 6]} saw {i * i % 101} of them run away."
                              for i in range(600)))
  return path


@pytest.fixture
def make(text, monkeypatch):
  """Returns a function from settings by name to a config, on one device unless it says otherwise."""
  make_mesh = partitioning.make_mesh
  monkeypatch.setattr(partitioning, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:mesh.data]))

  def make(settings=(), num_steps=8, devices=1):
    config = base_config()
    config.model.update(num_layers=1, embed_dim=16, num_heads=2)
    config.data.update(source=str(text), tokenizer="bytes", seq_len=16)
    config.optim.update(learning_rate=1e-2, warmup_steps=3)
    config.train.update(num_steps=num_steps, batch_size=8, sample_length=0, log_every_steps=1)
    config.eval.update(num_batches=1, final_num_batches=1, every_steps=4)
    config.tracking.tensorboard = False
    config.mesh.data = devices
    for name, value in dict(settings).items():
      group, _, field = name.rpartition(".")
      (config[group] if group else config)[field] = value
    return from_config_dict(config)
  return make


def together(configs, searched, folder, reports=(), trainer=None):
  """Returns the outcomes of trials that train together, in folder/0, folder/1 and so on."""
  key, = {stacking.key(config, searched) for config in configs}
  reports = reports or [None] * len(configs)
  trials = [stack.Trial(config, str(folder / str(i)), report, stacking.numbers(config, searched))
            for i, (config, report) in enumerate(zip(configs, reports))]
  return (trainer or stack.Trainer())(trials, key)


def records(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
  """Returns the losses of training and of evaluations, by step."""
  return [[record[name] for record in records(folder) if name in record] for name in ("loss", "validation/loss")]


def assert_is_its_own_run(config, outcome, folder, alone):
  expected = train.train_and_evaluate(config, str(alone))
  assert expected["status"] == outcome["status"] == "finished" and outcome.keys() == expected.keys()
  for made, wanted in zip(losses(folder), losses(alone)):
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5)
  assert len(losses(folder)[0]) == config.train.num_steps
  assert outcome["eval_loss"] == pytest.approx(expected["eval_loss"], rel=0, abs=1e-5)
  assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in alone.iterdir())
  assert [record.keys() for record in records(folder)] == [record.keys() for record in records(alone)]
  assert checkpoint.latest_step(folder) == config.train.num_steps


@pytest.fixture
def programs(monkeypatch):
  """Returns a list that grows by one for each program that a training step is traced for."""
  seen, update = [], train._train_step
  monkeypatch.setattr(train, "_train_step", lambda *args: seen.append(None) or update(*args))
  return seen


def test_learning_rates_make_one_program_together(make, tmp_path, programs):
  configs = [make({RATE: rate}, num_steps=16) for rate in RATES]
  outcomes = together(configs, [RATE], tmp_path)
  assert len(programs) == 1
  assert len({outcome["params_sha256"] for outcome in outcomes}) == 4
  for i in (0, 3):
    assert_is_its_own_run(configs[i], outcomes[i], tmp_path / str(i), tmp_path / f"alone{i}")
    restored = json.loads((tmp_path / str(i) / "config.json").read_text())
    assert restored["optim"]["learning_rate"] == RATES[i]


def test_learning_rates_make_one_program_one_after_another(make, tmp_path, programs):
  trainer = stack.Trainer()
  for i, rate in enumerate(RATES[:2]):
    outcome, = together([make({RATE: rate})], [RATE], tmp_path / str(i), trainer=trainer)
    assert outcome["status"] == "finished"
  assert len(programs) == 1
  together([make({"model.embed_dim": 32})], [RATE], tmp_path / "wide", trainer=trainer)
  assert len(programs) == 2


NUMBERS = {
    "seed": (0, 1), "model.dropout": (0.1, 0.3), "model.init_std": (0.02, 0.05), "optim.beta1": (0.9, 0.8),
    "optim.beta2": (0.95, 0.99), "optim.eps": (1e-8, 1e-6), "optim.clip_norm": (1.0, 0.1),
    "optim.weight_decay": (0.1, 0.5), "optim.warmup_steps": (3, 0), "optim.schedule": ("cosine", "wsd"),
    "train.ema_decay": (0.9, 0.99), "objective.label_smoothing": (0.1, 0.2), "objective.z_loss": (0.0, 1e-2)}


def test_every_number_is_each_members_own(make, tmp_path):
  configs = [make({name: values[i] for name, values in NUMBERS.items()}) for i in (0, 1)]
  outcomes = together(configs, NUMBERS, tmp_path)
  for i in (0, 1):
    assert_is_its_own_run(configs[i], outcomes[i], tmp_path / str(i), tmp_path / f"alone{i}")


# What is run alone reads each of these in a program of its own.
@pytest.mark.slow
@pytest.mark.parametrize("optimizer, name, values", [
    *(("adamw", name, values) for name, values in NUMBERS.items()), ("lion", "optim.beta2", (0.9, 0.99)),
    ("sgd", "optim.momentum", (0.5, 0.9)), ("muon", "optim.momentum", (0.8, 0.95)),
    ("muon", "optim.adam_learning_rate_ratio", (0.5, 1.0))])
def test_a_number_is_each_members_own(make, tmp_path, optimizer, name, values):
  configs = [make({"optim.name": optimizer, name: value}, num_steps=50) for value in values]
  outcomes = together(configs, [name], tmp_path)
  for i in (0, 1):
    assert_is_its_own_run(configs[i], outcomes[i], tmp_path / str(i), tmp_path / f"alone{i}")
  assert losses(tmp_path / "0") != losses(tmp_path / "1")


def test_members_on_eight_devices_are_those_on_one(make, tmp_path):
  settings = [{"seed": seed, RATE: rate} for seed in (0, 1) for rate in RATES + [2e-2]]
  outcomes = together([make(one, devices=8) for one in settings], ["seed", RATE], tmp_path)
  for i in (1, 8):  # Ten members have room for sixteen, two on a device.
    assert_is_its_own_run(make(settings[i]), outcomes[i], tmp_path / str(i), tmp_path / f"alone{i}")


def test_some_end_and_the_others_go_on(make, tmp_path):
  configs = [make({RATE: rate}) for rate in (1e-3, 1e35, 1e-2, 3e-2)]
  outcomes = together(configs, [RATE], tmp_path, [None, None, lambda step, values: True, None])
  assert isinstance(outcomes[1], Refused) and "lower config.optim.learning_rate" in str(outcomes[1])
  assert json.loads((tmp_path / "1" / "result.json").read_text())["status"] == "stopped"
  assert (outcomes[2]["status"], outcomes[2]["step"]) == ("pruned", 4)
  assert records(tmp_path / "2")[-1]["step"] == 4
  for i in (0, 3):
    assert_is_its_own_run(configs[i], outcomes[i], tmp_path / str(i), tmp_path / f"alone{i}")


def test_what_was_interrupted_goes_on(make, tmp_path):
  whole, broken, trainer = tmp_path / "whole", tmp_path / "broken", stack.Trainer()
  configs = [make({RATE: rate}) for rate in RATES]
  expected = together(configs, [RATE], whole, trainer=trainer)
  stop = lambda step, values: os.kill(os.getpid(), signal.SIGTERM)
  outcomes = together(configs, [RATE], broken, [stop, None, None, None], trainer)
  assert [(outcome["status"], outcome["step"]) for outcome in outcomes] == [("interrupted", 4)] * 4
  # A kill between two saves leaves some at another step.
  shutil.rmtree(broken / "1" / "checkpoints")
  outcomes = together(configs, [RATE], broken, trainer=trainer)
  for i, outcome in enumerate(outcomes):
    assert (outcome["status"], outcome["step"]) == ("finished", 8)
    for made, wanted in zip(losses(broken / str(i)), losses(whole / str(i))):
      np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6)
  assert [one["params_sha256"] for one in outcomes][2:] == [one["params_sha256"] for one in expected][2:]


def test_more_than_fit_are_trained_in_parts(make, tmp_path, monkeypatch, programs):
  """Four states fit, but not what a step needs beside them, as the compiler says; two do."""
  fits = iter([False])
  monkeypatch.setattr(stack.memory, "num_that_fit", lambda shapes: 4)
  monkeypatch.setattr(stack.memory, "program_fits", lambda compiled, besides: next(fits, True))
  configs = [make({RATE: rate}, num_steps=4) for rate in (*RATES, 2e-3, 2e-2)]
  outcomes = together(configs, [RATE], tmp_path)
  assert [outcome["status"] for outcome in outcomes] == ["finished"] * 6 and len(programs) == 2
  assert len({outcome["params_sha256"] for outcome in outcomes}) == 6


def test_an_interrupt_keeps_those_that_wait_from_starting(make, tmp_path, monkeypatch):
  monkeypatch.setattr(stack.memory, "num_that_fit", lambda shapes: 2)
  stop = lambda step, values: os.kill(os.getpid(), signal.SIGTERM)
  outcomes = together([make({RATE: rate}) for rate in RATES], [RATE], tmp_path, [stop, None, None, None])
  assert [(outcome["status"], outcome.get("step")) for outcome in outcomes] == [
      ("interrupted", 4)] * 2 + [("interrupted", None)] * 2
  assert [(tmp_path / str(i) / "metrics.jsonl").exists() for i in range(4)] == [True, True, False, False]


def groups(make, searched, *settings):
  return stacking.groups({i: make(one) for i, one in enumerate(settings)}, searched)


def test_a_mixed_grid_is_divided_by_what_does_not_stack(make):
  grid = [{RATE: rate, "model.num_layers": depth, "seed": seed} for rate in RATES[:2] for depth in (1, 2)
          for seed in (0, 1)]
  assert groups(make, [RATE, "model.num_layers", "seed"], *grid) == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("name, values, expected", [
    ("model.dropout", (0.0, 0.1, 0.2), [[0], [1, 2]]), ("optim.clip_norm", (None, 1.0, 2.0), [[0], [1, 2]]),
    ("train.ema_decay", (0.0, 0.9, 0.99), [[0], [1, 2]]), ("objective.z_loss", (0.0, 1e-4, 1e-3), [[0, 1, 2]]),
    ("train.batch_size", (8, 16), [[0], [1]]), ("train.num_steps", (8, 16), [[0], [1]]),
    ("model.norm_eps", (1e-5, 1e-6), [[0], [1]])])
def test_what_is_off_in_one_and_on_in_another_does_not_stack(make, name, values, expected):
  assert groups(make, [name], *({name: value} for value in values)) == expected


@pytest.mark.parametrize("settings", [
    {"optim.name": "adafactor"}, {"optim.name": "sophia"}, {"optim.offload": True}, {"mesh.context": 2},
    {"tracking.trackio_project": "mine"}])
def test_what_has_not_been_seen_to_work_does_not_stack(make, settings):
  assert groups(make, ["optim.beta2"], *({**settings, "optim.beta2": value} for value in (0.9, 0.99))) == [[0], [1]]


def test_only_what_a_sweep_varies_is_an_input_of_the_program(make):
  config = make({"model.dropout": 0.1})
  assert stacking.numbers(config, [RATE]) == {}
  assert stacking.numbers(config, ["model.dropout", "optim.beta1"]) == {"model.dropout": 0.1, "optim.beta1": 0.9}
  assert stacking.numbers(dataclasses.replace(config, seed=3), ["seed"]) == {}
