"""What every source of text is made of: bounded pieces of documents, and the rule that holds some of them out.

A source yields documents in pieces of at most about `MAX_PIECE`, so that no reader ever needs a whole document in
memory.
"""

import hashlib
from typing import Iterator, NamedTuple, Protocol
import zlib

# Bytes of a block of a text file, characters of a part of a record.
MAX_PIECE = 1 << 16


class Piece(NamedTuple):
  """A part of a document."""
  text: str
  ends_document: bool


class Source(Protocol):
  """Where text comes from.

  Attributes:
    spec: the text it was opened from, as in `config.data.source`.
    fingerprint: changes when the data below it or the rule that splits it changes.
  """
  spec: str
  fingerprint: str

  def pieces(self, split: str) -> Iterator[Piece]:
    """Yields the documents of "train" or "validation" in order, each in one or more pieces."""

  def approximate_bytes(self, split: str) -> int | None:
    """Returns about how many bytes of text `pieces` will yield, where that is known before reading."""


def is_held_out(unit: int, fraction: float) -> bool:
  """Says whether a unit of a source without splits of its own belongs to validation.

  Units (records, or blocks of text files) are counted through the whole source, in groups of k = round(1 / fraction).
  One unit of each group is held out: the second of the first group, so that two units are enough for both splits, and
  of every other group one chosen by a hash of the group's number. Validation is thus spread evenly, whatever the order.

  Args:
    unit: number of the unit, from 0.
    fraction: share held out, at most 0.5; 0 holds out nothing.
  """
  if not fraction:
    return False
  group_size = round(1 / fraction)
  group, index = divmod(unit, group_size)
  return index == (zlib.crc32(str(group).encode()) % group_size if group else 1)


def select_split(units: Iterator[Piece], split: str, fraction: float) -> Iterator[Piece]:
  """Yields the units of one split, ending a document wherever its next unit fell to the other split."""
  wanted = split == "validation"
  pending = None
  for number, unit in enumerate(units):
    if is_held_out(number, fraction) == wanted:
      if pending:
        yield from cut_text(*pending)
      pending = unit
    elif pending:
      yield from cut_text(pending.text, True)
      pending = None
  if pending:
    yield from cut_text(*pending)


def cut_text(text: str, ends_document: bool = True) -> Iterator[Piece]:
  """Yields `text` in pieces of at most MAX_PIECE characters, cut after a line end where there is one."""
  start = 0
  while len(text) - start > MAX_PIECE:
    end = text.rfind("\n", start, start + MAX_PIECE) + 1 or start + MAX_PIECE
    yield Piece(text[start:end], False)
    start = end
  yield Piece(text[start:], ends_document)


def split_share(fraction: float, split: str) -> float:
  """Returns the share of a source that a split gets."""
  return fraction if split == "validation" else 1 - fraction


def digest(*parts: object) -> str:
  """Returns a hexadecimal SHA-256 of the parts' texts, in order."""
  result = hashlib.sha256()
  for part in parts:
    data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
    result.update(b"%d:" % len(data))
    result.update(data)
  return result.hexdigest()
