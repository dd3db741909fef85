"""The processes of one run know of each other: one that fails ends all, and one that holds the others up is named.

Each has a thread that speaks with the key-value store of JAX's coordination service, which process 0 holds. It writes
a line there about its process and looks whether one has failed; no device waits for that, nor does a step. JAX alone
would leave the others in a collective that never ends, until they miss the heartbeats of the one that has gone.
"""

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from typing import Any, Iterator, Mapping

from absl import logging
import jax
from jax._src import distributed  # The store has no public name.
from jax.experimental import multihost_utils
import numpy as np

from lmjax import workdir as workdir_lib
from lmjax.config_checks import Refused, UserError

_FAILED, _ABOUT = "lmjax/failed/", "lmjax/about/"
# Seconds between two looks at the store, and processes that it hears a second: more look less often.
_PAUSE, _LOOKS_A_SECOND = 1.0, 200
# Pauses after which what was written has been read by all, and a process that has written nothing new is silent.
_HEARD = 4
# A process that is away from its devices for more than the first share of a step, where others are for less than the
# second, holds them up: they wait for it, and it for nobody.
_BUSY, _IDLE = 0.8, 0.5


class Peers:
  """What this process tells the others and hears of them; within `with`, the failure of one ends all.

  A process on its own has none, and all of this does nothing.
  """

  def __init__(self):
    joined = distributed.global_state  # Asking JAX itself would set up the devices, which may be what fails.
    self.count, self._index = joined.num_processes, joined.process_id
    self._store = joined.client if self.count > 1 else None
    self._pause = max(_PAUSE, self.count / _LOOKS_A_SECOND)
    self._said: dict[str, float] = {}
    self._lines: dict[int, dict[str, float]] = {}
    self._holding: tuple[int | None, int] = (None, 0)  # Who held the others up last, and how many times.
    self._over, self._failing, self._told = threading.Event(), False, False

  def __enter__(self) -> "Peers":
    if self._store:
      threading.Thread(target=self._listen, daemon=True).start()
    return self

  def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
    if self._store and error:
      self._failing = True
      self._end_with(error)
    else:
      self._over.set()

  def say(self, **values: float) -> None:
    """Tells the others, within seconds, how this process is: `step`, and what `slowest` needs."""
    self._said |= values

  def fail(self, message: str, status: int, process: int | None = None, stacks: bool = False) -> None:
    """Ends all processes of the run, this one too, unless another has failed before.

    Args:
      message: what the others say of it.
      status: that all end with.
      process: the one that has failed; None means this one.
      stacks: whether the others show what each of their threads does.
    """
    self._failing = True
    failure = {"process": self._index if process is None else process, "message": message[:2000], "status": status,
               "stacks": stacks}
    try:
      self._store.key_value_set(f"{_FAILED}first", json.dumps(failure))
    except jax.errors.JaxRuntimeError:  # Another was first, or process 0 and its store are gone.
      failure = self._failure() or failure
    self._tell(failure)
    threading.Thread(target=self._leave, args=(failure["status"],), daemon=True).start()

  def behind(self) -> str:
    """Returns words on the processes that have begun fewer steps than others; "" where there are none."""
    lines = self._read_lines() if self._store else {}
    steps = {process: int(line["step"]) for process, line in lines.items() if "step" in line}
    fewest, most = min(steps.values(), default=0), max(steps.values(), default=0)
    if fewest == most:
      return ""
    late = [str(process) for process, step in steps.items() if step == fewest]
    return f" (process {', '.join(late[:8])}{', ...' if late[8:] else ''} has not begun step {fewest + 1}, others have)"

  def slowest(self, step: int) -> dict[str, float]:
    """Returns the process that is longest away from its devices; warns of one that the others wait for repeatedly.

    What the devices do is the same in all of them, for they wait for each other; what differs is the time of a step in
    which a process waits for data or computes itself, `host_seconds`, next to `step_seconds`, all of it.

    Args:
      step: for the warning.

    Returns:
      `slowest_process`, its `slowest_host_seconds`, and the `median_host_seconds` of all; {} but in process 0.
    """
    lines = {process: line for process, line in self._lines.items() if "host_seconds" in line}
    if self._index or len(lines) < 2:
      return {}
    hosts = {process: line["host_seconds"] for process, line in lines.items()}
    slow = max(hosts, key=hosts.get)
    others = statistics.median(seconds for process, seconds in hosts.items() if process != slow)
    whole = lines[slow]["step_seconds"]
    holds_up = hosts[slow] > _BUSY * whole and others < _IDLE * whole
    before, times = self._holding
    self._holding = (slow, times + 1 if slow == before else 1) if holds_up else (None, 0)
    if self._holding[1] == 2:  # Once may be chance.
      logging.warning(
          "Process %d holds the others up: by step %d it is %.3g s of each step away from its devices, %.3g s of them "
          "waiting for data, where others are %.3g s.", slow, step, hosts[slow], lines[slow]["data_seconds"], others)
    return {"slowest_process": slow, "slowest_host_seconds": hosts[slow],
            "median_host_seconds": statistics.median(hosts.values())}

  def _listen(self) -> None:
    looks = 0
    while not self._over.wait(self._pause):
      looks += 1
      try:
        self._store.key_value_set(f"{_ABOUT}{self._index}", json.dumps({**self._said, "looks": looks}), True)
        failure = self._failure()
        if self._index == 0:
          self._lines = self._read_lines()
      except jax.errors.JaxRuntimeError:
        continue  # The store is gone, and process 0 with it, which JAX itself ends this one for.
      if failure and not self._failing and not self._over.is_set():
        self._tell(failure)
        if failure["stacks"]:
          show_stacks()
        self._leave(failure["status"])

  def _end_with(self, error: BaseException) -> None:
    status = 2 if isinstance(error, UserError) and not isinstance(error, Refused) else 1
    words = " ".join(str(error).split())
    message = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
    silent = self._silent() if isinstance(error, jax.errors.JaxRuntimeError) else None
    if silent is None:
      self.fail(message, status)
    else:
      self.fail("it has ended without a word.", restart_status(), silent)

  def _silent(self) -> int | None:
    """Returns a process that says nothing any more: what failed here, a collective, may be its doing."""
    try:
      before = self._read_lines()
      for _ in range(_HEARD):
        if self._failure():
          return None
        time.sleep(self._pause)
      after = self._read_lines()
    except jax.errors.JaxRuntimeError:
      return 0
    spoke = [process for process in after if after[process] != before.get(process)]
    return next((process for process in range(self.count) if process != self._index and process not in spoke), None)

  def _failure(self) -> dict[str, Any] | None:
    return next((json.loads(value) for _, value in self._store.key_value_dir_get(_FAILED)), None)

  def _read_lines(self) -> dict[int, dict[str, float]]:
    return {int(key.removeprefix(_ABOUT)): json.loads(value) for key, value in self._store.key_value_dir_get(_ABOUT)}

  def _tell(self, failure: Mapping[str, Any]) -> None:
    if not self._told and failure["process"] != self._index:
      logging.error("Process %d failed, and this one ends too: %s", failure["process"], failure["message"])
    self._told = True

  def _leave(self, status: int) -> None:
    """Ends the process, without JAX's farewell, for which all would have to be there.

    It leaves time to say why; process 0, whose end takes the store away, stays until all have looked there.
    """
    time.sleep((1 if self._index else _HEARD) * self._pause)
    os._exit(status)


@contextlib.contextmanager
def only_run(workdir: str) -> Iterator[None]:
  """Keeps other runs out of the workdir; the first process does it for all, and they end with it where it may not."""
  with contextlib.ExitStack() as stack:
    refused = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(workdir_lib.locked(workdir))
      except Refused as e:
        refused = e
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(refused is not None)):
      refused = refused or Refused(f"The first process of this run may not write to {workdir}, and says why.")
    if refused:
      raise refused
    yield


def restart_status() -> int:
  """Returns the status by which those who start runs know one that they are to start again; see launch/README.md."""
  return int(os.environ.get("LMJAX_INTERRUPTED_STATUS") or 1) or 1


def show_stacks() -> None:
  """Writes to stderr where each thread of the process stands."""
  faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
