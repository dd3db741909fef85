import collections
import itertools
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats

from lmjax.data import mixing
from lmjax.data.mixing import training_order


@pytest.fixture(scope="module", autouse=True)
def both_ways_at_small_sizes():
  """Sizes from 65,536 take the way of sources that are too large to draw a permutation of."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mixing, "_SMALL", 1 << 16)
    yield


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


def _coverage(batch, size, bins):
  """Returns the chi-squared statistic of how evenly a batch covers a sorted corpus that is cut into `bins` parts."""
  counts = np.bincount(np.asarray(batch) * bins // size, minlength=bins)
  expected = len(batch) / bins
  return ((counts - expected) ** 2).sum() / expected


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size, batch", [(6_400, 64), (76_800, 256)])
def test_batches_of_a_sorted_corpus_cover_it_as_those_of_a_uniform_permutation(size, batch, seed):
  """The corpus is sorted: example i has the topic i * 16 // size. z-scores, so that 4.5 is one in 150,000."""
  bins = 16
  epoch = np.array(_take(training_order([size], [1], seed, True), 0, size))
  batches = epoch.reshape(-1, batch)
  statistics = np.array([_coverage(row, size, bins) for row in batches])
  # A batch drawn without replacement has counts of a multivariate hypergeometric distribution.
  mean = (bins - 1) * (size - batch) / (size - 1)
  assert abs(statistics.mean() - mean) / np.sqrt(2 * (bins - 1) / len(batches)) < 4.5
  # Neither too even nor too uneven: the spread between batches is that of chi-squared, too.
  assert 0.6 < statistics.var() / (2 * (bins - 1)) < 1.6
  assert statistics.max() < stats.chi2.isf(1e-6 / len(batches), bins - 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [6_400, 80_000])
def test_neither_neighbours_nor_places_of_a_sorted_corpus_are_correlated(size, seed):
  epoch = np.array(_take(training_order([size], [1], seed, True), 0, size), np.float64)
  standard = (epoch - epoch.mean()) / epoch.std()
  # Wald and Wolfowitz 1943: the serial correlation of a random permutation has mean -1 / (n - 1), variance about 1 / n.
  for lag in (1, 2, 3, 8, 64, 256, size // 2):
    assert abs((standard[lag:] @ standard[:-lag] / (size - lag) + 1 / (size - 1)) * np.sqrt(size - lag)) < 4.5
  assert abs(standard @ (np.arange(size) - (size - 1) / 2) / size / np.sqrt((size ** 2 - 1) / 12) * np.sqrt(size)) < 4.5
  # Runs up and down (Levene 1952): their number has mean (2n - 1) / 3 and variance (16n - 29) / 90.
  runs = 1 + (np.diff(np.sign(np.diff(epoch))) != 0).sum()
  assert abs(runs - (2 * size - 1) / 3) / np.sqrt((16 * size - 29) / 90) < 4.5


@pytest.mark.parametrize("size", [6_400, 70_000])
def test_epochs_and_seeds_differ_and_are_uncorrelated(size):
  orders = [training_order([size], [1], seed, True) for seed in (0, 1)]
  epochs = [np.array(_take(order, number * size, size)) for order in orders for number in range(2)]
  for first, second in itertools.combinations(epochs, 2):
    assert abs(np.corrcoef(first, second)[0, 1] * np.sqrt(size)) < 4.5
    # Places that hold the same example in both: of mean 1, and of variance 1, like fixed points of a permutation.
    assert (first == second).sum() < 10
    # Batches of both epochs share no more examples than chance has it.
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(first.reshape(-1, 100), second.reshape(-1, 100)))
    assert abs(shared - 100) < 4.5 * 10


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.integers(1, 300), st.integers(0, 2 ** 31), st.integers(0, 50), st.booleans())
def test_any_epoch_of_any_size_and_seed_is_a_permutation(size, seed, epoch, shuffle):
  order = training_order([size], [1], seed, shuffle)
  assert sorted(_take(order, epoch * size, size)) == list(range(size))


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 2 ** 31), st.data())
def test_an_element_is_a_function_of_seed_and_place_alone(sizes, seed, data):
  weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
  places = data.draw(st.permutations(range(200)))
  whole = _take(training_order(sizes, weights, seed, True), 0, 200)
  again = training_order(sizes, weights, seed, True)
  assert {place: again[place] for place in places} == dict(enumerate(whole))
  # Every source goes through all its examples before it repeats one.
  begins = np.concatenate([[0], np.cumsum(sizes)])
  for begin, end in zip(begins, begins[1:]):
    own = [i for i in whole if begin <= i < end]
    for first in range(0, len(own) - (end - begin) + 1, end - begin):
      assert sorted(own[first:first + end - begin]) == list(range(begin, end))
