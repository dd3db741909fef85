"""Local files as a source: text, .jsonl and .parquet, one path, a folder or a glob, read in bounded memory.

What is held out follows `pieces.is_held_out`, counted over records, or, for text files, over blocks of a size that lets
even a small file have some of each split. Neighbouring blocks of a file that fall to the same split stay one document.
"""

import glob
import json
import os
import pathlib
from typing import Any, Iterator

from lmjax.config import DataConfig
from lmjax.config_checks import UserError, nearest
from lmjax.data.pieces import MAX_PIECE, Piece, digest, select_split, split_share

_MIN_BLOCK = 256
_SOURCES = ("stdlib, a path or glob of text, .jsonl or .parquet files, tfds:NAME, or the folder of a prepared TFDS "
            "data set")
_BOM = b"\xef\xbb\xbf"


class FileSource:
  """Files matched by a path, a folder or a glob, in the order of their names."""

  def __init__(self, spec: str, config: DataConfig):
    """Finds the files.

    Args:
      spec: a path, a folder (all files below it that are not hidden) or a glob (`**` matches any number of folders).
      config: `text_field` and `validation_fraction` are used.

    Raises:
      UserError: where nothing matches, or all that matches is empty.
    """
    self.spec = spec
    self._field = config.text_field
    self._fraction = config.validation_fraction
    self._paths = find_files(spec)
    stats = [_stat(path) for path in self._paths]
    self._num_bytes = sum(stat.st_size for stat in stats)
    if not self._num_bytes:
      raise UserError(f"There is nothing in {self._paths[0]}{' and the other files' if len(stats) > 1 else ''} that "
                      f"config.data.source = {spec!r} names; give files that hold text.")
    base = os.path.commonpath([path.absolute().parent for path in self._paths])
    facts = [(os.path.relpath(path, base), stat.st_size, stat.st_mtime_ns) for path, stat in zip(self._paths, stats)]
    self.fingerprint = digest("files", 1, self._fraction, self._field, facts)

  def pieces(self, split: str) -> Iterator[Piece]:
    """Yields the documents of a split.

    Raises:
      UserError: for a file that cannot be read, with its path and line, record or byte.
    """
    return select_split(self._units(), split, self._fraction)

  def approximate_bytes(self, split: str) -> int | None:
    """Returns about how many bytes a split has; not known for compressed files."""
    if any(path.suffix == ".parquet" for path in self._paths):
      return None
    return round(self._num_bytes * split_share(self._fraction, split))

  def _units(self) -> Iterator[Piece]:
    for path in self._paths:
      try:
        if path.suffix == ".jsonl":
          yield from _read_jsonl(path, self._field)
        elif path.suffix == ".parquet":
          yield from _read_parquet(path, self._field)
        else:
          yield from _read_text(path, self._block_size())
      except OSError as e:
        raise unreadable(path, e) from e

  def _block_size(self) -> int:
    # A quarter of the share held out, so that it is made of several blocks even where the file is small.
    share = self._num_bytes * self._fraction / 4 if self._fraction else MAX_PIECE
    return int(min(max(share, _MIN_BLOCK), MAX_PIECE // 2))


def find_files(spec: str, called: str = "config.data.source =", known: str = _SOURCES) -> list[pathlib.Path]:
  """Returns the files that a path, a folder or a glob names, sorted.

  Args:
    spec: the path, folder or glob.
    called: for the message where there is none: what stands before the spec.
    known: for the same: what is allowed there.

  Raises:
    UserError: where there is none.
  """
  path = pathlib.Path(spec).expanduser()
  if path.is_file():
    return [path]
  pattern = os.path.join(glob.escape(str(path)), "**") if path.is_dir() else str(path)
  found = sorted(pathlib.Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
  found = [name for name in found if "__pycache__" not in name.parts]
  if not found:
    where = "holds no file" if path.is_dir() else f"matches no file or folder (looked from {os.getcwd()})"
    raise UserError(f"{called} {spec!r} {where}; give {known}.")
  return found


def _stat(path: pathlib.Path) -> os.stat_result:
  try:
    return path.stat()
  except OSError as e:  # It has been deleted since it was listed.
    raise unreadable(path, e) from e


def unreadable(path: pathlib.Path, error: OSError) -> UserError:
  """Returns what to say of a file that the system does not give."""
  reason = error.strerror or str(error).splitlines()[0]
  return UserError(f"{path} cannot be read ({reason}); make it readable or leave it out of config.data.source.")


def _read_text(path: pathlib.Path, block_size: int) -> Iterator[Piece]:
  """Yields a text file in blocks of about `block_size` bytes."""
  with open(path, "rb") as file:
    start = file.read(len(_BOM))
    buffer, offset = (b"", len(_BOM)) if start == _BOM else (start, 0)
    buffer += file.read(MAX_PIECE)
    while buffer:
      end = _block_end(buffer, block_size)
      text = _decode(buffer[:end], path, offset)
      buffer = buffer[end:]
      offset += end
      if len(buffer) < MAX_PIECE:
        buffer += file.read(MAX_PIECE)
      yield Piece(text, not buffer)


def _block_end(buffer: bytes, block_size: int) -> int:
  """Returns where to cut: after the first line end from `block_size` on, or within a long line before a character."""
  if len(buffer) <= block_size:
    return len(buffer)
  newline = buffer.find(b"\n", block_size - 1, min(4 * block_size, MAX_PIECE))
  if newline >= 0:
    return newline + 1
  end = block_size
  while end > block_size - 3 and buffer[end] & 0xC0 == 0x80:
    end -= 1
  return end


def _decode(block: bytes, path: pathlib.Path, offset: int) -> str:
  try:
    text = block.decode()
    bad = block.find(b"\0")
  except UnicodeDecodeError as e:
    bad = e.start
  if bad >= 0:
    raise UserError(f"{path} is not UTF-8 text (byte {offset + bad}); convert it, or leave it out of "
                    "config.data.source, for instance by a glob.")
  return text


def _read_jsonl(path: pathlib.Path, field: str) -> Iterator[Piece]:
  for where, record in json_lines(path, f" with the field {field!r}"):
    yield from _record(record, field, where)


def json_lines(path: pathlib.Path, what: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (its place, the object) for each line of a .jsonl file that is not empty.

  Args:
    path: of the file.
    what: for the message of a line that holds something else: what an object is to have.

  Raises:
    UserError: for a line that is no JSON object, with its place.
  """
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      line = line.removeprefix(_BOM) if number == 1 else line
      if not line.strip():
        continue
      where = f"{path}:{number}"
      try:
        record = json.loads(line)
      except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e}); each line must be one JSON object.") from e
      if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object but {kind_of(record)}; each line must be an object{what}.")
      yield where, record


def _read_parquet(path: pathlib.Path, field: str) -> Iterator[Piece]:
  import pyarrow
  import pyarrow.parquet
  try:
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
      names = file.schema_arrow.names
      if field not in names:
        raise UserError(_missing_field(str(path), field, names))
      number = 0
      for batch in file.iter_batches(batch_size=256, columns=[field]):
        for value in batch.column(0).to_pylist():
          number += 1
          yield from _record({field: value}, field, f"{path}, record {number}")
  except pyarrow.ArrowException as e:
    raise UserError(f"{path} is not a readable parquet file ({str(e).splitlines()[0]}); write it again or leave it out "
                    "of config.data.source.") from e


def _record(record: dict[str, Any], field: str, where: str) -> Iterator[Piece]:
  """Yields the text of a record, which is one document; an empty one yields nothing."""
  if field not in record:
    raise UserError(_missing_field(where, field, list(record)))
  text = record[field]
  if not isinstance(text, str):
    raise UserError(f"{where}: the field {field!r} is {kind_of(text)}, not text; mend the record or set "
                    "config.data.text_field.")
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise UserError(f"{where}: the field {field!r} has half a surrogate pair at character {e.start}, which is not "
                    "Unicode text; mend the record.") from e
  if text:
    yield Piece(text, True)


def _missing_field(where: str, field: str, present: list[str]) -> str:
  if not present:
    return f"{where} has no field {field!r}; it has none at all."
  return f"{where} has no field {field!r} (config.data.text_field){nearest(field, present)}"


def kind_of(value: Any) -> str:
  """Returns what a message calls a value of JSON."""
  return {type(None): "null", dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number",
          str: "a string"}.get(type(value), type(value).__name__)
