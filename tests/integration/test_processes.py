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


def start(folder, argv, num_devices, cluster):
  """Starts `lmjax ARGV...` on virtual devices; its output goes to a file, for a full pipe would hold it up."""
  environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu",
                 "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", **cluster}
  name = cluster["JAX_PROCESS_ID"] if cluster else "one"
  with open(folder / f"{name}.log", "w") as log:
    return subprocess.Popen([sys.executable, "-m", "lmjax", *argv], env=environment, stdin=subprocess.DEVNULL,
                            stdout=log, stderr=log)


def start_two(folder, argv, num_devices):
  return start_all(folder, argv, num_devices, 2)


def start_all(folder, argv, num_devices, count):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  return [start(folder, argv, num_devices, {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                                            "JAX_PROCESS_ID": str(number)}) for number in range(count)]


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


def losses_of(workdir):
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {(record["step"], name): value for record in records for name, value in record.items() if "loss" in name}


def assert_same_losses(workdir, expected):
  found = losses_of(workdir)
  assert found == pytest.approx(expected, rel=1e-6, abs=0)
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
  while not condition() and time.monotonic() < deadline:
    assert all(process.poll() is None for process in processes)
    time.sleep(0.1)
  assert condition()


@pytest.mark.slow
def test_a_lost_process_ends_all_and_fewer_go_on(flags, alone, tmp_path):
  mesh, saved = ("data=2", "fsdp=4"), tmp_path / "run" / "checkpoints" / str(SAVED)
  processes = start_all(tmp_path, flags(tmp_path / "run", mesh, "train.num_steps=10000", "optim.schedule=constant"), 2,
                        4)
  try:
    wait_for(saved.exists, processes, 240)
    processes[2].kill()
    lost = time.monotonic()
    for process in processes:
      process.wait(timeout=60)
    assert time.monotonic() - lost < 60
  finally:
    for process in processes:
      process.kill()
  others = [process.returncode for number, process in enumerate(processes) if number != 2]
  assert all(status not in (0, None) for status in others), others
  assert all(len((tmp_path / f"{number}.log").read_text()) > 0 for number in (0, 1, 3))
  print(logs(tmp_path))


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_all_at_the_same_step(flags, tmp_path):
  argv = flags(tmp_path / "run", ("data=2", "fsdp=4"), "train.num_steps=100000", "optim.schedule=constant",
               "checkpoint.every_steps=None")
  processes = start_all(tmp_path, argv, 2, 4)
  metrics = tmp_path / "run" / "metrics.jsonl"
  try:
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, processes, 240)
    processes[1].terminate()
    for process in processes:
      process.wait(timeout=120)
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0] * 4, logs(tmp_path)
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["status"] == "interrupted"
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(result["step"])]
