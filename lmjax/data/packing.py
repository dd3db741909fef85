"""How the tokens of a store fill examples of a fixed length.

Every token of a store is a target exactly once an epoch. Its input is the token before it in the store, which at the
start of a document is the end-of-sequence token of the document before; the first token of all gets one too. An example
is a dict of arrays of length T, and several are one of arrays [examples, T]:

  inputs, targets [T] int32; weights [T] float32, 1 on targets and 0 on padding;
  segment_ids, positions [T] int32, where attention is kept within documents: the part of the example (1, 2, ...; 0 is
  padding) and the place within it. Padding is 0 everywhere.

Many examples are read at once, in a few operations on whole arrays: that sets the speed of the pipeline. NumPy only.
"""

import functools
from typing import NamedTuple

import numpy as np

from lmjax.data.token_store import TokenStore


class _Packed:
  """A store as examples: what Concat and BestFit share."""

  def __init__(self, store: TokenStore, seq_len: int, eos_id: int):
    self.store = store
    self._seq_len = seq_len
    self._eos_id = eos_id

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: values[0] for name, values in self.read(np.array([index])).items()}

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples of these numbers."""
    raise NotImplementedError

  def _fill(self, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray, segments: bool) -> dict[str, np.ndarray]:
    """Makes examples of chunks of the store.

    Args:
      starts, lengths: [chunks] in tokens, the chunks of the first example first.
      counts: [examples], how many chunks each is made of.
      segments: whether to make segment_ids, in which each chunk is a part, and positions.
    """
    tokens, shape = self.store.tokens, (len(counts), self._seq_len)
    firsts = np.cumsum(counts) - counts
    used = np.add.reduceat(lengths, firsts)
    lengths = lengths.copy()
    lengths[firsts + counts - 1] += self._seq_len - used  # Padding is read as more of the last chunk, then cleared.
    begins = np.cumsum(lengths) - lengths
    targets = tokens.take(_ranges(starts, lengths), mode="clip").astype(np.int32).reshape(shape)
    inputs = np.empty(shape, np.int32)
    inputs[:, 1:] = targets[:, :-1]
    inputs.ravel()[begins] = np.where(starts > 0, tokens[starts - 1], self._eos_id)
    examples = {"inputs": inputs, "targets": targets, "weights": np.ones(shape, np.float32)}
    if segments:
      numbers = np.arange(1, len(lengths) + 1, dtype=np.int32) - np.repeat(firsts, counts).astype(np.int32)
      examples["segment_ids"] = np.repeat(numbers, lengths).reshape(shape)
      examples["positions"] = _ranges(np.zeros(len(lengths), np.int32), lengths).reshape(shape)
    for row in np.flatnonzero(used < self._seq_len):
      for values in examples.values():
        values[row, used[row]:] = 0
    return examples


class Concat(_Packed):
  """Documents joined, then split: example i has the targets [i * T, (i + 1) * T) of the store; the last is padded."""

  def __init__(self, store: TokenStore, seq_len: int, eos_id: int, document_mask: bool):
    """Args: `document_mask`: whether examples carry segment_ids and positions."""
    super().__init__(store, seq_len, eos_id)
    self._document_mask = document_mask

  def __len__(self) -> int:
    return -(-self.store.num_tokens // self._seq_len)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    starts = indices * self._seq_len
    stops = np.minimum(starts + self._seq_len, self.store.num_tokens)
    counts = np.ones(len(indices), np.int64)
    if self._document_mask:
      starts, stops, counts = self._cut(starts, stops)
    return self._fill(starts, stops - starts, counts, self._document_mask)

  def _cut(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts examples where documents end within them; returns starts and stops of the parts, and how many each has."""
    ends = self.store.ends
    first = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, stops, side="left") - first + 1
    # The last part of an example ends with it, perhaps before its document does.
    cuts = ends[_ranges(first, counts)]
    lasts = np.cumsum(counts) - 1
    cuts[lasts] = stops
    begins = np.roll(cuts, 1)
    begins[lasts - counts + 1] = starts
    return begins, cuts, counts


class BestFit(_Packed):
  """Documents kept whole where they fit, after Ding et al. 2024, "Fewer Truncations Improve Language Modeling".

  A document longer than T is cut into chunks of T and a rest. Chunks are packed into examples by best-fit-decreasing
  bin packing (arXiv:2404.10830). A chunk that goes on with a cut document has the true token before it as its first
  input.
  """

  def __len__(self) -> int:
    return len(self.plan.offsets) - 1

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    offsets = self.plan.offsets
    counts = offsets[indices + 1] - offsets[indices]
    chunks = _ranges(offsets[indices], counts)
    return self._fill(self.plan.starts[chunks], self.plan.lengths[chunks], counts, segments=True)

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


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns the numbers start, start + 1, ... of ranges of these lengths, joined, in the type of `starts`."""
  lengths = lengths.astype(starts.dtype)
  stops = np.cumsum(lengths, dtype=starts.dtype)
  return np.arange(stops[-1], dtype=starts.dtype) + np.repeat(starts - (stops - lengths), lengths)
