"""What can be wrong with a request for a plan."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_without_the_compiler_one_sentence_says_what_to_install(run_wrong, monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  status, _, line = run_wrong("plan", f"--config={ROOT / 'experiments' / 'debug.py'}", "--topology=v5e-4")
  assert status == 1 and line.endswith("which is not installed; pip install 'lmjax[plan]'.")


@pytest.mark.parametrize("flags,told", [
    (("--topology=v5e-3",), "slices of v5e come in powers of two"),
    (("--topology=v5e-4", "--tries=0"), "--tries is 0"),
    (("--topology=v5e-4,v5e-8", "--save=x"), "--topology names several"),
])
def test_a_wrong_request_is_told(run_wrong, flags, told):
  status, _, line = run_wrong("plan", f"--config={ROOT / 'experiments' / 'debug.py'}", *flags)
  assert status == 2 and told in line
