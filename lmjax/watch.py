"""Seeing a run at work: traces for XProf, warnings of programs that are compiled again, and of a run that stands."""

import contextlib
import threading
from typing import Any, Iterator

from absl import logging
from etils import epath
import jax

from lmjax import peers
from lmjax.metrics import Clock

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Trace:
  """Writes a trace of some steps, from the first process."""

  def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
    """Args: `steps`: the first and the last; None writes nothing."""
    self._folder, self._steps, self._on = workdir / "profile", steps, False

  def before(self, step: int) -> None:
    """Begins or ends the trace where it is time to."""
    if not self._steps or jax.process_index():
      return
    first, last = self._steps
    if not self._on and first <= step <= last:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    elif step > last:
      self._end()

  def _end(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
      logging.info("The trace is in %s; xprof --logdir shows it.", self._folder)

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_: Any) -> None:
    self._end()


class Recompilations:
  """Warns when a training step is compiled that should have been ready."""

  def __init__(self):
    self._count, self._listening = 0, False

  def __enter__(self) -> "Recompilations":
    jax.monitoring.register_event_duration_secs_listener(self._heard)
    self._listening = True
    return self

  def __exit__(self, *_: Any) -> None:
    self._listening = False  # JAX has no way to take a listener back.

  def _heard(self, event: str, duration: float, **_: Any) -> None:
    self._count += self._listening and event == _COMPILED

  @contextlib.contextmanager
  def expected(self, first: bool, step: int) -> Iterator[None]:
    """Warns of what is compiled inside, unless it is the first step."""
    before = self._count
    yield
    if self._count > before and not first:
      logging.warning("Step %d was compiled again: the shapes of its batch differ from those before.", step)


class Watchdog:
  """Shows what every thread does when no step has ended for long; of several processes it then ends all.

  A process on its own goes on: it may stand in a debugger, or wait for a disk. Several hold machines that wait for each
  other, and go on from their last checkpoint when they are started again.
  """

  def __init__(self, clock: Clock, seconds: float, others: peers.Peers):
    """Args: `clock`: that the steps tick; `seconds`: for which it may stand, 0 for ever; `others`: of the run."""
    self._clock, self._seconds, self._others, self._over = clock, seconds, others, threading.Event()

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._over.set()

  def _watch(self) -> None:
    told = 0  # How many times `seconds` were over when it was last told.
    while not self._over.wait(min(1.0, self._seconds / 4)):
      times = int(self._clock.standing() / self._seconds)
      if times > told:
        self._tell()
      told = times

  def _tell(self) -> None:
    several = self._others.count > 1
    message = f"No step has ended for {self._seconds:g} s{self._others.behind() if several else ''}."
    logging.error("%s This is where each thread stands (config.train.watchdog_seconds):", message)
    peers.show_stacks()
    if several:
      self._others.fail(message, peers.restart_status(), stacks=True)
      self._over.set()
