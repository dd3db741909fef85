"""The folder of a run: one run at a time writes to it, whole files or none, and what the disk refuses is told."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
from typing import Iterator, Mapping, Sequence

from etils import epath

from lmjax.config_checks import Refused, UserError

LOCK = "run.lock"
_LABELS = "labels.json"

# What a file system without locks answers.
CANNOT_LOCK = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
  """Keeps other runs out of a workdir, which is made where it does not exist.

  The system frees the lock when the process ends, however it ends; the file that a kill leaves behind locks nothing.
  What was made here and is empty at the end is removed again. An object store has no locks, nor have some network
  file systems: there nothing is done.

  Args:
    workdir: of the run. In a run of several processes only the first one calls this.

  Raises:
    Refused: where another run has it, which is named, and where the folder cannot be made or written to.
  """
  if not is_local(workdir):
    yield
    return
  folder = pathlib.Path(workdir).absolute()
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = _take(folder)
  except OSError as e:
    _remove_empty(made)
    raise Refused(f"The workdir {workdir} cannot be written ({e.strerror}); give a --workdir that can.") from e
  try:
    yield
  finally:
    # While it is held: whoever has it open already finds, when he gets the lock, that the file is gone.
    with contextlib.suppress(OSError):
      (folder / LOCK).unlink()
    os.close(lock)
    _remove_empty(made)


def is_local(path: epath.PathLike) -> bool:
  """Returns whether a path lies in the file system, and not in an object store."""
  return "://" not in os.fspath(path)


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file so that a reader, a kill or a full disk finds the old text or the new, never a part."""
  if not is_local(path):
    path.write_text(text)  # An object appears when it is complete.
    return
  temporary = path.with_name(path.name + ".tmp")
  try:
    with open(temporary, "w", encoding="utf-8") as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def write_labels(workdir: epath.Path, labels: Mapping[str, Sequence[str]]) -> None:
  """Writes the names of the labels of a run's tasks, by task."""
  if labels:
    write_whole(workdir / _LABELS, json.dumps(labels, indent=2) + "\n")


def read_labels(workdir: epath.PathLike) -> dict[str, tuple[str, ...]]:
  """Returns them; {} where a folder has none.

  Raises:
    UserError: where the file is damaged.
  """
  path = epath.Path(workdir) / _LABELS
  try:
    return {task: tuple(names) for task, names in json.loads(path.read_text()).items()} if path.exists() else {}
  except (ValueError, AttributeError, TypeError) as e:
    raise UserError(f"{path} is damaged ({e}); remove it, and the labels are those of the data.") from e


@contextlib.contextmanager
def write_errors(workdir: epath.PathLike) -> Iterator[None]:
  """Turns what the file system refuses while a run writes its records into a Refused."""
  try:
    yield
  except OSError as e:
    if e.errno not in _REFUSALS:
      raise
    raise Refused(f"{e.filename or workdir} could not be written ({e.strerror}); make room or mend that, and the same "
                  "command goes on from the last checkpoint.") from e


def _take(folder: pathlib.Path) -> int:
  """Returns the open file that holds the lock."""
  path = folder / LOCK
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = _holder(file)
      os.close(file)
      raise Refused(f"The workdir {folder} is in use by another run ({holder}); wait for it, stop it, or give another "
                    "--workdir.") from None
    except OSError as e:
      if e.errno not in CANNOT_LOCK:
        os.close(file)
        raise
    if not _is_at(path, file):
      os.close(file)  # Its last holder removed it between our opening and locking it.
      continue
    try:
      _sign(file)
    except OSError:
      os.unlink(path)
      os.close(file)
      raise
    return file


def _sign(file: int) -> None:
  """Writes who holds the lock."""
  since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
  os.ftruncate(file, 0)
  os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode(), 0)


def _is_at(path: pathlib.Path, file: int) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(file))
  except FileNotFoundError:
    return False


def _holder(file: int) -> str:
  try:
    record = json.loads(os.pread(file, 4096, 0))
    return f"process {record['pid']} on {record['host']}, since {record['since']}"
  except (ValueError, KeyError, TypeError):
    return "which has just begun"


def _remove_empty(folders: list[pathlib.Path]) -> None:
  for folder in folders:
    with contextlib.suppress(OSError):
      folder.rmdir()
