"""A sweep whose workers and driver are killed at random ends as one that nobody touched."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from lmjax.sweeps.board import Board
from lmjax.sweeps.sweep import planned_settings, resolve
from tests.sweeps import toy

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_KILLS = 8


def start(folder, how, storage):
  return subprocess.Popen([sys.executable, toy.__file__, "drive", folder, how, *storage], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def workers_of(process):
  path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def starts_in(folder):
  return sum(path.read_text().count("start") for path in folder.glob("trials/*/log"))


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds workers by /proc")
@pytest.mark.parametrize("kind, how", [
    ("journal", "alone"), ("journal", "together"), pytest.param("sqlite", "alone", marks=pytest.mark.slow),
    pytest.param("sqlite", "together", marks=pytest.mark.slow)])
def test_every_trial_ends_once_whoever_is_killed(kind, how, tmp_path):
  storage = [f"sqlite:///{tmp_path / 'sweep.db'}"] if kind == "sqlite" else []
  draws, folder, killed = random.Random(0), tmp_path / "sweep", {"driver": 0, "worker": 0}
  driver = start(folder, how, storage)
  try:
    for _ in range(NUM_KILLS):
      seen = starts_in(folder)
      while starts_in(folder) == seen and driver.poll() is None:
        time.sleep(0.05)  # Python and Optuna take a while to start.
      time.sleep(draws.uniform(0, 0.8))
      if driver.poll() is not None:
        break
      workers = workers_of(driver)
      if draws.random() < 0.4 or not workers:
        driver.kill()
        driver.wait()
        killed["driver"] += 1
        driver = start(folder, how, storage)
      else:
        os.kill(draws.choice(workers), signal.SIGKILL)
        killed["worker"] += 1
    assert driver.wait(timeout=60) == 0
  finally:
    driver.kill()
  assert killed["driver"] and killed["worker"], killed
  sweep = resolve(toy.SWEEP)
  rows = Board(sweep, folder, *storage).rows()
  assert [row.settings for row in rows] == planned_settings(sweep) and len(rows) == 12
  assert [(row.state, row.value) for row in rows] == [("complete", toy.loss_of(row.settings)) for row in rows]
  for row in rows:
    run = folder / "trials" / f"{row.number:03}"
    assert json.loads((run / "result.json").read_text())["eval_loss"] == row.value
    # Parts are made one after another, and one that is made again would find its folder there.
    assert sorted(int(part.name) for part in (run / "checkpoints").iterdir()) == list(range(1, toy.LENGTH + 1))
    log = (run / "log").read_text().split("\n")
    assert not [line for line in log[log.index("end") + 1:] if line] if "end" in log else True
  assert starts_in(folder) > 12
  if kind == "journal":
    # Of the operations that set a trial's state (6), each trial has one to COMPLETE (1).
    operations = map(json.loads, (folder / "optuna.journal").read_text().splitlines())
    ends = [op["trial_id"] for op in operations if op["op_code"] == 6 and op["state"] == 1]
    assert sorted(ends) == list(range(12))
