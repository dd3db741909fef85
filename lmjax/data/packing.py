"""How the tokens of a store fill examples of a fixed length.

Every token of a store is a target exactly once an epoch. Its input is the token before it in the store, which at the
start of a document is the end-of-sequence token of the document before; the first token of all gets one too. Examples
are dicts of arrays of length T:

  inputs, targets [T] int32; weights [T] float32, 1 on targets and 0 on padding;
  segment_ids, positions [T] int32, where attention is kept within documents: the part of the example (1, 2, ...; 0 is
  padding) and the place within it. Padding is 0 everywhere.

NumPy only.
"""

import functools
from typing import NamedTuple

import numpy as np

from lmjax.data.token_store import TokenStore


class Concat:
  """Documents joined, then split: example i has the targets [i * T, (i + 1) * T) of the store; the last is padded."""

  def __init__(self, store: TokenStore, seq_len: int, eos_id: int, document_mask: bool):
    """Args: `document_mask`: whether examples carry segment_ids and positions."""
    self.store = store
    self._seq_len = seq_len
    self._eos_id = eos_id
    self._document_mask = document_mask

  def __len__(self) -> int:
    return -(-self.store.num_tokens // self._seq_len)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    length = self._seq_len
    start = index * length
    end = min(start + length, self.store.num_tokens)
    if end - start == length and start:
      # Almost every example: as few operations as there can be, for this sets the speed of the pipeline.
      tokens = self.store.tokens[start - 1:end].astype(np.int32)
      example = {"inputs": tokens[:-1], "targets": tokens[1:], "weights": np.ones(length, np.float32)}
    else:
      example = _empty(length)
      _fill(example, 0, self.store.tokens, start, end, self._eos_id)
    if self._document_mask:
      example |= self._segments(start, end)
    return example

  def _segments(self, start: int, end: int) -> dict[str, np.ndarray]:
    ends = self.store.ends
    first, last = np.searchsorted(ends, (start, end - 1), side="right")
    cuts = np.array([0, *(ends[first:last] - start).tolist(), end - start])
    return _segment_arrays(cuts[1:] - cuts[:-1], self._seq_len)


class BestFit:
  """Documents kept whole where they fit, after Ding et al. 2024, "Fewer Truncations Improve Language Modeling".

  A document longer than T is cut into chunks of T and a rest. Chunks are packed into examples by best-fit-decreasing
  bin packing (arXiv:2404.10830). A chunk that goes on with a cut document has the true token before it as its first
  input.
  """

  def __init__(self, store: TokenStore, seq_len: int, eos_id: int):
    self.store = store
    self._seq_len = seq_len
    self._eos_id = eos_id

  def __len__(self) -> int:
    return len(self.plan.offsets) - 1

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    plan = self.plan
    low, high = plan.offsets[index], plan.offsets[index + 1]
    example = _empty(self._seq_len)
    starts, lengths = plan.starts[low:high], plan.lengths[low:high]
    place = 0
    for start, length in zip(starts.tolist(), lengths.tolist()):
      _fill(example, place, self.store.tokens, start, start + length, self._eos_id)
      place += length
    return example | _segment_arrays(lengths, self._seq_len)

  @functools.cached_property
  def plan(self) -> "Plan":
    """Which chunks make each example; computed when first asked for."""
    return plan_best_fit(self.store.ends, self._seq_len)


class Plan(NamedTuple):
  """Chunks of a store, sorted by example. Example i is made of the chunks [offsets[i], offsets[i + 1])."""
  starts: np.ndarray
  lengths: np.ndarray
  offsets: np.ndarray


def plan_best_fit(ends: np.ndarray, seq_len: int) -> Plan:
  """Packs documents into as few examples as best-fit-decreasing finds.

  Args:
    ends: [documents] int64, where each document ends in the store.
    seq_len: length of an example.
  """
  starts, lengths = _chunks(ends, seq_len)
  by_length = np.argsort(-lengths, kind="stable")
  bins = np.empty(len(lengths), np.int64)
  bins[by_length], num_bins = _best_fit_decreasing(np.bincount(lengths, minlength=seq_len + 1), seq_len)
  # Within an example the longest chunk comes first, the order in which they were placed.
  order = by_length[np.argsort(bins[by_length], kind="stable")]
  offsets = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=num_bins))])
  return Plan(starts[order], lengths[order], offsets)


def _chunks(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts documents into chunks of at most `seq_len` tokens; returns their starts (int64) and lengths (int32)."""
  begins = np.concatenate([[0], ends[:-1]])
  counts = -(-(ends - begins) // seq_len)
  document = np.repeat(np.arange(len(ends)), counts)
  number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
  starts = begins[document] + number * seq_len
  return starts, np.minimum(ends[document] - starts, seq_len).astype(np.int32)


def _best_fit_decreasing(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
  """Best-fit-decreasing bin packing of items of integer sizes, in time that hardly depends on how many there are.

  Items of one size are placed together. The tightest bin that takes an item, once it has taken it, is the tightest for
  the next of the same size too as long as that fits; so it takes as many as fit, and so does every bin with as much
  room.

  Args:
    counts: [capacity + 1], how many items there are of each size.
    capacity: of a bin.

  Returns:
    The bin of each item, the items sorted by decreasing size, and the number of bins.
  """
  bins_with_room = [[] for _ in range(capacity + 1)]  # Lists of arrays of bins.
  has_room = 0  # Bit r is set where bins_with_room[r] is not empty.
  placed, num_bins = [], 0
  for size in range(capacity, 0, -1):
    left = int(counts[size])
    while left:
      fitting = has_room >> size
      if fitting:
        room = size + (fitting & -fitting).bit_length() - 1
        bins = np.concatenate(bins_with_room[room])
        bins_with_room[room] = []
        has_room ^= 1 << room
      else:
        room = capacity
        bins = np.arange(num_bins, num_bins - (-left // (capacity // size)))
        num_bins += len(bins)
      each = room // size
      full = min(len(bins), left // each)
      rest = left - full * each if full < len(bins) else 0
      placed += [np.repeat(bins[:full], each), np.repeat(bins[full:full + 1], rest)]
      left -= full * each + rest
      groups = ((room - each * size, bins[:full]), (room - rest * size, bins[full:full + 1] if rest else bins[:0]),
                (room, bins[full + bool(rest):]))
      for new_room, group in groups:
        if new_room and len(group):
          bins_with_room[new_room].append(group)
          has_room |= 1 << new_room
  return np.concatenate(placed), num_bins


def _empty(length: int) -> dict[str, np.ndarray]:
  inputs, targets = np.zeros((2, length), np.int32)
  return {"inputs": inputs, "targets": targets, "weights": np.zeros(length, np.float32)}


def _segment_arrays(lengths: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
  """Returns segment_ids and positions of an example that is made of segments of these lengths, in order."""
  segment_ids, positions = np.zeros((2, seq_len), np.int32)
  stops = lengths.cumsum()
  used = stops[-1]
  segment_ids[:used] = np.arange(1, len(lengths) + 1).repeat(lengths)
  positions[:used] = np.arange(used) - (stops - lengths).repeat(lengths)
  return {"segment_ids": segment_ids, "positions": positions}


def _fill(example: dict[str, np.ndarray], place: int, tokens: np.ndarray, start: int, end: int, eos_id: int) -> None:
  """Writes the targets [start, end) of the store, and their inputs, into an example from `place` on."""
  stop = place + end - start
  example["targets"][place:stop] = tokens[start:end]
  example["inputs"][place + 1:stop] = tokens[start:end - 1]
  example["inputs"][place] = tokens[start - 1] if start else eos_id
  example["weights"][place:stop] = 1
