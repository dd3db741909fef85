"""Two processes on this machine train one model as one process does, and each goes on from the other's checkpoint.

They find each other by the environment, as on hosts of a cluster, and talk over loopback (gloo). Every process has
virtual CPU devices of its own, and the splits cross the processes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

NUM_STEPS, SAVED = 10, 4
SETTINGS = ("data.source={texts}/notes/*.txt", "data.seq_len=32", "train.num_steps=10", "train.batch_size=8",
            "train.log_every_steps=1", "train.sample_length=0", "optim.warmup_steps=4", "model.dropout=0.1",
            "checkpoint.every_steps=4", "checkpoint.keep_last=9", "eval.num_batches=1", "eval.final_num_batches=1",
            "eval.batch_size=8", "tracking.tensorboard=false")
# Devices of each of two processes, and the mesh over all: axes to the left of those that one process holds cross them.
SPLITS = {
    "data": (1, ("data=2",)),
    "fsdp-tensor": (2, ("data=1", "fsdp=2", "tensor=2")),
    "tensor": (1, ("data=1", "tensor=2")),
    "data-fsdp-tensor": (4, ("data=2", "fsdp=2", "tensor=2")),
}


@pytest.fixture(scope="module")
def flags(texts, debug):
  """Returns a function from a workdir, a mesh and more settings to the command."""
  def flags(workdir, mesh, *more):
    settings = [setting.format(texts=texts) for setting in (*SETTINGS, *more)] + [f"mesh.{axis}" for axis in mesh]
    return ["train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]
  return flags


# Runs lmjax with what is done before the batch of each step, `number` of them being there already, put for FAULT.
FAULTY = """
import sys, time
from lmjax.commands import cli
from lmjax.data import pipeline
real = pipeline.train_batches
def train_batches(*args, **settings):
  for number, batch in enumerate(real(*args, **settings)):
    FAULT
    yield batch
pipeline.train_batches = train_batches
sys.exit(cli.run(sys.argv[1:]))
"""


def start(folder, argv, num_devices, cluster, fault="pass"):
  """Starts `lmjax ARGV...` on virtual devices; its output goes to a file, for a full pipe would hold it up."""
  environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu", "LMJAX_INTERRUPTED_STATUS": "75",
                 "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", **cluster}
  name = cluster["JAX_PROCESS_ID"] if cluster else "one"
  with open(folder / f"{name}.log", "w") as log:
    return subprocess.Popen([sys.executable, "-c", FAULTY.replace("FAULT", fault), *argv], env=environment,
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def start_two(folder, argv, num_devices):
  return start_all(folder, argv, num_devices, 2)


def start_all(folder, argv, num_devices, count, faults=()):
  """Starts all processes of a run; `faults` are those of the last ones."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  faults = [*["pass"] * (count - len(faults)), *faults]
  return [start(folder, argv, num_devices, {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                                            "JAX_PROCESS_ID": str(number)}, fault)
          for number, fault in enumerate(faults)]


def logs(folder):
  return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))


def finish(folder, processes, timeout=240):
  """Waits for all processes; when one fails, or time is up, ends the others. Asserts that all went well."""
  deadline = time.monotonic() + timeout
  try:
    while any(process.poll() is None for process in processes):
      assert not any(process.poll() for process in processes) and time.monotonic() < deadline, logs(folder)
      time.sleep(0.05)
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert [process.returncode for process in processes] == [0] * len(processes), logs(folder)


def end_within(folder, processes, seconds):
  """Waits until all have ended, and returns their statuses and logs; ends them where they do not."""
  deadline = time.monotonic() + seconds
  try:
    statuses = [process.wait(timeout=max(0.0, deadline - time.monotonic())) for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return statuses, [(folder / f"{number}.log").read_text() for number in range(len(processes))]


def losses_of(workdir):
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {(record["step"], name): value for record in records for name, value in record.items() if "loss" in name}


def assert_same_losses(workdir, expected, rel=1e-6):
  found = losses_of(workdir)
  assert found == pytest.approx(expected, rel=rel, abs=0)
  assert [step for step, name in found if name == "loss"] == list(range(1, NUM_STEPS + 1))
  assert json.loads((workdir / "result.json").read_text())["status"] == "finished"


def begun(workdir, target):
  """Copies a run as it was after its checkpoint of step SAVED."""
  shutil.copytree(workdir, target, ignore=lambda _, names: {"result.json", str(2 * SAVED), str(NUM_STEPS)} & {*names})
  assert [path.name for path in (target / "checkpoints").iterdir()] == [str(SAVED)]
  return target


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
  """Returns the workdir of an unbroken run in one process on one device."""
  folder = tmp_path_factory.mktemp("alone")
  finish(folder, [start(folder, flags(folder / "run", ("data=1",)), 1, {})])
  return folder / "run"


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=() if name in ("data", "fsdp-tensor") else pytest.mark.slow) for name in SPLITS])
def together(request, flags, tmp_path_factory):
  """Returns (devices of each, mesh, workdir) of an unbroken run in two processes."""
  num_devices, mesh = SPLITS[request.param]
  folder = tmp_path_factory.mktemp("together")
  finish(folder, start_two(folder, flags(folder / "run", mesh), num_devices))
  return num_devices, mesh, folder / "run"


def test_two_processes_train_as_one(together, alone):
  assert_same_losses(together[2], losses_of(alone))


def test_one_process_goes_on_from_the_checkpoint_of_two(together, alone, flags, tmp_path):
  workdir = begun(together[2], tmp_path / "run")
  finish(tmp_path, [start(tmp_path, flags(workdir, ("data=1",)), 1, {})])
  assert f"Going on from the checkpoint of step {SAVED}" in logs(tmp_path)
  assert_same_losses(workdir, losses_of(alone))


def test_two_processes_go_on_from_the_checkpoint_of_one(together, alone, flags, tmp_path):
  num_devices, mesh, _ = together
  workdir = begun(alone, tmp_path / "run")
  finish(tmp_path, start_two(tmp_path, flags(workdir, mesh), num_devices))
  assert_same_losses(workdir, losses_of(alone))


def wait_for(condition, processes, seconds):
  deadline = time.monotonic() + seconds
  while not (held := condition()) and time.monotonic() < deadline and all(p.poll() is None for p in processes):
    time.sleep(0.1)
  if not held:
    for process in processes:
      process.kill()
  assert held


def test_an_error_in_one_process_ends_both_and_both_say_it(flags, tmp_path):
  argv = flags(tmp_path / "run", ("data=2",), "train.num_steps=100000", "checkpoint.every_steps=None")
  error = 'if number == 5: raise ValueError("record 7 is damaged")'
  statuses, said = end_within(tmp_path, start_all(tmp_path, argv, 1, 2, [error]), 240)
  assert statuses == [1, 1], said
  assert "lmjax: error: Process 1 failed, and this one ends too: ValueError: record 7 is damaged" in said[0]
  assert "lmjax: error: ValueError: record 7 is damaged" in said[1]


def test_a_slow_process_is_named_and_one_that_stands_ends_both(flags, tmp_path):
  argv = flags(tmp_path / "run", ("data=2",), "train.num_steps=100000", "checkpoint.every_steps=None",
               "train.log_every_steps=2", "train.watchdog_seconds=6")
  slow = "time.sleep(0.4 if number < 14 else 1000)"
  statuses, said = end_within(tmp_path, start_all(tmp_path, argv, 1, 2, [slow]), 240)
  assert statuses == [75, 75], said
  assert "warning: Process 1 holds the others up: by step" in said[0], said[0]
  assert all("process 1 has not begun step 15, others have" in log for log in said), said
  assert "in train_batches" in said[1] and all("most recent call first" in log for log in said)
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  line = lines[-1]
  assert line["slowest_process"] == 1 and 0.4 <= line["slowest_host_seconds"] < 2, line


@pytest.mark.slow
def test_a_lost_process_ends_all_and_fewer_go_on(flags, alone, tmp_path):
  run = tmp_path / "run"
  argv = flags(run, ("data=2", "fsdp=4"))
  # Slow enough to be killed between the checkpoint and the end.
  processes = start_all(tmp_path, argv, 2, 4, ["time.sleep(0 if number < 5 else 5)"])
  wait_for((run / "checkpoints" / str(SAVED)).exists, processes, 240)
  processes[2].kill()
  lost = time.monotonic()
  statuses, said = end_within(tmp_path, processes, 60)
  assert time.monotonic() - lost < 60 and statuses == [75, 75, -9, 75], said
  assert all("Process 2 failed, and this one ends too: it has ended without a word" in log
             for log in (said[0], said[1], said[3])), said
  assert not (run / "result.json").exists()
  finish(tmp_path, start_all(tmp_path, flags(run, ("data=1", "fsdp=4")), 2, 2))
  assert f"Going on from the checkpoint of step {SAVED}" in logs(tmp_path)
  assert_same_losses(run, losses_of(alone), 1e-5)


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_all_at_the_same_step(flags, tmp_path):
  argv = flags(tmp_path / "run", ("data=2", "fsdp=4"), "train.num_steps=100000", "optim.schedule=constant",
               "checkpoint.every_steps=None")
  processes = start_all(tmp_path, argv, 2, 4)
  metrics = tmp_path / "run" / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, processes, 240)
  processes[1].terminate()
  statuses, said = end_within(tmp_path, processes, 120)
  assert statuses == [75] * 4, said
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["status"] == "interrupted"
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(result["step"])]
  assert all(f"Interrupted after step {result['step']}," in log for log in said), said
