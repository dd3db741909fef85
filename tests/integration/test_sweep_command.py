"""`lmjax sweep` as a user runs it: a small grid of real runs, what goes on after a kill, and how mistakes are told."""

import json
import re
import shlex
import signal
import time

import pytest

from lmjax import train
from lmjax.commands.experiment import load_experiment
from lmjax.config import from_config_dict
from lmjax.scaling import runs

EXPERIMENT = """\
from lmjax.config import base_config
from lmjax.sweeps import *

def get_config(num_steps=8):
  config = base_config()
  config.model.update(num_layers=1, embed_dim=32, num_heads=2)
  config.data.update(tokenizer="bytes", seq_len=32, source="{texts}/notes/*.txt")
  config.optim.update(warmup_steps=2)
  config.train.update(num_steps=int(num_steps), batch_size=8, sample_length=0, log_every_steps=1)
  config.eval.update(every_steps=4, num_batches=1, final_num_batches=2)
  config.checkpoint.update(every_steps=4)
  config.tracking.tensorboard = False
  return config

def get_sweep():
  return {sweep}
"""
GRID = 'grid({"optim.learning_rate": [1e-3, 1e-2], "model.num_layers": [1, 2]})'


@pytest.fixture
def experiment(tmp_path, texts):
  """Returns a function from the text of a sweep to the flag of an experiment that has it."""
  def write(sweep, argument=""):
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT.format(texts=texts, sweep=sweep))
    return f"--config={path}{argument}"
  return write


def outcome(folder):
  """Returns what a run has come to, and its losses."""
  result = json.loads((folder / "result.json").read_text())
  records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return ([result[name] for name in ("status", "step", "train_loss", "eval_loss", "params_sha256")],
          [(record["step"], record.get("loss"), record.get("validation/loss")) for record in records])


def test_a_grid_is_listed_run_and_read(lmjax_command, experiment, tmp_path):
  config, sweep = experiment(GRID), tmp_path / "sweep"
  listed = lmjax_command.succeed("sweep", config, f"--workdir={sweep}", "--sweep.dry_run").splitlines()
  assert not sweep.exists() and len(listed) == 7
  assert listed[0].split() == ["trial", "parameters", "FLOPs", "time", "settings"]
  assert listed[4].endswith("optim.learning_rate=0.01 model.num_layers=2")
  assert listed[5] == "2 programs: trials 0, 2 (2 together); trials 1, 3 (2 together)"

  out = lmjax_command.succeed("sweep", config, f"--workdir={sweep}", "--workers=2")
  record = json.loads((sweep / "sweep.json").read_text())
  values = [trial["value"] for trial in record["trials"]]
  assert len(values) == 4 and values == sorted(values)
  assert {trial["state"] for trial in record["trials"]} == {"complete"}
  assert out.splitlines()[1].split()[:2] == [str(record["trials"][0]["number"]), "complete"]

  # What was foretold has come.
  for number, line in enumerate(listed[1:5]):
    result = json.loads((sweep / "trials" / f"{number:03}" / "result.json").read_text())
    _, params, flops, *_ = line.split()
    assert int(params.replace(",", "")) == result["num_params"]
    assert float(flops) == pytest.approx(result["train_flops"], rel=0.01)

  # The command of a trial, on its own, makes the same run.
  worst = record["trials"][-1]
  argv = shlex.split(worst["command"])[1:]
  assert argv[-1] == f"--workdir={sweep}/trials/{worst['number']:03}"
  lmjax_command.succeed(*argv[:-1], f"--workdir={tmp_path / 'alone'}")
  assert outcome(tmp_path / "alone") == outcome(sweep / "trials" / f"{worst['number']:03}")

  # lmjax fit finds the runs, and what they vary.
  table = runs.read_table(str(sweep))
  assert sorted(zip(table.columns["optim.learning_rate"], table.columns["model.num_layers"])) == [
      (0.001, 1), (0.001, 2), (0.01, 1), (0.01, 2)]
  assert sorted(table.columns["eval_loss"]) == values
  # Again, nothing is left to do.
  before = sorted((path, path.stat().st_mtime) for path in sweep.glob("trials/*/*"))
  assert lmjax_command.succeed("sweep", config, f"--workdir={sweep}") == out
  assert sorted((path, path.stat().st_mtime) for path in sweep.glob("trials/*/*")) == before


def test_a_killed_and_an_interrupted_sweep_go_on(lmjax_command, experiment, tmp_path):
  config, whole, broken = experiment('values("seed", [0, 1])', ":40"), tmp_path / "whole", tmp_path / "broken"
  lmjax_command.succeed("sweep", config, f"--workdir={whole}")
  for stop in (signal.SIGKILL, signal.SIGTERM):
    process = lmjax_command.start("sweep", config, f"--workdir={broken}")
    seen = len(list(broken.glob("trials/*/checkpoints/*")))
    until = time.monotonic() + 120
    while len(list(broken.glob("trials/*/checkpoints/*"))) == seen and process.poll() is None:
      assert time.monotonic() < until
      time.sleep(0.05)
    process.send_signal(stop)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
      assert "interrupted; the same command goes on" in err or "2 of 2" in err
  lmjax_command.succeed("sweep", config, f"--workdir={broken}")
  for number in ("000", "001"):
    assert outcome(broken / "trials" / number) == outcome(whole / "trials" / number)


def test_a_pruned_run_stops_and_can_go_on(experiment, tmp_path):
  spec = experiment(GRID).removeprefix("--config=")
  config, told = from_config_dict(load_experiment(spec)), []

  def report(step, values):
    told.append((step, values["validation/loss"] > 0))
    return True
  result = train.train_and_evaluate(config, str(tmp_path / "run"), report=report)
  assert (result["status"], result["step"], told) == ("pruned", 4, [(4, True)])
  assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "pruned"
  result = train.train_and_evaluate(config, str(tmp_path / "run"))
  assert (result["status"], result["step"]) == ("finished", 8)


@pytest.mark.parametrize("sweep, argv, message", [
    ("None", [], r"get_sweep\(\) of .*experiment\.py returned NoneType, but it must return"),
    ('values("optim.learning_rat", [1])', [], r"'optim\.learning_rat' that does not exist; did you mean"),
    (GRID, ["--config.model.num_layers=3"], r"--config\.model\.num_layers is given, but the sweep sets it"),
    (GRID, ["--driver=girl"], r"driver is 'girl', which it does not know; did you mean 'grid'\?"),
    (GRID, ["--workers=0"], r"--workers is 0, but it must be at least 1"),
    (GRID, ["--driver=random"], r"needs to know how many trials to make; give --num_trials"),
    (GRID, ["--storage=nonsense"], r"--storage=nonsense cannot be opened"),
    ('grid({"model.num_heads": [2, 3]})', [], r"Trial 1 of the sweep \(--config\.model\.num_heads=3\) cannot work: "
     r"config\.model\.num_heads = 3 does not divide embed_dim = 32"),
    (GRID, ["--pruner=median", "--config.eval.every_steps=none"], r"pruner is median, but nothing is evaluated in the "
     r"loop; set config\.eval\.every_steps"),
    ("1 / 0", [], r"experiment\.py, line \d+, raised ZeroDivisionError"),
])
def test_a_wrong_request(run_wrong, experiment, tmp_path, sweep, argv, message):
  status, err, line = run_wrong("sweep", experiment(sweep), f"--workdir={tmp_path / 'sweep'}", *argv)
  assert status == 2 and len(err.splitlines()) == 1 and re.search(message, line), err
  assert not list(tmp_path.glob("sweep/trials/*"))


def test_an_experiment_without_a_sweep(run_wrong, debug, tmp_path):
  _, _, line = run_wrong("sweep", debug, f"--workdir={tmp_path / 'sweep'}")
  assert "has no function get_sweep(), which says what a sweep tries" in line


def test_a_sweep_whose_trials_all_fail(lmjax_command, experiment, tmp_path):
  config = experiment('values("data.tokenizer", ["nowhere.json"])')
  status, out, err = lmjax_command("sweep", config, f"--workdir={tmp_path / 'sweep'}")
  assert status == 1 and "None of the sweep's 1 trials has a result (" in err and "nowhere.json" in err
  assert out.splitlines()[1].split()[:2] == ["0", "failed"]
