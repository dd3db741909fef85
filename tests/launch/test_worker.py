"""What every host runs: the platform's flags, and a status that tells a stopped run from a finished one."""

import pytest

from lmjax import train
from lmjax.commands import cli


@pytest.mark.parametrize("platform_name, shown", [
    ("tpu", {"JAX_PLATFORMS": "tpu,cpu"}), ("cpu", {}),
    ("gpu", {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true --xla_mine=1"})])
def test_a_worker_sets_the_flags_of_its_platform(platform, root, platform_name, shown):
  python = platform.add("trained", "sys.exit(5)")
  flags = {"XLA_FLAGS": "--xla_mine=1"} if platform_name == "gpu" else {}
  done = platform.run("launch/worker.sh", platform_name, "train", "--a=b c", PYTHON=str(python), **flags)
  assert done.returncode == 5
  assert platform.calls == [["trained", ["-m", "lmjax", "train", "--a=b c"],
                             {**shown, "LMJAX_INTERRUPTED_STATUS": "75", "PYTHONPATH": str(root)}, ""]]


@pytest.mark.parametrize("status, wanted, expected", [("interrupted", "75", 75), ("interrupted", None, 0),
                                                      ("finished", "75", 0)])
def test_a_stopped_run_ends_as_it_was_told_to(monkeypatch, tmp_path, root, status, wanted, expected):
  monkeypatch.setattr(train, "train_and_evaluate", lambda *_: {"status": status})
  monkeypatch.delenv("LMJAX_INTERRUPTED_STATUS", raising=False)
  if wanted:
    monkeypatch.setenv("LMJAX_INTERRUPTED_STATUS", wanted)
  ended = 0
  try:
    ended = cli.run(["train", f"--config={root / 'experiments/debug.py'}", f"--workdir={tmp_path}"])
  except SystemExit as e:
    ended = e.code
  assert ended == expected
