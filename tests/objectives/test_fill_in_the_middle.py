"""What a rearranged example holds: the whole text, cut in three, in both orders, at the rates asked for."""

import numpy as np
import pytest

from lmjax.data.packing import BestFit, Concat
from lmjax.objectives import causal_lm, fill_in_the_middle

T, EOS = 32, 256


def special(made):
  return made.tokenizer.add_special(fill_in_the_middle.SPECIAL_TOKENS).values()


def restored(made, targets):
  """Returns the text of a row in its own order, the order that it had (None for its own), and the three parts.

  Without a prefix both orders are the same, and are told as "spm".
  """
  prefix, suffix, middle = (np.flatnonzero(targets == id) for id in special(made))
  if not len(prefix):
    return targets.tolist(), None, None
  (start,), (after,), (between,) = prefix, suffix, middle
  before, text = targets[:start].tolist(), targets.tolist()
  # The document goes on to its end token, or to the end of the row.
  ends = np.flatnonzero(targets[between:] == EOS)
  stop = between + ends[0] if len(ends) else len(targets)
  if after == start + 1:
    # Which of the text after the third token is prefix and which middle, the row does not say.
    parts = [], text[between + 1:stop], text[after + 1:between]
    return before + parts[1] + parts[2] + text[stop:], "spm", parts
  parts = text[start + 1:after], text[between + 1:stop], text[after + 1:between]
  return before + [token for part in parts for token in part] + text[stop:], "psm", parts


def test_every_token_of_the_text_is_there_in_its_order(task):
  made = task("llama", seq_len=T, name="fill_in_the_middle", fim_rate=0.9)
  orders = []
  for number in range(300):
    row, example = made.row(number), made.texts[number % 64]
    targets, text = row["targets"][row["weights"] > 0], example["targets"][example["weights"] > 0]
    again, order, _ = restored(made, targets)
    assert again == text.tolist() and len(targets) == len(text) + (3 if order else 0)
    assert row["inputs"][0] == example["inputs"][0]
    assert np.array_equal(row["inputs"][1:len(targets)], targets[:-1]) and not row["inputs"][len(targets):].any()
    orders.append(order)
  assert {value.shape for value in row.values()} == {(T,)}
  assert orders.count(None) / 300 == pytest.approx(0.1, abs=0.05)
  assert orders.count("psm") / 300 == pytest.approx(0.45, abs=0.1)


@pytest.mark.parametrize("rates, order, least", [
    (dict(fim_rate=0.0), None, 50), (dict(fim_rate=1.0, fim_spm_rate=0.0), "psm", 35),
    (dict(fim_rate=1.0, fim_spm_rate=1.0), "spm", 50)])
def test_rates_of_nothing_and_all(task, rates, order, least):
  """A prefix of no tokens, which makes PSM look like SPM, has a probability of about one in ten here."""
  made = task("llama", seq_len=T, name="fill_in_the_middle", **rates)
  orders = [restored(made, row["targets"][row["weights"] > 0])[1] for row in map(made.row, range(50))]
  assert orders.count(order) >= least and {*orders} - {order} <= {"spm"}


def test_cuts_fall_everywhere(task, store):
  """Of two places among 0 ... n drawn alike, the three parts are as long as each other on average, and may be empty."""
  made = task("llama", seq_len=T, name="fill_in_the_middle", fim_rate=1.0, fim_spm_rate=0.0)
  example = {name: values[:T - 3] for name, values in Concat(store((200,)), T - 3, EOS, False)[1].items()}
  rows = [made.make(example, (0, place)) for place in range(2000)]
  lengths = np.array([[len(part) for part in restored(made, row["targets"])[2]] for row in rows])
  assert (lengths.sum(axis=1) == T - 3).all() and (lengths.min(axis=0) == 0).all()
  np.testing.assert_allclose(lengths.mean(axis=0), (T - 3) / 3, atol=1)


@pytest.mark.parametrize("pack", [
    lambda store: Concat(store, T - 3, EOS, False), lambda store: Concat(store, T - 3, EOS, True),
    lambda store: BestFit(store, T - 3, EOS)], ids=["joined", "document_mask", "best_fit"])
def test_one_document_of_several_is_rearranged_and_keeps_to_itself(task, store, pack):
  made = task("llama", seq_len=T, name="fill_in_the_middle", fim_rate=1.0, fim_spm_rate=0.0)
  packed, met = pack(store((9, 4, 12, 60, 7, 3, 20, 1, 16))), 0
  for number in range(len(packed)):
    example = packed[number]
    text = example["targets"][example["weights"] > 0]
    for seed in range(30):
      row = made.make(example, (seed, number))
      real = row["weights"] > 0
      targets = row["targets"][real]
      again, order, _ = restored(made, targets)
      assert again == text.tolist() and order
      places = np.flatnonzero(np.isin(targets, list(special(made))))
      assert EOS not in targets[places[0]:places[-1]]
      starts = row["positions"][real] == 0 if "positions" in row else np.arange(len(targets)) == 0
      assert np.array_equal(row["inputs"][real][~starts], targets[:-1][~starts[1:]])
      met += places[0] > 0
      if "segment_ids" not in row:
        continue
      segments = row["segment_ids"][real]
      assert np.array_equal(starts, np.append(True, np.diff(segments) > 0)) and len({*segments[places]}) == 1
      assert np.bincount(segments)[1:].sum() == len(text) + 3 and not row["segment_ids"][~real].any()
      assert {*segments} == {*example["segment_ids"][example["weights"] > 0]}
      first = np.flatnonzero(example["positions"] == 0)[:len({*segments})]
      assert np.array_equal(row["inputs"][real][starts], example["inputs"][first])
  assert met > 20


def test_the_loss_is_that_of_causal_lm():
  assert fill_in_the_middle.loss is causal_lm.loss
