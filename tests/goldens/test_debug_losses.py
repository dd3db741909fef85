"""A hundred losses of experiments/debug.py for each optimizer, bit for bit those that were kept.

debug_losses.json is made by `python tests/goldens/make.py` and by nothing else.
"""

import importlib.util
import json
import pathlib
import platform
import subprocess
import sys

import pytest

from lmjax.config import OptimConfig

FOLDER = pathlib.Path(__file__).resolve().parent
GOLDEN = json.loads((FOLDER / "debug_losses.json").read_text())
OPTIMIZERS = OptimConfig.__dataclass_fields__["name"].metadata["choices"]


def why_not() -> str | None:
  """Returns why the losses cannot be compared here, or None."""
  spec = importlib.util.spec_from_file_location("golden_losses", FOLDER / "losses.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  differing = {name: f"{found} instead of {GOLDEN['versions'][name]}" for name, found in module.versions().items()
               if found != GOLDEN["versions"][name]}
  if differing:
    return f"made with other versions: {differing}"
  cpu = pathlib.Path("/proc/cpuinfo")
  if platform.machine() != "x86_64" or not cpu.exists() or " avx2 " not in cpu.read_text():
    return "made for x86 processors with AVX2"
  return None


@pytest.fixture(scope="module")
def found():
  if reason := why_not():
    pytest.skip(reason)
  process = subprocess.run([sys.executable, FOLDER / "losses.py"], capture_output=True, text=True, timeout=900)
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)["losses"]


def test_every_optimizer_is_kept():
  assert set(GOLDEN["losses"]) == set(OPTIMIZERS)
  assert {len(losses) for losses in GOLDEN["losses"].values()} == {100}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_exactly_those_that_were_kept(optimizer, found):
  kept = GOLDEN["losses"][optimizer]
  first = next((i for i, (one, other) in enumerate(zip(found[optimizer], kept)) if one != other), None)
  assert first is None, (f"step {first + 1}: {float.fromhex(found[optimizer][first])} instead of "
                         f"{float.fromhex(kept[first])}")
  assert len(found[optimizer]) == len(kept)
