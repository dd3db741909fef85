"""The record of every file of a checkpoint, by which damage is seen before anything is restored.

`checksums.json` holds the size of each file and the CRC-32 of each block of it, under a first line that is the CRC-32
of the rest. It is written before Orbax commits the checkpoint: each process reads back what it wrote, in the thread
that finishes the save. Blocks are checked by as many threads as there are cores, so that one large file keeps them all
busy.
"""

import concurrent.futures
import json
import os
from typing import Iterator
import zlib

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

NAME = "checksums.json"

_BLOCK_BYTES = 1 << 25
_READ_BYTES = 1 << 22


class RecordingHandler(ocp.PyTreeCheckpointHandler):
  """Writes the record of every file before Orbax commits the checkpoint."""

  async def async_save(self, directory: epath.Path, item=None, save_args=None, args=None) -> list:
    """Starts the save; its future ends when this process has recorded the files it wrote."""
    written = await super().async_save(directory, item, save_args, args)
    return [ocp.future.ChainedFuture(written, lambda: _record_own_files(directory))]

  def finalize(self, directory: epath.Path) -> None:
    """Joins the records of all processes; Orbax calls this in process 0 when all have written."""
    super().finalize(directory)
    entries = {}
    for part in list(directory.glob(f"*.{NAME}")):
      entries.update(json.loads(part.read_text()))
      part.unlink()
    entries.update({name: _entry(path) for name, path in _files(directory) if name not in entries})
    text = json.dumps(entries, indent=0)
    (directory / NAME).write_text(f"{zlib.crc32(text.encode())}\n{text}")


def damage(folder: epath.Path, process: int, num_processes: int) -> str | None:
  """Returns what is wrong with the files of a checkpoint, or None.

  Args:
    folder: the state's folder in the checkpoint.
    process: the share to look at, where processes divide the files between them.
    num_processes: shares there are.
  """
  try:
    crc, _, text = (folder / NAME).read_text().partition("\n")
  except (OSError, UnicodeDecodeError):
    return f"{NAME} is missing or cannot be read"
  if crc != str(zlib.crc32(text.encode())):
    return f"{NAME} does not have the checksum it was written with"
  files = sorted(json.loads(text).items())
  for name, (size, *_) in files:
    reason = _size_damage(folder, name, size)
    if reason:
      return reason
  blocks = [(name, number, crc) for name, (_, *crcs) in files for number, crc in enumerate(crcs)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return next(filter(None, pool.map(lambda block: _block_damage(folder, *block), blocks[process::num_processes])),
                None)


def agreed_damage(folder: epath.Path) -> str | None:
  """Returns why a checkpoint is damaged, or None, the same verdict in all processes, which share the reading."""
  reason = damage(folder, jax.process_index(), jax.process_count())
  if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.array(reason is not None))):
    return reason or "another process found a file that is not what was written"
  return reason


def _size_damage(folder: epath.Path, name: str, size: int) -> str | None:
  try:
    found = (folder / name).stat().length
  except OSError:
    return f"{name} is missing or cannot be read"
  return None if found == size else f"{name} has {found} bytes instead of {size}"


def _block_damage(folder: epath.Path, name: str, number: int, crc: int) -> str | None:
  try:
    with (folder / name).open("rb") as file:
      found = _crc_of_block(file, number)
  except OSError:
    return f"{name} is missing or cannot be read"
  return None if found == crc else f"{name} does not have the checksum it was written with"


def _record_own_files(directory: epath.Path) -> None:
  """Records the folder that only this process writes to."""
  process = jax.process_index()
  entries = {name: _entry(path) for name, path in _files(directory, f"ocdbt.process_{process}")}
  (directory / f"{process}.{NAME}").write_text(json.dumps(entries))


def _files(directory: epath.Path, part: str = "") -> Iterator[tuple[str, epath.Path]]:
  """Yields (name relative to `directory`, path) of all files below `directory / part`."""
  folders = [directory / part] if part else [directory]
  while folders:
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      else:
        yield str(path.relative_to(directory)), path


def _entry(path: epath.Path) -> list[int]:
  """Returns the size of a file, then the CRC-32 of each of its blocks."""
  size = path.stat().length
  with path.open("rb") as file:
    return [size, *(_crc_of_block(file, number) for number in range(-(-size // _BLOCK_BYTES)))]


def _crc_of_block(file, number: int) -> int:
  file.seek(number * _BLOCK_BYTES)
  crc, left = 0, _BLOCK_BYTES
  while left and (part := file.read(min(_READ_BYTES, left))):
    crc, left = zlib.crc32(part, crc), left - len(part)
  return crc
