"""launch/slurm.sh under a real Slurm of one node: two tasks find each other, and a requeued job goes on.

Needs root and Debian's packages slurm-wlm and munge.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not (shutil.which("slurmctld") and shutil.which("munged") and os.geteuid() == 0),
    reason="needs slurmctld, munged and to be root")]
SETTINGS = ("data.tokenizer=bytes", f"data.source={ROOT}/lmjax/*.py", "tracking.tensorboard=false",
            "train.log_every_steps=1", "checkpoint.every_steps=10", "eval.final_num_batches=1", "model.num_layers=1")


class Slurm:
  """The cluster, and jobs of launch/slurm.sh."""

  def __init__(self, folder):
    """Args: `folder`: of the cluster's files."""
    self.folder = folder
    environment = {name: value for name, value in os.environ.items()
                   if name != "XLA_FLAGS" and not name.startswith(("SLURM_", "SBATCH_"))}
    self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu",
                        "LMJAX_PLATFORM": "cpu", "PYTHON": sys.executable}

  def call(self, *argv):
    done = subprocess.run([str(part) for part in argv], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout

  def submit(self, workdir, num_steps):
    """Returns the number of a job that trains with two tasks."""
    settings = [f"--config.{setting}" for setting in (*SETTINGS, f"train.num_steps={num_steps}")]
    return self.call("sbatch", "--parsable", "--ntasks-per-node=2", "--overcommit", f"--output={workdir}.log",
                     "launch/slurm.sh", "train", "--config=experiments/debug.py", f"--workdir={workdir}",
                     *settings).strip()

  def state(self, job):
    """Returns what Slurm says of a job: (its state, how often it was queued again)."""
    said = self.call("scontrol", "show", "job", job)
    return re.search(r"JobState=(\w+)", said)[1], int(re.search(r"Restarts=(\d+)", said)[1])

  def wait(self, what, condition, log):
    deadline = time.monotonic() + 240
    while not condition():
      assert time.monotonic() < deadline, "\n".join(
          [what, self.call("scontrol", "show", "job"), log.read_text()[-3000:] if log.exists() else ""])
      time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("slurm")
  cluster = Slurm(folder)
  script = ROOT / "tests/integration/slurm_cluster.sh"
  try:
    # Not captured: the daemons keep what they inherit open.
    with open(folder / "start.log", "w") as log:
      started = subprocess.run(["bash", script, "start", folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                               timeout=90)
    assert started.returncode == 0, (folder / "start.log").read_text()
    yield cluster
  finally:
    subprocess.run(["bash", script, "stop", folder], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def steps(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def test_two_tasks_train_one_model(slurm, tmp_path):
  workdir, log = tmp_path / "run", tmp_path / "run.log"
  job = slurm.submit(workdir, 12)
  slurm.wait("It did not end.", lambda: slurm.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), log)
  assert slurm.state(job) == ("COMPLETED", 0), log.read_text()
  result = json.loads((workdir / "result.json").read_text())
  assert (result["status"], result["step"], result["num_devices"]) == ("finished", 12, 2)
  assert steps(workdir) == [*range(1, 13)]


def test_the_jobs_of_an_array_share_a_sweep(slurm, tmp_path):
  workdir, log = tmp_path / "sweep", tmp_path / "1.log"
  settings = [f"--config.{setting}" for setting in SETTINGS if not setting.startswith("model.num_layers")]
  job = slurm.call("sbatch", "--parsable", "--array=1-2", f"--output={tmp_path}/%a.log", "launch/slurm.sh", "sweep",
                   "--config=experiments/sweeps/depth.py", f"--workdir={workdir}", "--driver=random", "--num_trials=4",
                   "--config.train.num_tokens=8192", *settings).strip()
  states = lambda: re.findall(r"JobState=(\w+)", slurm.call("scontrol", "show", "job", job))
  slurm.wait("It did not end.", lambda: not {"PENDING", "RUNNING", "COMPLETING"} & set(states()), log)
  assert states() == ["COMPLETED"] * 2, log.read_text()
  trials = json.loads((workdir / "sweep.json").read_text())["trials"]
  assert [trial["state"] for trial in trials] == ["complete"] * 4
  # Each was run once, by one of the two, and both have worked.
  assert all((tmp_path / f"{i}.log").read_text().count(f"trial {trial['number']} complete") == 1
             for i in (1, 2) for trial in trials)
  assert all(steps(workdir / "trials" / f"{i:03}")[0] == 1 for i in range(4))


@pytest.mark.parametrize("how", ["told to stop", "killed"])
def test_a_job_that_is_queued_again_goes_on(slurm, tmp_path, how):
  workdir, log = tmp_path / "run", tmp_path / "run.log"
  job = slurm.submit(workdir, 100000)
  slurm.wait("It did not train.", lambda: len(steps(workdir)) > 25, log)
  if how == "killed":
    slurm.call("scancel", "--signal=KILL", f"{job}.0")
    slurm.wait("It did not end.", lambda: slurm.state(job)[0] == "FAILED", log)
    slurm.call("scontrol", "requeue", job)
  else:  # As before the time limit: launch/slurm.sh itself has it queued again.
    slurm.call("scancel", "--signal=TERM", job)
  slurm.wait("It was not queued again.", lambda: slurm.state(job) == ("PENDING", 1), log)
  before = steps(workdir)
  # Slurm would wait two minutes. Not at once: until the old tasks are gone, the node refuses the job, which then fails.
  time.sleep(10)
  slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")
  slurm.wait("It did not go on.", lambda: len(steps(workdir)) > len(before) + 5, log)
  slurm.call("scancel", job)
  slurm.wait("It did not end.", lambda: slurm.state(job)[0] == "CANCELLED", log)
  saved = int(re.search(r"Going on from the checkpoint of step (\d+)", log.read_text())[1])
  assert saved == before[-1] if how == "told to stop" else saved > before[-1] - 25 and saved % 10 == 0
  # No step is missing or twice.
  assert steps(workdir) == [*range(1, steps(workdir)[-1] + 1)]
