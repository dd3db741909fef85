"""The order of training examples, as Grain datasets that can be read at any place.

Element i of an order is the number of the example that training sees as its i-th, counted over all sources of the
mixture, and is a function of the seed and i alone. Grain repeats and mixes, and shuffles large sources, but not by its
`MapDataset.shuffle`: that uses four rounds of a cipher, after which neighbours are correlated (by up to 23 standard
deviations for 65,536 examples) and the means of batches vary too little (0.2 to 0.95 of what chance gives). Sixteen
rounds are as good as chance.
"""

import functools
import hashlib
import operator
from typing import Sequence

import grain
import numpy as np

_ROUNDS = 16
# Up to this size a permutation is drawn whole, in a fifth of a second and 16 MiB at most; Grain's shuffle takes 9 us an
# element, and for small sizes about 2**16 / n times as long.
_SMALL = 1 << 22


def training_order(sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> grain.MapDataset:
  """Returns the infinite order of examples.

  Each source goes on through its epochs at its own pace, and every epoch has an order of its own.

  Args:
    sizes: examples of each source.
    weights: share of each source, in any unit.
    seed: of the run.
    shuffle: whether examples are shuffled.
  """
  orders, offset = [], 0
  for number, size in enumerate(sizes):
    order = _Shuffled(size, _fold(seed, number)) if shuffle else grain.MapDataset.range(size)
    orders.append(order.repeat().map(functools.partial(operator.add, offset)) if offset else order.repeat())
    offset += size
  return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def shares(sizes: Sequence[int], temperature: float, limit: int | None) -> list[float]:
  """Returns in what proportion sources are mixed: min(size, limit)^(1 / temperature).

  At temperature 1 examples of all sources are as likely; the higher it is, the more even the sources are (Raffel et al.
  2019, arXiv 1910.10683, section 3.5.2).

  Args:
    sizes: examples of each source.
    temperature: at least 1.
    limit: a size from which on a source counts no more; None has none.
  """
  return [min(size, limit or size) ** (1 / temperature) for size in sizes]


class _Shuffled(grain.MapDataset):
  """The numbers below `size`, in another random order each epoch."""

  def __init__(self, size: int, seed: int):
    super().__init__()
    self._size = size
    self._shuffle_seed = seed
    self._orders = {}

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, place = divmod(index, self._size)
    if self._size < _SMALL:
      return int(self._order(epoch)[place])
    return grain.experimental.index_shuffle(
        place, max_index=self._size - 1, seed=_fold(self._shuffle_seed, epoch), rounds=_ROUNDS)

  def _order(self, epoch: int) -> np.ndarray:
    """Returns the permutation of an epoch; this one and the one before are kept, as readers are not in step."""
    orders = self._orders
    if epoch not in orders:
      order = np.random.default_rng((self._shuffle_seed, epoch)).permutation(self._size).astype(np.int32)
      orders = {epoch: order} | {kept: orders[kept] for kept in (epoch - 1, epoch + 1) if kept in orders}
      self._orders = orders
    return orders[epoch]


@functools.lru_cache(maxsize=64)
def _fold(seed: int, number: int) -> int:
  """Returns 32 bits from two numbers, so that nearby seeds, sources or epochs share nothing."""
  return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "little")
