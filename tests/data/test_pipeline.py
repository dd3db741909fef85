import itertools
import json
import time

import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.data import pipeline


def as_is(example, rng_key):
  del rng_key
  return example


def with_key(example, rng_key):
  return example | {"key": np.array(rng_key, np.int64), "draw": np.random.default_rng(rng_key).random(2)}


@pytest.fixture
def texts(tmp_path):
  """Writes a.jsonl and b.txt and returns their paths."""
  with open(tmp_path / "a.jsonl", "w") as file:
    for i in range(400):
      file.write(json.dumps({"text": f"record {i} " + "word " * (i % 13)}) + "\n")
  (tmp_path / "b.txt").write_text("".join(f"line {i} of b\n" for i in range(2000)))
  return str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")


def _batches(config, count, start_step=0, make_example=as_is, **processes):
  data = pipeline.open_data(config)
  return list(itertools.islice(
      pipeline.train_batches(data, config, start_step=start_step, make_example=make_example, **processes), count))


def _assert_same(first, second):
  assert len(first) == len(second) > 0
  for one, other in zip(first, second):
    assert one.keys() == other.keys()
    for key in one:
      assert one[key].dtype == other[key].dtype
      np.testing.assert_array_equal(one[key], other[key])


PACKINGS = [dict(packing="concat"), dict(packing="concat", document_mask=True), dict(packing="best_fit")]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_batches_have_the_promised_shapes(make_config, texts, packing):
  config = make_config(source=texts[0], tokenizer="bytes", seq_len=32, **packing)
  batch, = _batches(config, 1)
  expected = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
  if packing != PACKINGS[0]:
    expected |= {"segment_ids": np.int32, "positions": np.int32}
  assert {key: value.dtype for key, value in batch.items()} == expected
  assert all(value.shape == (4, 32) for value in batch.values())


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_order_depends_on_seed_and_step_alone(make_config, texts, packing):
  def config(**settings):
    return make_config(source=",".join(texts), weights=(2, 1), tokenizer="bytes", seq_len=32, **packing, **settings)
  whole = _batches(config(), 12, make_example=with_key)
  _assert_same(_batches(config(prefetch=1), 4, start_step=8, make_example=with_key), whole[8:])
  for count in (2, 4):
    parts = [_batches(config(), 12, make_example=with_key, rows=range(p, 4, count)) for p in range(count)]
    # Process p reads every count-th row from p on, so that stacking along a new axis puts them back in order.
    joined = [{key: np.stack([part[key] for part in step], 1).reshape(4, *step[0][key].shape[1:]) for key in step[0]}
              for step in zip(*parts)]
    _assert_same(joined, whole)
  other = _batches(config(seed=1), 12)
  assert any((one["targets"] != two["targets"]).any() for one, two in zip(whole, other))


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_the_number_of_processes_may_change_in_mid_run(make_config, texts, packing):
  """One process reads three batches, then four go on, then two; each holds a run of neighbouring rows."""
  config = make_config(source=",".join(texts), weights=(1, 3), tokenizer="bytes", seq_len=32, batch_size=8, **packing)
  data = pipeline.open_data(config)
  read = lambda start, rows: list(itertools.islice(
      pipeline.train_batches(data, config, start_step=start, make_example=with_key, rows=rows), 3))
  joined = []
  for start, count in ((0, 1), (3, 4), (6, 2)):
    parts = [read(start, range(8 // count * p, 8 // count * (p + 1))) for p in range(count)]
    joined += [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)]
  _assert_same(joined, _batches(config, 9, make_example=with_key))


def test_workers_read_the_same(make_config, texts):
  def config(workers):
    return make_config(source=texts[0], tokenizer="bytes", seq_len=32, packing="best_fit", num_workers=workers)
  _assert_same(_batches(config(2), 6, start_step=3), _batches(config(0), 6, start_step=3))


def test_the_key_of_an_example_is_its_place(make_config, texts):
  config = make_config(source=texts[0], tokenizer="bytes", seq_len=32, seed=7)
  batch, = _batches(config, 1, start_step=5, make_example=with_key, rows=[2, 3])
  assert batch["key"].tolist() == [[7, 22], [7, 23]]


def test_an_epoch_has_every_token_once_and_the_next_another_order(make_config, texts):
  config = make_config(source=texts[0], tokenizer="bytes", seq_len=32, batch_size=1)
  data = pipeline.open_data(config)
  epoch = data.train.num_examples
  rows = _batches(config, 2 * epoch)
  def tokens(part):
    return np.sort(np.concatenate([row["targets"][row["weights"] > 0] for row in part]))
  for part in (rows[:epoch], rows[epoch:]):
    np.testing.assert_array_equal(tokens(part), np.sort(data.train.parts[0].store.tokens))
  assert sum(row["weights"].sum() for row in rows[:epoch]) == data.train.num_tokens
  assert any((a["targets"] != b["targets"]).any() for a, b in zip(rows[:epoch], rows[epoch:]))


def test_unshuffled_training_reads_in_order(make_config, texts):
  config = make_config(source=texts[1], tokenizer="bytes", seq_len=8, batch_size=2, shuffle=False)
  data = pipeline.open_data(config)
  first, second = _batches(config, 2)
  read = np.concatenate([first["targets"].ravel(), second["targets"].ravel()])
  np.testing.assert_array_equal(read, data.train.parts[0].store.tokens[:32])


def test_seek_to_step_a_million_is_quick(make_config, texts):
  config = make_config(source=",".join(texts), tokenizer="bytes", seq_len=32)
  data = pipeline.open_data(config)
  next(pipeline.train_batches(data, config, start_step=0, make_example=as_is))  # Imports Grain.
  start = time.perf_counter()
  next(pipeline.train_batches(data, config, start_step=1_000_000, make_example=as_is))
  assert time.perf_counter() - start < 1


def test_weights_set_the_shares(make_config, texts):
  config = make_config(source=",".join(texts), weights=(9, 1), tokenizer="bytes", seq_len=32, batch_size=10)
  data = pipeline.open_data(config)
  from_b = set(map(bytes, (data.train.parts[1][i]["targets"] for i in range(len(data.train.parts[1])))))
  rows = [bytes(row) for batch in _batches(config, 20) for row in batch["targets"]]
  assert sum(row in from_b for row in rows) == 20


def test_evaluation_sees_every_token_once_in_equal_shapes(make_config, texts):
  config = make_config(source=texts[0], tokenizer="bytes", seq_len=32)
  token_set = pipeline.open_data(config).eval_sets["validation"]
  parts = [list(pipeline.eval_batches(token_set, config, batch_size=6, make_example=as_is,
                                      rows=[2 * p, 2 * p + 1])) for p in range(3)]
  assert len({len(part) for part in parts}) == 1
  batches = [batch for part in parts for batch in part]
  assert {batch["targets"].shape for batch in batches} == {(2, 32)}
  tokens = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
  np.testing.assert_array_equal(np.sort(tokens), np.sort(token_set.parts[0].store.tokens))
  # In one process, and in order.
  whole = list(pipeline.eval_batches(token_set, config, batch_size=6, make_example=as_is))
  tokens = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in whole])
  np.testing.assert_array_equal(tokens, token_set.parts[0].store.tokens)


def test_part_of_an_evaluation_is_spread_evenly(make_config, texts):
  config = make_config(source=texts[1], tokenizer="bytes", seq_len=8)
  token_set = pipeline.open_data(config).train
  batches = list(pipeline.eval_batches(token_set, config, batch_size=4, num_batches=3, make_example=with_key))
  keys = np.concatenate([batch["key"][:, 1] for batch in batches])
  assert len(batches) == 3 and len(keys) == 12
  assert set(np.diff(keys)) <= {token_set.num_examples // 12, token_set.num_examples // 12 + 1}


def test_evaluation_sets_are_named(make_config, texts):
  a, b = texts
  sets = ("validation", "train", f"other={b}")
  data = pipeline.open_data(make_config(source=f"{a},{b}", tokenizer="bytes", eval_sets=sets))
  assert list(data.eval_sets) == ["validation/a", "validation/b", "train", "other"]
  assert data.eval_sets["train"] is data.train
  assert data.eval_sets["other"].num_bytes == len(open(b).read())
  assert len(data.train.parts) == 2


@pytest.mark.parametrize("settings, message", [
    (dict(eval_sets=("valdation",)), r"did you mean 'validation'\?"),
    (dict(eval_sets=("train", "train")), "names 'train' twice"),
    (dict(validation_fraction=0.0), "raise config.data.validation_fraction, or name another set in config.eval.sets"),
    (dict(source=" , "), "config.data.source is empty"),
    (dict(tokenizer="no_such.json"), "There is no tokenizer file"),
])
def test_mistakes(make_config, texts, settings, message):
  with pytest.raises(UserError, match=message):
    pipeline.open_data(make_config(**({"source": texts[0], "tokenizer": "bytes"} | settings)))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "file"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "tfds"])
def test_every_source_with_every_tokenizer(make_config, texts, tmp_path, kind, tokenizer):
  import pyarrow
  import pyarrow.parquet

  from lmjax.data.tokenizer import byte_tokenizer
  if kind == "parquet":
    source = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"record {i} of parquet" for i in range(100)]}), source)
  elif kind == "tfds":
    from lmjax.data.tfds_builder import prepare_tfds
    source = prepare_tfds(texts[0], tmp_path / "data", make_config().data)
  else:
    source = dict(zip(("jsonl", "txt"), texts))[kind]
  byte_tokenizer().save(tmp_path / "tokenizer.json")
  name = str(tmp_path / "tokenizer.json") if tokenizer == "file" else tokenizer
  config = make_config(source=source, tokenizer=name, tokenizer_vocab_size=300, seq_len=16)
  description = pipeline.describe(config)
  assert description["train"]["tokens"] > 0 and description["validation"]["tokens"] > 0
  assert description["tokenizer"]["size"] == (300 if tokenizer == "bpe" else 257)
  assert _batches(config, 1)[0]["inputs"].shape == (4, 16)


def test_description_counts_what_there_is(make_config, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "abcde"}\n{"text": "fgh"}\n{"text": "é"}\n')
  config = make_config(source=str(tmp_path / "a.jsonl"), tokenizer="bytes", seq_len=8, batch_size=1)
  description = pipeline.describe(config)
  assert description["train"] == {
      "tokens": 9, "documents": 2, "bytes": 7, "bytes per token": 7 / 9, "examples": 2, "share of padding": 1 - 9 / 16}
  assert description["validation"]["bytes"] == 3
  assert description["steps per epoch"] == 2
  assert description["first training text"] == "abcde<|endoftext|>é<|endoftext|>"
