"""A sweep without training: `toy.py drive|work FOLDER [STORAGE]`. Each trial notes its starts and its end in a file."""

import json
import math
import os
import pathlib
import signal
import sys
import time

from lmjax.sweeps import Sweep, driver, grid
from lmjax.sweeps.board import Board
from lmjax.sweeps.sweep import resolve
from lmjax.sweeps.worker import work

LENGTH = 6  # Parts of a trial, each of which is a checkpoint.
SWEEP = Sweep(grid({"optim.learning_rate": [1e-3, 1e-2, 1e-1], "train.batch_size": [4, 8],
                    "model.num_layers": [2, 4]}), seed=0)


def loss_of(settings, step=LENGTH):
  rate = settings["optim.learning_rate"]
  return abs(math.log10(rate) + 2) + 1 / settings["train.batch_size"] + 1 / settings["model.num_layers"] + 1 / step


def run_trial(settings, folder, report, seconds=0.2):
  """Counts to LENGTH, goes on from what the folder has, and leaves a result."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "log", "a") as log:
    print("start", os.getpid(), file=log)
  done = len(list((folder / "checkpoints").glob("*"))) if (folder / "checkpoints").exists() else 0
  for step in range(done + 1, LENGTH + 1):
    time.sleep(seconds)
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    if report(step, {"validation/loss": loss_of(settings, step)}):
      return {"status": "pruned"}
  result = {"status": "finished", "eval_loss": loss_of(settings)}
  (folder / "new").write_text(json.dumps(result))
  os.replace(folder / "new", folder / "result.json")
  with open(folder / "log", "a") as log:
    print("end", file=log)
  return result


def main(what, folder, storage=None):
  board = Board(resolve(SWEEP), folder, storage)
  if what == "work":
    driver.follow_driver()
    sys.exit(0 if work(board, run_trial, pause=0.1) else 75)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  argv = [sys.executable, __file__, "work", folder, *([storage] if storage else [])]
  driver.drive(board, driver.Workers(argv, pathlib.Path(folder) / "workers", [{}] * 3), pause=0.1)


if __name__ == "__main__":
  main(*sys.argv[1:])
