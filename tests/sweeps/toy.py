"""A sweep without training: `toy.py drive|work FOLDER alone|together [STORAGE]`.

Each trial notes its starts and its end in a file.
"""

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
from lmjax.sweeps.worker import Together, work

LENGTH = 6  # Parts of a trial, each of which is a checkpoint.
SWEEP = Sweep(grid({"optim.learning_rate": [1e-3, 1e-2, 1e-1], "train.batch_size": [4, 8],
                    "model.num_layers": [2, 4]}), seed=0)


def loss_of(settings, step=LENGTH):
  rate = settings["optim.learning_rate"]
  return abs(math.log10(rate) + 2) + 1 / settings["train.batch_size"] + 1 / settings["model.num_layers"] + 1 / step


def run_trials(trials, seconds=0.2):
  """Counts to LENGTH in all trials, goes on from what the folders have, and leaves results."""
  done = []
  for _, folder, _ in trials:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "a") as log:
      print("start", os.getpid(), file=log)
    done.append(len(list((folder / "checkpoints").glob("*"))) if (folder / "checkpoints").exists() else 0)
  pruned = set()
  for step in range(min(done) + 1, LENGTH + 1):
    time.sleep(seconds)
    for number, (settings, folder, report) in enumerate(trials):
      if step > done[number] and number not in pruned:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        pruned |= {number} if report(step, {"validation/loss": loss_of(settings, step)}) else set()
  return [{"status": "pruned"} if number in pruned else _end(settings, folder)
          for number, (settings, folder, _) in enumerate(trials)]


def _end(settings, folder):
  result = {"status": "finished", "eval_loss": loss_of(settings)}
  (folder / "new").write_text(json.dumps(result))
  os.replace(folder / "new", folder / "result.json")
  with open(folder / "log", "a") as log:
    print("end", file=log)
  return result


def main(what, folder, how="alone", storage=None):
  board = Board(resolve(SWEEP), folder, storage)
  if what == "work":
    driver.follow_driver()
    alike = lambda settings: str(settings["model.num_layers"])
    together = Together(alike, most=4, workers=3, run=run_trials) if how == "together" else None
    sys.exit(0 if work(board, lambda *one: run_trials([one])[0], pause=0.1, together=together) else 75)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  argv = [sys.executable, __file__, "work", folder, how, *([storage] if storage else [])]
  driver.drive(board, driver.Workers(argv, pathlib.Path(folder) / "workers", [{}] * 3), pause=0.1)


if __name__ == "__main__":
  main(*sys.argv[1:])
