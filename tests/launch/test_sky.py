"""What sky.yaml has each node run, as SkyPilot would run it."""

import pytest

yaml = pytest.importorskip("yaml")


@pytest.mark.parametrize("kind, shown", [
    ("gpu", {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8482", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
             "JAX_PLATFORMS": "cuda,cpu"}),
    ("tpu", {"LMJAX_DISTRIBUTED": "auto", "JAX_PLATFORMS": "tpu,cpu"})])
def test_each_node_finds_the_others(platform, root, kind, shown):
  task = yaml.safe_load((root / "launch/sky.yaml").read_text())
  python = platform.add("trained")
  environment = {**task["envs"], "PLATFORM": kind, "ARGS": "train --config=a --workdir=gs://b/c", "PYTHON": str(python),
                 "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
  done = platform.run("-c", task["run"], **environment)
  assert done.returncode == 0, done.stderr
  (_, argv, found, _), = platform.calls
  assert argv == ["-m", "lmjax", "train", "--config=a", "--workdir=gs://b/c"]
  assert {name: found[name] for name in shown} == shown
  assert len([name for name in found if name.startswith("JAX_") or name == "LMJAX_DISTRIBUTED"]) == len(shown)
