import collections
import time

import numpy as np
import pytest
from scipy import stats

from lmjax.data.mixing import training_order


def _take(order, start, count):
  return [order[i] for i in range(start, start + count)]


@pytest.mark.parametrize("size", [1, 2, 5, 100, 65_535, 65_536])
def test_every_epoch_is_a_permutation_and_epochs_differ(size):
  order = training_order([size], [1], 3, True)
  epochs = [_take(order, epoch * size, size) for epoch in range(2)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(size))
  if size >= 100:
    assert epochs[0] != epochs[1]
    assert epochs[0] != _take(training_order([size], [1], 4, True), 0, size)
    # The second epoch of a seed is not the first of the next seed.
    assert epochs[1] != _take(training_order([size], [1], 4, True), 0, size)


def test_unshuffled_order():
  assert _take(training_order([3], [1], 0, False), 0, 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("size", [3, 10])
def test_small_shuffles_are_uniform(size):
  epochs = 3000
  order = training_order([size], [1], 0, True)
  counts = np.zeros((size, size))
  for place, example in enumerate(_take(order, 0, epochs * size)):
    counts[place % size, example] += 1
  statistic = ((counts - epochs / size) ** 2).sum() / (epochs / size)
  assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-4


@pytest.mark.parametrize("size", [2000, 65_536, 90_000])
def test_shuffles_are_like_uniform_permutations(size):
  order = training_order([size], [1], 0, True)
  epochs = np.array(_take(order, 0, 2 * size)).reshape(2, size)
  # Correlations times the root of the size are standard normal for uniform permutations: of neighbours, with the
  # original order, and between epochs.
  for first, second in ((epochs[0, :-1], epochs[0, 1:]), (epochs[0], np.arange(size)), (epochs[0], epochs[1])):
    assert abs(np.corrcoef(first, second)[0, 1] * np.sqrt(size)) < 4
  # The means of batches of 50 spread as those of draws without replacement.
  means = epochs[0][:size // 50 * 50].reshape(-1, 50).mean(1)
  expected = np.sqrt((size ** 2 - 1) / 12 / 50 * (size - 50) / (size - 1))
  assert abs(means.std() / expected - 1) < 4 / np.sqrt(2 * len(means))


def test_mixture_keeps_its_shares_and_every_source_its_epochs():
  sizes = [10, 30]
  order = training_order(sizes, [1, 1], 0, True)
  examples = _take(order, 0, 600)
  counts = collections.Counter(examples)
  assert sum(counts[i] for i in range(10)) == 300
  assert {counts[i] for i in range(10)} == {30}
  assert {counts[i] for i in range(10, 40)} == {10}
  # Shares hold in every stretch, not only on the whole.
  assert all(4 <= sum(i < 10 for i in examples[k:k + 10]) <= 6 for k in range(0, 600, 10))


def test_far_elements_are_found_at_once():
  order = training_order([1000, 100_000], [0.3, 0.7], 0, True)
  start = time.perf_counter()
  assert 0 <= order[10 ** 12] < 101_000
  assert time.perf_counter() - start < 0.1
