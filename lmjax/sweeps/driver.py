"""The driver of a sweep: starts its workers, starts them again when they die, and shows the trials."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Callable, Iterator, Mapping, Sequence

from lmjax.config_checks import Refused, UserError
from lmjax.sweeps.board import Board
from lmjax.sweeps.rows import Row
from lmjax.sweeps.space import as_flags

# Workers that died before any of them took a trial, after which the driver gives up.
_MOST_DEATHS = 3
# Seconds that workers have to save their trials.
_PATIENCE = 120.0


class Workers:
  """Processes that work on a sweep."""

  def __init__(self, argv: Sequence[str], folder: pathlib.Path, environments: Sequence[Mapping[str, str]]):
    """Args: `argv`: of a worker; `folder`: of what they print; `environments`: what each worker's has besides."""
    self._argv, self._folder, self._environments = list(argv), folder, environments
    self._processes: list[subprocess.Popen | None] = [None] * len(environments)
    self.deaths, self.last = 0, ""
    folder.mkdir(parents=True, exist_ok=True)

  def keep_running(self) -> None:
    """Starts those that are not there, or have died; one that has ended well has found nothing left to do."""
    for i, process in enumerate(self._processes):
      if process is not None and process.poll() in (None, 0):
        continue
      if process is not None:
        self.deaths += 1
        self.last = _last_line(self._path(i))
      with open(self._path(i), "ab") as out:
        self._processes[i] = subprocess.Popen(
            self._argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **self._environments[i], "LMJAX_SWEEP_DRIVER": str(os.getpid())})

  def running(self) -> bool:
    """Returns whether any is left."""
    return any(process is not None and process.poll() is None for process in self._processes)

  def stop(self) -> None:
    """Asks all to save and end, and waits for that."""
    for kill in (signal.SIGTERM, signal.SIGKILL):
      for process in filter(None, self._processes):
        if process.poll() is None:
          process.send_signal(kill)
      until = time.monotonic() + _PATIENCE
      while self.running() and time.monotonic() < until:
        time.sleep(0.05)

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f"{os.uname().nodename}-{os.getpid()}-{index}.log"  # Of this driver alone.


def drive(board: Board, workers: Workers, pause: float = 0.5) -> bool:
  """Keeps workers running until all trials have ended; each end is told on stderr.

  Args:
    board: of the sweep.
    workers: not yet started.
    pause: seconds between looks.

  Returns:
    False where a signal has stopped it before.

  Raises:
    Refused: where workers die before they take a trial.
  """
  told = {row.number for row in board.rows() if row.ended}
  if told:
    print(f"lmjax: {len(told)} trials have ended before.", file=sys.stderr)
  starts, deaths = board.starts(), 0
  with _stopped_by_signals() as stopped:
    try:
      while not board.is_over():
        if stopped.is_set():
          return False
        workers.keep_running()
        time.sleep(pause)
        _tell(board, told)
        if (now := board.starts()) > starts:
          starts, deaths = now, workers.deaths
        if workers.deaths - deaths > _MOST_DEATHS:
          raise Refused(f"The sweep's workers die before they take a trial (the last one said: {workers.last}); the "
                        f"whole of it is in {board.workdir / 'workers'}.")
      _tell(board, told)
    finally:
      workers.stop()
  return True


def follow_driver() -> None:
  """Ends this worker, as SIGTERM does, when its driver has died."""
  driver = int(os.environ["LMJAX_SWEEP_DRIVER"])

  def watch():
    while os.getppid() == driver:
      time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
  threading.Thread(target=watch, daemon=True).start()


def table(rows: Sequence[Row], metric: str) -> list[str]:
  """Returns the lines of a table of trials."""
  head = ("trial", "state", metric, "settings")
  cells = [head, *((str(row.number), row.state, "" if row.value is None else f"{row.value:.6g}",
                    words(row) + (f"  ({row.reason})" if row.reason else "")) for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(3)]
  return ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[3]]) for line in cells]


def words(row: Row) -> str:
  """Returns a trial's settings in a few words."""
  return " ".join(flag.removeprefix("--config.") for flag in as_flags(row.settings))


def divide_devices(count: int, environment: Mapping[str, str],
                   dev: pathlib.Path = pathlib.Path("/dev")) -> list[dict[str, str]]:
  """Returns for each of some workers on a machine the environment that gives it its own GPUs.

  Args:
    count: of workers.
    environment: of the driver, whose CUDA_VISIBLE_DEVICES counts, else all that there are.
    dev: folder of the machine's devices.

  Raises:
    UserError: where there are fewer GPUs than workers, or a TPU, all of whose chips the first process takes.
  """
  visible = environment.get("CUDA_VISIBLE_DEVICES")
  if visible is None:
    # CUDA numbers those that there are from 0, whatever they are called: a container may have nvidia2 and nvidia3.
    visible = ",".join(map(str, range(len(list(dev.glob("nvidia[0-9]*"))))))
  devices = [device for device in visible.split(",") if device]
  if count == 1 or environment.get("JAX_PLATFORMS") == "cpu":
    return [{}] * count
  if _is_tpu_host(environment, dev):
    raise UserError(f"--workers is {count}, but the chips of a TPU host are one process's; give --workers=1, or set "
                    "JAX_PLATFORMS=cpu to do without them.")
  if not devices:
    return [{}] * count
  if len(devices) < count:
    raise UserError(f"--workers is {count}, but there are {len(devices)} GPUs, and each worker needs its own; give "
                    f"--workers={len(devices)}.")
  return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[i::count])} for i in range(count)]


def _is_tpu_host(environment: Mapping[str, str], dev: pathlib.Path) -> bool:
  """Returns whether JAX takes a TPU: as JAX_PLATFORMS says, else where there is one and no GPU."""
  if platforms := environment.get("JAX_PLATFORMS"):
    return "tpu" in platforms.split(",")
  has = lambda pattern: any(dev.glob(pattern))
  return not has("nvidia[0-9]*") and (has("accel[0-9]*") or has("vfio/[0-9]*"))  # The latter are those of newer TPUs.


def _tell(board: Board, told: set[int]) -> None:
  rows = board.rows()
  for row in rows:
    if row.ended and row.number not in told:
      told.add(row.number)
      value = f" {board.sweep.metric} {row.value:.6g}" if row.value is not None else ""
      print(f"lmjax: trial {row.number} {row.state}{value}: {words(row)}{f' ({row.reason})' if row.reason else ''}; "
            f"{len(told)} of {max(len(rows), board.sweep.num_trials)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
  stopped, before = threading.Event(), {}
  note: Callable = lambda *_: stopped.set()
  for number in (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ():
    before[number] = signal.signal(number, note)
  try:
    yield stopped
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _last_line(path: pathlib.Path) -> str:
  lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
  return lines[-1].strip() if lines else "nothing"
