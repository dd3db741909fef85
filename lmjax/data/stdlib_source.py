"""The text that every Python has on disk: the source of its standard library.

Each .py file is a document. Validation is made of whole files. A file that shares a large part of its lines with
another (tables of encodings, test vectors, copies) always goes to training, so that nothing held out has a near-copy
there:

1. The distinct stripped lines of at least `MIN_LINE` characters are collected for each file. Lines that stand in more
   than `MAX_FILES` files are idioms and do not count.
2. Two files are near-copies if the lines they share are at least `NEAR_COPY` of the smaller one's lines. A file without
   any line that counts has nothing to be held out for, and goes to training.
3. The others are taken in the order of a hash of their path until validation has its share of the bytes. No file may
   make more than a tenth of it.
"""

import functools
import os
import pathlib
import sysconfig
from typing import Iterator

import numpy as np

from lmjax.config import DataConfig, UserError
from lmjax.data.pieces import Piece, cut_text, digest

MIN_LINE = 12
MAX_FILES = 300
NEAR_COPY = 0.3
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")


class StdlibSource:
  """All .py files of the standard library that are valid UTF-8. See the module's docstring for the split."""

  spec = "stdlib"

  def __init__(self, config: DataConfig, root: str | os.PathLike | None = None):
    """Finds and reads the files.

    Args:
      config: `validation_fraction` is used.
      root: folder to read instead of the running Python's standard library.

    Raises:
      UserError: where this Python carries no source.
    """
    self._root = pathlib.Path(root or sysconfig.get_path("stdlib"))
    self._fraction = config.validation_fraction
    self._contents = dict(_read_files(self._root))
    if not self._contents:
      raise UserError(f"This Python has no .py files in {self._root}, so config.data.source cannot be 'stdlib'; "
                      "name local files instead.")
    flat = [part for item in self._contents.items() for part in item]
    self.fingerprint = digest("stdlib", 1, self._fraction, MIN_LINE, MAX_FILES, NEAR_COPY, *flat)

  def pieces(self, split: str) -> Iterator[Piece]:
    """Yields the files of a split, in the order of their paths."""
    for name in self.files(split):
      yield from cut_text(self.text(name))

  def approximate_bytes(self, split: str) -> int:
    """Returns the exact size of a split."""
    return sum(len(self._contents[name]) for name in self.files(split))

  def files(self, split: str) -> list[str]:
    """Returns the relative paths of a split's files, sorted."""
    held_out = self._held_out
    return [name for name in self._contents if (name in held_out) == (split == "validation")]

  def text(self, name: str) -> str:
    """Returns a file's text."""
    return self._contents[name].decode()

  @functools.cached_property
  def _held_out(self) -> frozenset[str]:
    if not self._fraction:
      return frozenset()
    budget = self._fraction * sum(map(len, self._contents.values()))
    chosen, taken = [], 0
    for name in sorted(_files_without_copies(self._contents), key=lambda name: digest(name)):
      size = len(self._contents[name])
      if size <= budget / 10 and taken + size <= budget:
        chosen.append(name)
        taken += size
    return frozenset(chosen)


def _read_files(root: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (relative path, content) of the .py files, sorted; those that are empty or not UTF-8 are left out."""
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
    paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
  for relative, path in sorted((pathlib.Path(path).relative_to(root).as_posix(), path) for path in paths):
    content = pathlib.Path(path).read_bytes()
    try:
      content.decode()
    except UnicodeDecodeError:
      continue
    if content:
      yield relative, content


def _files_without_copies(contents: dict[str, bytes]) -> list[str]:
  """Returns the files that share less than NEAR_COPY of their lines with any other."""
  from scipy import sparse
  numbers, lines, files = {}, [], []
  for file, content in enumerate(contents.values()):
    distinct = {line for line in map(bytes.strip, content.split(b"\n")) if len(line) >= MIN_LINE}
    lines += [numbers.setdefault(line, len(numbers)) for line in distinct]
    files += [file] * len(distinct)
  table = sparse.csr_array((np.ones(len(files), np.int32), (files, lines)), (len(contents), len(numbers)))
  counts = np.bincount(lines, minlength=len(numbers))
  table = table[:, counts <= MAX_FILES]
  sizes = np.asarray(table.sum(axis=1))
  shared = (table @ table.T).tocoo()
  smaller = np.minimum(sizes[shared.row], sizes[shared.col])
  copies = (shared.row != shared.col) & (shared.data >= NEAR_COPY * smaller)
  alone = sizes > 0
  alone[shared.row[copies]] = False
  return [name for name, is_alone in zip(contents, alone) if is_alone]
