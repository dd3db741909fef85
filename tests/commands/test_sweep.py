"""What `lmjax sweep` and its workers make of flags, files and settings before anything is trained."""

import os
import resource
import types

import pytest

from lmjax.commands import cli
from lmjax.commands import sweep as command
from lmjax.config import UserError
from lmjax.sweeps import Sweep, driver, values, worker
from lmjax.sweeps.sweep import resolve


def test_settings_that_make_no_config_are_like_no_others(monkeypatch):
  """A driver may choose some: a worker that only asks what they have in common with its own must not die of it."""
  seen = {}
  monkeypatch.setattr(driver, "follow_driver", lambda: None)
  monkeypatch.setattr(worker, "work", lambda board, run_trial, together: seen.update(together=together, run=run_trial)
                      or True)

  def make_config(settings):
    raise UserError("No.")
  board = types.SimpleNamespace(sweep=resolve(Sweep(values("model.num_heads", [3, 5]))))
  command._work(board, make_config, None, 1)
  assert seen["together"].alike({"model.num_heads": 3}) != seen["together"].alike({"model.num_heads": 5})
  with pytest.raises(UserError, match="No."):
    seen["run"]({"model.num_heads": 3}, None, None)


EXPERIMENT = """\
from lmjax.config import base_config
from lmjax.sweeps import *

def get_config():
  config = base_config()
  config.data.tokenizer = "bytes"
  config.train.update(num_steps=10, batch_size=8)
  config.eval.every_steps = 2
  return config

def get_sweep():
  return values("optim.learning_rate", [1e-3, 1e-2])
"""


@pytest.fixture
def experiment(tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(EXPERIMENT)
  return path


@pytest.fixture
def argv(experiment, tmp_path):
  return ["sweep", f"--config={experiment}", f"--workdir={tmp_path / 'sweep'}"]


def test_the_experiment_is_read_once(experiment, argv):
  _, base, make_config = command._read(cli.parse(command, "sweep", argv[1:]))
  experiment.write_text("")
  first, second = make_config({"optim.learning_rate": 3.0}), make_config({"model.num_layers": 3})
  assert (first.optim.learning_rate, first.model.num_layers) == (3.0, base.model.num_layers)
  assert (second.optim.learning_rate, second.model.num_layers) == (base.optim.learning_rate, 3)
  assert make_config({}) == base and base.train.num_steps == 10


def test_too_many_workers_leave_nothing_behind(argv, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert cli.run([*argv, "--workers=2"]) == 2 and "there are 1 GPUs" in capsys.readouterr().err
  assert not (tmp_path / "sweep").exists()


def test_a_pruner_whose_metric_is_not_evaluated_is_refused(argv, tmp_path, capsys):
  assert cli.run([*argv, "--pruner=asha", "--metric=train_loss"]) == 2
  assert "pruner is asha, but its metric train_loss is none of those that evaluations" in capsys.readouterr().err
  assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("flags, most, told", [
    ([], None, False), (["--pruner=asha"], None, False), (["--pruner=median"], 1, True),
    (["--pruner=hyperband"], 1, True), (["--pruner=median", "--stack=3"], 3, False)])
def test_pruners_that_wait_for_results_train_trials_one_by_one(argv, monkeypatch, capsys, flags, most, told):
  seen = []
  monkeypatch.setattr(command, "_list", lambda *args: seen.append(args[-1]))
  assert cli.run([*argv, *flags, "--dry_run"]) == 0 and seen == [most]
  monkeypatch.setattr(driver, "drive", lambda *_: False)
  with pytest.raises(SystemExit):
    cli.run([*argv, *flags])
  assert ("so that they train one after another; --stack=N has N" in capsys.readouterr().err) == told


def test_workers_are_not_the_processes_of_one_run(argv, monkeypatch):
  monkeypatch.setenv("LMJAX_DISTRIBUTED", "auto")
  monkeypatch.setattr(command, "_drive", lambda *_: None)
  assert cli.run(argv) == 0 and "LMJAX_DISTRIBUTED" not in os.environ


@pytest.mark.parametrize("limits, count, after", [
    ((1024, 4200), 250, 4200), ((100, 100), 1, 100), ((1024, resource.RLIM_INFINITY), 51, 1024)])
def test_as_many_train_together_as_files_may_be_open(monkeypatch, limits, count, after):
  now = list(limits)

  def ask(_, wanted):
    if wanted[0] == resource.RLIM_INFINITY:
      raise ValueError("not allowed")
    now[:] = wanted
  monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
  monkeypatch.setattr(resource, "setrlimit", ask)
  assert command._num_with_files() == count and now[0] == after
