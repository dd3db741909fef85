"""SIGTERM and Ctrl-C end a run after a step, the same one in all of its processes."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Interrupt:
  """Notes SIGTERM or Ctrl-C and lets the loop end its step; a second Ctrl-C is not held back.

  A second SIGTERM is: a worker of a sweep may get one with its driver, or a Ctrl-C, and then another from its driver.

  In a run of several processes it is enough that one of them is told. JAX's preemption service notes the SIGTERM, tells
  the others, and names the step after the furthest that any has begun; that costs a step nothing but a look at a local
  number. A Ctrl-C is passed on to it as a SIGTERM.
  """

  def __init__(self):
    self._received = False
    self._several = jax.process_count() > 1

  def __enter__(self) -> "Interrupt":
    # Python lets only the main thread set handlers; a run in another thread is its caller's to stop.
    main = threading.current_thread() is threading.main_thread()
    # With several processes SIGTERM already has the handler that jax.distributed has set.
    signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
    self._previous = {number: signal.signal(number, self._note) for number in (signals if main else ())}
    return self

  def __exit__(self, *exc) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def stops_after(self, step: int) -> bool:
    """Returns whether the run ends after this step; to be asked once a step, with the same steps in all processes."""
    if self._several:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def _note(self, number: int, _) -> None:
    self._received = True
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
