"""Signals within a run: which are noted, and which are not held back."""

import os
import signal

import pytest

from lmjax.interrupt import Interrupt


def test_a_second_sigterm_changes_nothing():
  with Interrupt() as interrupt:
    assert not interrupt.stops_after(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # As a Ctrl-C reaches a worker and its driver.
      os.kill(os.getpid(), number)
    assert interrupt.stops_after(2)


@pytest.fixture
def ctrl_c_interrupts():
  """A shell's background jobs ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_is_not_held_back(ctrl_c_interrupts):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt), Interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGTERM) == before
