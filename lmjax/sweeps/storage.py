"""Where a sweep keeps its trials, and the locks that keep its workers apart."""

import fcntl
import os
import pathlib
import secrets
from typing import Any

import optuna
from optuna.storages import journal

from lmjax.config_checks import Refused, UserError
from lmjax.workdir import CANNOT_LOCK


def locked(path: pathlib.Path, wait: bool = False) -> int | None:
  """Returns an open file with a lock on it; None where another has it and is not waited for."""
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    os.close(file)
    return None
  except OSError as e:
    os.close(file)
    if e.errno in CANNOT_LOCK:
      raise Refused(f"The file system of {path.parent} has no locks, which the workers of a sweep need; give a "
                    "--workdir on one that has.") from e
    raise
  return file


def joined(path: pathlib.Path) -> tuple[int, bool]:
  """Returns an open file with a lock that many may have, and whether nobody else has it now; one at a time calls it."""
  file = locked(path)
  alone = file is not None
  file = file if alone else os.open(path, os.O_RDWR)
  fcntl.flock(file, fcntl.LOCK_SH)
  return file, alone


def check_locks(path: pathlib.Path) -> None:
  """Raises a Refused where a lock keeps nobody out."""
  path = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
  files = [locked(path), locked(path)]
  path.unlink()
  for file in filter(None, files):
    os.close(file)
  if files[1] is not None:
    raise Refused(f"The locks of the file system of {path.parent} keep nobody out, but the workers of a sweep need "
                  "them; give a --workdir on one that has some.")


class _JournalLock:
  """Lets one process at a time write to a journal; a kill frees it, and what it left half written is cut off.

  Optuna's own locks stay after a kill, and are broken after half a minute, by whoever waits.
  """

  def __init__(self, path: pathlib.Path):
    self._path, self._file = path, None

  def acquire(self) -> bool:
    self._file = locked(self._path.with_name(self._path.name + ".turn"), wait=True)
    with open(self._path, "r+b") as file:
      size = file.seek(0, os.SEEK_END)
      if size and not _ends_line(file, size):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return True

  def release(self) -> None:
    os.close(self._file)


def _ends_line(file: Any, size: int) -> bool:
  file.seek(size - 1)
  return file.read(1) == b"\n"


def open_storage(url: str | None, path: pathlib.Path) -> optuna.storages.BaseStorage:
  """Returns a database, or, without a URL, the journal at a path; raises a UserError where it cannot be opened."""
  if url is None:
    return journal.JournalStorage(journal.JournalFileBackend(str(path), _JournalLock(path)))
  try:
    # Others of a sweep in one file wait for each other.
    wait = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=wait)
  except Exception as e:  # The driver of each database has its own.
    raise UserError(f"--storage={url.partition('@')[2] or url} cannot be opened ({type(e).__name__}: "
                    f"{' '.join(str(e).split())[:200]}); give the URL of a database, such as "
                    "sqlite:////shared/sweep.db.") from e
