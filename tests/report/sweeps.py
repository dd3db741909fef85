"""Sweeps without training: a real board, and runs that write what real ones would."""

import json
import math

from lmjax import config as config_lib
from lmjax.config_checks import Refused
from lmjax.sweeps import Sweep
from lmjax.sweeps.board import Board
from lmjax.sweeps.sweep import resolve
from lmjax.sweeps.worker import work

TRAIN = ("lmjax", "train", "--config=experiments/my sweep.py")
VERSIONS = {"lmjax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"}


def loss_of(settings):
  """A loss with a best learning rate, 1e-2 at a width of 64, that falls as the width grows."""
  width, rate = settings.get("model.embed_dim", 64), settings.get("optim.learning_rate", 1e-2)
  return 2 + (math.log10(rate * width / 64) + 2) ** 2 + 8 / width + 0.01 * settings.get("model.num_layers", 2)


def write_run(settings, folder, loss, size, tokens, *, status="finished", num_steps=20):
  """Writes what a run with that final loss would have."""
  folder.mkdir(parents=True, exist_ok=True)
  config = json.loads(config_lib.to_json(config_lib.Config()))
  for field, value in settings.items():
    group, _, name = field.rpartition(".")
    (config[group] if group else config)[name] = value
  config["train"]["num_steps"] = num_steps
  (folder / "config.json").write_text(json.dumps(config))
  with open(folder / "metrics.jsonl", "w") as f:
    for step in range(1, num_steps + 1):
      now = loss + 3 / step
      f.write(json.dumps({"step": step, "loss": now, "num_tokens": tokens * step / num_steps}) + "\n")
      if step % (num_steps // 4) == 0:
        f.write(json.dumps({"step": step, "validation/loss": now + 0.1}) + "\n")
  result = {"status": status, "num_params": size, "num_tokens": tokens, "train_flops": 6 * size * tokens,
            "eval_loss": loss, "seconds_start": 2.0, "seconds_step": 8.0, "num_devices": 2, "device_kind": "TPU v5e",
            "versions": VERSIONS}
  if status != "running":
    (folder / "result.json").write_text(json.dumps(result))
  return result


def make_sweep(workdir, space, loss=loss_of, *, size=lambda s: 12 * s.get("model.embed_dim", 64) ** 2,
               tokens=lambda s: 20000, storage=None, num_steps=20, **settings):
  """Runs a sweep to its end; a trial whose loss is None diverges; where it is a text, that is the error."""
  board = Board(resolve(Sweep(space, **settings)), workdir, storage, train=TRAIN)

  def run(settings, folder, report):
    value = loss(settings)
    if isinstance(value, str):
      raise ValueError(value)
    if value is None:
      write_run(settings, folder, 9.0, size(settings), tokens(settings), status="stopped", num_steps=num_steps)
      raise Refused("The loss is not finite at step 7.")
    for count in range(1, 5):
      if report(count, {"validation/loss": value + 1 / count}):
        return write_run(settings, folder, value, size(settings), tokens(settings), status="pruned",
                         num_steps=num_steps)
    return write_run(settings, folder, value, size(settings), tokens(settings), num_steps=num_steps)
  work(board, run)
  return board
