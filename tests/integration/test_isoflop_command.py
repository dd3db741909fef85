"""`lmjax isoflop` as a user runs it: its table, that a sweep runs what it lays out, and a wrong request's sentence."""

import importlib.util
import json
import pathlib
import re

import pytest

from lmjax.commands import cli
from lmjax.sweeps.sweep import planned_settings, resolve

SWEEP = pathlib.Path(cli.__file__).parents[2] / "experiments" / "sweeps" / "isoflop.py"


def isoflop(capsys, *argv):
  capsys.readouterr()
  assert cli.run(["isoflop", f"--config={SWEEP}", *argv]) == 0
  return capsys.readouterr().out.splitlines()


def test_a_sweep_runs_exactly_what_is_laid_out(capsys, tmp_path):
  spec = importlib.util.spec_from_file_location("experiment", SWEEP)
  experiment = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(experiment)
  budgets = ",".join(f"{budget:g}" for budget in experiment.CPU)
  isoflop(capsys, f"--budgets={budgets}", "--sizes=3", f"--json={tmp_path / 'runs.json'}")
  laid_out = [run["settings"] for run in json.loads((tmp_path / "runs.json").read_text())]
  assert laid_out == planned_settings(resolve(experiment.get_sweep())) and len(laid_out) == 9


def test_the_table_adds_up(capsys):
  *lines, total = isoflop(capsys, "--budgets=1e11,2e11", "--depths=2,3", "--tokens_per_epoch=1e6")
  head, rows = lines[0].split("  "), [line.split() for line in lines[1:]]
  assert "FLOPs" in lines[0] and "epochs" in head[-1] and len(rows) == 4
  names = ["budget", "depth", "width", "heads", "parameters", "non-embedding", "tokens", "a parameter", "steps",
           "batch", "rate", "FLOPs", "share", "epochs"]
  table = [dict(zip(names, (cell.replace(",", "") for cell in row))) for row in rows]
  assert [(row["depth"], row["width"], row["heads"]) for row in table] == [("2", "32", "2"), ("3", "48", "3")] * 2
  for row in table:
    assert float(row["tokens"]) == float(row["steps"]) * float(row["batch"]) * 128
    assert float(row["epochs"]) == pytest.approx(float(row["tokens"]) / 1e6, abs=0.006)
    assert float(row["FLOPs"]) == pytest.approx(float(row["budget"]), rel=0.02)
  assert sum(float(row["share"][:-1]) for row in table) == pytest.approx(100, abs=0.3)
  assert total.startswith("4 runs, ") and float(total.split()[2]) == pytest.approx(6e11, rel=0.02)


def test_what_goes_beyond_the_total_is_named(capsys):
  lines = isoflop(capsys, "--budgets=1e11,2e11", "--depths=2,3", "--total=3e11")
  assert lines[-1] == "Beyond --total=3e+11 and left out: 2e+11." and lines[-2].startswith("2 runs, ")
  lines = isoflop(capsys, "--depths=1,2,8", "--total=3e11")
  assert lines[-1].startswith("Beyond --total=3e+11 and left out: ") and lines[-1].endswith(" 8.")


@pytest.mark.parametrize("argv, message", [
    ([], r"lmjax isoflop needs --budgets"),
    (["--budgets=1e11,x"], r"--budgets is '1e11,x', but it must be numbers with commas between, such as 1e18,3e18"),
    (["--budgets=1e11,inf"], r"--budgets has inf, but each must be a finite number above 0"),
    (["--budgets=1e11", "--law={law}"], r"The law of --law has no numbers for all parameters of its form chinchilla"),
    (["--depths=2,2.5"], r"--depths is '2,2\.5', but it must be numbers with commas between, such as 4,6,8"),
    (["--budgets=1e11", "--law=nowhere.json"], r"--law=nowhere\.json cannot be read \(No such file or directory\)"),
    (["--budgets=1e11", "--tokens_per_epoch=0"], r"--tokens_per_epoch is 0, but it must be above 0"),
    (["--budgets=1e11", "--depths=2", "--json=nowhere/runs.json"], r"--json=nowhere/runs\.json cannot be written"),
])
def test_a_wrong_request(run_wrong, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  law = tmp_path / "law.json"
  law.write_text(json.dumps({"form": "chinchilla", "conventions": {"N": "column num_params"}, "E": 1.7, "A": None,
                             "B": 410.0, "alpha": 0.34, "beta": 0.28}))
  status, _, line = run_wrong("isoflop", f"--config={SWEEP}", *(argument.format(law=law) for argument in argv))
  assert status == 2 and re.search(message, line), line
