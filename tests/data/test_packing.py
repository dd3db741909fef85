import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmjax.data.packing import BestFit, Concat, plan_best_fit

EOS = 0


def test_concat_joins_documents_and_pads_the_last_example(make_store):
  store = make_store([3, 4])  # 100 101 0 | 103 104 105 0
  packed = Concat(store, 4, EOS, document_mask=False)
  assert len(packed) == 2
  first, last = packed[0], packed[1]
  assert first["inputs"].tolist() == [EOS, 100, 101, 0]
  assert first["targets"].tolist() == [100, 101, 0, 103]
  assert first["weights"].tolist() == [1, 1, 1, 1]
  assert last["inputs"].tolist() == [103, 104, 105, 0]
  assert last["targets"].tolist() == [104, 105, 0, 0]
  assert last["weights"].tolist() == [1, 1, 1, 0]
  assert set(first) == {"inputs", "targets", "weights"}


def test_concat_document_mask_restarts_at_documents(make_store):
  packed = Concat(make_store([3, 4]), 4, EOS, document_mask=True)
  assert packed[0]["segment_ids"].tolist() == [1, 1, 1, 2]
  assert packed[0]["positions"].tolist() == [0, 1, 2, 0]
  assert packed[1]["segment_ids"].tolist() == [1, 1, 1, 0]
  assert packed[1]["positions"].tolist() == [0, 1, 2, 0]


def test_concat_document_ending_with_the_example_opens_no_segment(make_store):
  packed = Concat(make_store([4, 4]), 4, EOS, document_mask=True)
  for index in (0, 1):
    assert packed[index]["segment_ids"].tolist() == [1, 1, 1, 1]
    assert packed[index]["positions"].tolist() == [0, 1, 2, 3]
  assert packed[1]["inputs"].tolist() == [0, 104, 105, 106]


def test_best_fit_keeps_documents_whole_and_fills_examples(make_store):
  # Lengths 3, 2, 5 and T = 5: the document of 5 alone, 3 and 2 together.
  packed = BestFit(make_store([3, 2, 5]), 5, EOS)
  assert len(packed) == 2
  assert packed[0]["targets"].tolist() == [105, 106, 107, 108, 0]
  assert packed[0]["inputs"].tolist() == [EOS, 105, 106, 107, 108]
  assert packed[1]["targets"].tolist() == [100, 101, 0, 103, 0]
  assert packed[1]["inputs"].tolist() == [EOS, 100, 101, EOS, 103]
  assert packed[1]["segment_ids"].tolist() == [1, 1, 1, 2, 2]
  assert packed[1]["positions"].tolist() == [0, 1, 2, 0, 1]


def test_best_fit_chunk_of_a_cut_document_sees_the_true_token_before(make_store):
  packed = BestFit(make_store([7]), 5, EOS)
  assert packed[1]["inputs"].tolist() == [104, 105, 0, 0, 0]
  assert packed[1]["targets"].tolist() == [105, 0, 0, 0, 0]
  assert packed[1]["targets"].tolist()[0] == 105
  assert packed[1]["weights"].tolist() == [1, 1, 0, 0, 0]
  assert packed[1]["segment_ids"].tolist() == [1, 1, 0, 0, 0]


def _reference_bfd(sizes, capacity):
  """Best-fit-decreasing, item by item."""
  room = []
  for size in sorted(sizes, reverse=True):
    fitting = [r for r in room if r >= size]
    if fitting:
      room[room.index(min(fitting))] -= size
    else:
      room.append(capacity - size)
  return sorted(room)


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 17))
def test_plan_covers_every_target_once_and_is_best_fit_decreasing(lengths, seq_len):
  plan = plan_best_fit(np.cumsum(lengths), seq_len)
  covered = np.concatenate([np.arange(s, s + n) for s, n in zip(plan.starts, plan.lengths)])
  assert sorted(covered.tolist()) == list(range(sum(lengths)))
  used = np.add.reduceat(plan.lengths, plan.offsets[:-1])
  assert used.max() <= seq_len
  chunks = [n for length in lengths for n in [seq_len] * (length // seq_len) + [length % seq_len] if n]
  assert sorted((seq_len - used).tolist()) == _reference_bfd(chunks, seq_len)


@hypothesis.settings(max_examples=60,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(2, 11), st.booleans())
def test_every_token_is_a_target_once_with_the_token_before_it_as_input(make_store, lengths, seq_len, best_fit):
  store = make_store(lengths)
  packed = BestFit(store, seq_len, EOS) if best_fit else Concat(store, seq_len, EOS, document_mask=True)
  before = {int(token): int(previous) for previous, token in zip([EOS, *store.tokens], store.tokens) if token}
  seen = []
  for example in (packed[i] for i in range(len(packed))):
    real = example["weights"] > 0
    seen += example["targets"][real].tolist()
    for source, target in zip(example["inputs"][real].tolist(), example["targets"][real].tolist()):
      assert target == EOS or source == before[target]
    assert (example["segment_ids"] > 0).tolist() == real.tolist()
    starts = np.flatnonzero(np.diff(example["segment_ids"], prepend=0) > 0)
    for start in starts:
      assert example["positions"][start] == 0
    inside = real[1:] & (np.diff(example["segment_ids"]) == 0)
    assert (np.diff(example["positions"])[inside] == 1).all()
    for key, value in example.items():
      assert value.shape == (seq_len,) and value.dtype == (np.float32 if key == "weights" else np.int32)
  assert sorted(seen) == sorted(store.tokens.tolist())


def test_plan_of_a_million_documents_takes_seconds():
  lengths = np.random.default_rng(0).geometric(1 / 600, 1_000_000)
  start = time.perf_counter()
  plan = plan_best_fit(np.cumsum(lengths), 1024)
  assert time.perf_counter() - start < 10
  assert int(plan.lengths.sum()) == int(lengths.sum())
  # So many documents leave hardly any padding.
  assert lengths.sum() / ((len(plan.offsets) - 1) * 1024) > 0.999


@pytest.mark.parametrize("lengths, expected", [([5, 5, 5], 3), ([4, 4, 1, 1], 2), ([2, 2, 2, 2, 2], 3)])
def test_number_of_examples(lengths, expected):
  assert len(plan_best_fit(np.cumsum(lengths), 5).offsets) - 1 == expected
