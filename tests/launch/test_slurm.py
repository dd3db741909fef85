"""slurm.sh by stand-ins for srun and scontrol; tests/integration/test_slurm.py has a real Slurm."""

import pytest


@pytest.fixture
def launch(platform, root):
  """Returns a function that runs slurm.sh as a job does, with an srun that ends with `status`."""
  def launch(*argv, status=0, folder=root, **environment):
    platform.add("srun", f"sys.exit({status})")
    platform.add("scontrol")
    return platform.run(root / "launch/slurm.sh", *argv, cwd="/", SLURM_SUBMIT_DIR=str(folder), SLURM_JOB_ID="7",
                        **environment)
  return launch


def test_every_task_runs_lmjax_and_finds_the_others(launch, platform, root):
  done = launch("train", "--workdir=two words", SLURM_CPUS_PER_TASK="4")
  assert done.returncode == 0, done.stderr
  assert platform.calls == [["srun", ["--kill-on-bad-exit=1", "bash", str(root / "launch/worker.sh"), "gpu", "train",
                                      "--workdir=two words"],
                             {"LMJAX_DISTRIBUTED": "auto", "SRUN_CPUS_PER_TASK": "4"}, ""]]


def test_the_jobs_of_an_array_share_a_sweep(launch, platform, root):
  array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_NTASKS": "2"}
  assert launch("sweep", "--workdir=a b", **array).returncode == 0
  # None of them is part of a run of several processes, and one that fails leaves the others alone.
  assert platform.calls == [["srun", ["--kill-on-bad-exit=0", "bash", str(root / "launch/worker.sh"), "gpu", "sweep",
                                      "--machines=6", "--workdir=a b"], {}, ""]]
  assert launch("sweep", SLURM_ARRAY_JOB_ID="6", status=75).returncode == 75
  assert platform.calls[-1][:2] == ["scontrol", ["requeue", "7"]]


def test_an_array_of_runs_is_refused(launch, platform):
  done = launch("train", SLURM_ARRAY_JOB_ID="6")
  assert done.returncode == 2 and platform.calls == [] and done.stderr == (
      "lmjax: error: the jobs of an array share a sweep, but train is a run that each would make; leave --array out.\n")


@pytest.mark.parametrize("status, again", [(0, []), (1, []), (75, [["requeue", "7"]])])
def test_only_a_stopped_run_is_queued_again(launch, platform, status, again):
  assert launch("train", status=status).returncode == status
  assert [call[1] for call in platform.calls if call[0] == "scontrol"] == again


def test_a_dry_run_calls_nothing(launch, platform, root):
  done = launch("--dry_run", "train", "--workdir=a b", LMJAX_PLATFORM="cpu")
  assert done.stdout == (f"LMJAX_DISTRIBUTED=auto srun --kill-on-bad-exit=1 bash {root}/launch/worker.sh cpu train "
                         "--workdir=a\\ b \n")
  assert done.returncode == 0 and platform.calls == []
  assert launch("--dry_run", "sweep", SLURM_ARRAY_JOB_ID="6").stdout == (
      f"srun --kill-on-bad-exit=0 bash {root}/launch/worker.sh gpu sweep \n")


def test_a_job_from_another_folder_is_told_so(launch, platform, tmp_path):
  done = launch("train", folder=tmp_path)
  assert done.returncode == 2 and platform.calls == []
  assert done.stderr == f"lmjax: error: {tmp_path} is not the folder of lmjax; submit launch/slurm.sh from there.\n"
