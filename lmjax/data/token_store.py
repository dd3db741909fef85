"""Tokens on disk: a text is tokenised once, and read from then on by memory mapping.

A store is a folder with
  tokens.bin     all tokens, uint16 where the vocabulary allows, else uint32; each document is followed by the
                 tokenizer's end-of-sequence token
  ends.bin       int64, where each document ends (after its end-of-sequence token), in tokens
  manifest.json  what it was made from, and how much there is
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import shutil
from typing import BinaryIO, Iterator
import uuid

import numpy as np

from lmjax.config_checks import Refused, UserError
from lmjax.data.pieces import Piece, Source, digest
from lmjax.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
# Characters tokenised at a time: two pieces a core keep all cores busy, and while it is in the tokenizers library, a
# token takes over a hundred bytes. Two batches are in memory at a time.
_BATCH_SIZE = max(1 << 20, (os.cpu_count() or 1) << 17)


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a store holds and what it was made from.

  Attributes:
    num_bytes: of the text in UTF-8, without the end-of-sequence tokens.
    num_tokens: with them.
  """
  format_version: int
  source: str
  tokenizer: str
  split: str
  dtype: str
  num_tokens: int
  num_documents: int
  num_bytes: int


class TokenStore:
  """A finished store. It is opened lazily and pickles as its path, so that worker processes map the files anew."""

  def __init__(self, path: str | os.PathLike):
    """Reads the manifest.

    Raises:
      UserError: where there is no whole store.
    """
    self.path = pathlib.Path(path)
    try:
      self.manifest = Manifest(**json.loads((self.path / "manifest.json").read_text()))
      sizes = [(self.path / name).stat().st_size for name in ("tokens.bin", "ends.bin")]
    except (OSError, ValueError, TypeError) as e:
      raise UserError(f"{self.path} is not a whole token store ({e}); delete the folder, and it is made anew.") from e
    self.num_tokens = self.manifest.num_tokens
    expected = [self.num_tokens * np.dtype(self.manifest.dtype).itemsize, self.manifest.num_documents * 8]
    if sizes != expected:
      raise UserError(f"The token store in {self.path} is damaged: its files have {sizes} bytes instead of {expected}; "
                      "delete the folder, and it is made anew.")

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """[num_tokens], memory-mapped."""
    # A plain view of the map: slicing a np.memmap costs several times more.
    return np.memmap(self.path / "tokens.bin", self.manifest.dtype, "r").view(np.ndarray)

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """[num_documents] int64, memory-mapped."""
    # Not uint64: searching that for Python's integers would first turn all of it to float64.
    return np.memmap(self.path / "ends.bin", np.int64, "r").view(np.ndarray)

  def __reduce__(self):
    return TokenStore, (self.path,)


def build_store(source: Source, split: str, tokenizer: Tokenizer, cache_dir: str | os.PathLike) -> TokenStore:
  """Returns the store of a source's split, tokenising it unless that has been done.

  Memory does not grow with the text. The store appears under its name when it is whole; processes that want the same
  one wait for the first to make it.

  Args:
    source: what to read.
    split: "train" or "validation".
    tokenizer: what turns text into tokens.
    cache_dir: folder that holds the stores.

  Raises:
    UserError: where the split is empty, the source broken or the folder not writable.
  """
  key = digest(FORMAT_VERSION, source.fingerprint, tokenizer.fingerprint, split)[:24]
  path = pathlib.Path(cache_dir) / "tokens" / key
  if path.is_dir():
    return TokenStore(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
      if not path.is_dir():
        _build(source, split, tokenizer, path)
  except OSError as e:
    raise Refused(f"The tokens of {source.spec} cannot be written to {path.parent} ({e.strerror or e}); make room "
                  "there or set config.data.cache_dir to another folder.") from e
  return TokenStore(path)


def _build(source: Source, split: str, tokenizer: Tokenizer, path: pathlib.Path) -> None:
  for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # Of a build that was killed; the lock says none is running.
    shutil.rmtree(leftover, ignore_errors=True)
  temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
  temporary.mkdir()
  try:
    manifest = _write(source, split, tokenizer, temporary)
    (temporary / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    try:
      temporary.rename(path)
    except OSError:
      if not path.is_dir():  # Else a process elsewhere, which the lock did not reach, was first: its store is the same.
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Source, split: str, tokenizer: Tokenizer, folder: pathlib.Path) -> Manifest:
  from tqdm import tqdm
  dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
  num_tokens = num_documents = num_bytes = 0
  bar = tqdm(desc=f"tokenising {source.spec} ({split})", total=source.approximate_bytes(split), unit="B",
             unit_scale=True, delay=1, disable=None)
  with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "ends.bin", "wb") as ends_file, bar:
    for batch, ids in _encoded(_batches(source.pieces(split)), tokenizer):
      num_documents += _write_batch(batch, ids, tokenizer.eos_id, num_tokens, tokens_file, ends_file, dtype)
      num_tokens = tokens_file.tell() // dtype.itemsize
      batch_bytes = sum(len(piece.text.encode()) for piece in batch)
      num_bytes += batch_bytes
      bar.update(batch_bytes)
    for file in (tokens_file, ends_file):
      file.flush()
      os.fsync(file.fileno())
  if not num_bytes:
    raise UserError(f"The {split} split of {source.spec} has no text; " + (
        "raise config.data.validation_fraction, or name another set in config.eval.sets."
        if split == "validation" else "give a source that has some, or lower config.data.validation_fraction."))
  return Manifest(FORMAT_VERSION, source.fingerprint, tokenizer.fingerprint, split, dtype.name, num_tokens,
                  num_documents, num_bytes)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
  batch, size = [], 0
  for piece in pieces:
    batch.append(piece)
    size += len(piece.text)
    if size >= _BATCH_SIZE:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _encoded(batches: Iterator[list[Piece]], tokenizer: Tokenizer) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
  """Yields batches with the ids of their pieces.

  Two batches are in work at a time: while the last pieces of one are encoded, or its ids made arrays, which takes one
  core, the others are busy with the next.
  """
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    pending = collections.deque()
    for batch in batches:
      pending.append((batch, pool.submit(tokenizer.encode_batch, [piece.text for piece in batch])))
      if len(pending) == 2:
        batch, ids = pending.popleft()
        yield batch, ids.result()
    for batch, ids in pending:
      yield batch, ids.result()


def _write_batch(batch: list[Piece], ids: list[np.ndarray], eos_id: int, offset: int, tokens_file: BinaryIO,
                 ends_file: BinaryIO, dtype: np.dtype) -> int:
  """Appends the tokens of some pieces and the ends of the documents among them; returns how many ended."""
  eos = np.array([eos_id], dtype)
  arrays, ends = [], []
  for piece, tokens in zip(batch, ids):
    arrays.append(tokens.astype(dtype))
    offset += len(tokens)
    if piece.ends_document:
      arrays.append(eos)
      offset += 1
      ends.append(offset)
  # Not `tofile`, which does not say why the system refuses it.
  tokens_file.write(np.concatenate(arrays))
  ends_file.write(np.array(ends, np.int64))
  return len(ends)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds an exclusive lock on a file; the system frees it if the process dies."""
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
