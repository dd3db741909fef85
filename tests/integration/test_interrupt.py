"""A SIGTERM or Ctrl-C that reaches one of two processes stops both after the same step, which is saved."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

SETTINGS = ("data.tokenizer=bytes", "data.source={texts}/notes/*.txt", "train.num_steps=100000", "optim.warmup_steps=0",
            "eval.num_batches=1", "eval.final_num_batches=1", "tracking.tensorboard=false", "train.log_every_steps=1",
            "model.num_layers=1")


@pytest.fixture
def start(tmp_path, texts, debug):
  """Returns a function that starts the two processes of a command on this machine; both are ended afterwards."""
  started = []

  def start(*argv):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    # Not the tests' eight devices; and most of the time would go to optimising programs that run for a second.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": root, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pair = [subprocess.Popen([sys.executable, "-m", "lmjax", *map(str, argv)], cwd=tmp_path, text=True,
                             env={**environment, "JAX_PROCESS_ID": str(index)}, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=open(tmp_path / f"err{index}", "w")) for index in (0, 1)]
    started.extend(pair)
    return pair
  yield start
  for process in started:
    process.kill()
    process.wait()
    process.stdout.close()


def wait_for_steps(processes, workdir):
  deadline = time.monotonic() + 120
  while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
    assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
    time.sleep(0.1)


def test_two_processes_stop_together(start, tmp_path, texts, debug):
  workdir = tmp_path / "run"
  pair = start("train", debug, f"--workdir={workdir}", *(f"--config.{s.format(texts=texts)}" for s in SETTINGS))
  wait_for_steps(pair, workdir)
  pair[1].send_signal(signal.SIGTERM)
  assert [process.wait(timeout=60) for process in pair] == [0, 0]
  said = [re.search(r"Interrupted after step (\d+)", (tmp_path / f"err{index}").read_text()) for index in (0, 1)]
  result = json.loads((workdir / "result.json").read_text())
  assert result["status"] == "interrupted" and {int(found[1]) for found in said} == {result["step"]}
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(result["step"])]
  # Both evaluate what they have saved, and one of them tells it.
  pair = start("eval", workdir)
  printed = [process.communicate(timeout=120)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0] and "validation" not in printed[1]
  assert json.loads(printed[0].splitlines()[-1])["validation/loss"] < 6
