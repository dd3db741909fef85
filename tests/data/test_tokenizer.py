import pickle
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from lmjax.config import DataConfig, UserError
from lmjax.data.sources import open_source
from lmjax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

BYTES = byte_tokenizer()
CODE = """def add(first, second):
    return first + second


class Adder:

    def __call__(self, x):
        pass
"""
BPE = train_bpe([CODE * 20], 400)
TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def test_bytes_are_their_own_ids():
  assert (BYTES.size, BYTES.eos_id) == (257, 256)
  assert BYTES.encode("aé\n\0😀") == list("aé\n\0😀".encode())
  assert [ids.tolist() for ids in BYTES.encode_batch(["ab", "", "é"])] == [[97, 98], [], [195, 169]]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@hypothesis.settings(max_examples=300)
@hypothesis.given(st.one_of(TEXT, st.text("ab01 \t\r\n<|>_(", max_size=60)))
def test_round_trip_is_exact(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.encode_batch([text])[0].tolist() == ids
  assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_the_name_of_a_special_token_in_text_is_text(tokenizer):
  text = "before<|endoftext|>after"
  assert tokenizer.eos_id not in tokenizer.encode(text)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_a_reading_worker_encodes_alike():
  tokenizer = byte_tokenizer()
  tokenizer.add_special(["sep"])
  assert pickle.loads(pickle.dumps(tokenizer)).encode("a[SEP]b") == list(b"a[SEP]b")


def test_texts_with_special_tokens_are_read_while_another_thread_reads_plain_ones():
  tokenizer = byte_tokenizer()
  first = tokenizer.encode_spans("a[SEP]b", [])[0]
  end = tokenizer.add_special(["sep"])["sep"]
  assert first == list(b"a[SEP]b") and tokenizer.encode_spans("a[SEP]b", [])[0] == [97, end, 98]
  made = []
  thread = threading.Thread(target=lambda: made.extend(tuple(tokenizer.encode("[SEP]")) for _ in range(2000)))
  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    thread.start()
    with_special = {tuple(tokenizer.encode_spans("[SEP]", [])[0]) for _ in range(2000)}
    thread.join()
  finally:
    sys.setswitchinterval(interval)
  assert with_special == {(end,)} and set(made) == {tuple(b"[SEP]")}


def test_bpe_has_the_size_asked_for_and_compresses():
  tokenizer = train_bpe([CODE, "".join(chr(97 + i % 26) * (i % 7) + " " for i in range(500))], 300)
  assert tokenizer.size == 300
  assert len(BPE.encode(CODE)) < len(CODE) / 4


def test_bpe_splits_digits_in_threes_and_joins_indentation():
  tokenizer = train_bpe(["1234567 1234567 " * 50, "    if x:\n        return y\n" * 50], 500)
  pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234567")]
  assert max(map(len, pieces)) <= 3
  assert len(tokenizer.encode(":\n        return")) <= 2


def test_training_is_deterministic():
  texts = [CODE * 3, "some other words " * 40]
  assert train_bpe(texts, 350).fingerprint == train_bpe(texts, 350).fingerprint != BPE.fingerprint


def test_save_and_load(tmp_path):
  BPE.save(tmp_path / "tokenizer.json")
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    loaded = Tokenizer.from_file(path)
    assert loaded.fingerprint == BPE.fingerprint
    assert loaded.encode(CODE) == BPE.encode(CODE)
  assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_foreign_tokenizer_is_neither_truncated_nor_given_special_tokens(tmp_path):
  vocab = {"[CLS]": 0, "[SEP]": 1, "a": 2, "[UNK]": 9}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      "[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
  backend.enable_truncation(3)
  backend.enable_padding(length=8)
  backend.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer.from_file(tmp_path)
  assert (tokenizer.size, tokenizer.eos_id) == (10, 1)
  assert tokenizer.encode("a a a a b") == [2, 2, 2, 2, 9]
  assert tokenizer.encode_batch(["a", "a a a a"])[1].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("content, message", [
    (None, "There is no tokenizer file"), ("{}", "is not a tokenizer file"), ("not json", "is not a tokenizer file")])
def test_wrong_files(tmp_path, content, message):
  if content is not None:
    (tmp_path / "tokenizer.json").write_text(content)
  with pytest.raises(UserError, match=message):
    Tokenizer.from_file(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
  tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(UserError, match=r"tokenizer\.json: The tokenizer has no token that ends a document"):
    Tokenizer.from_file(tmp_path)


def test_trained_tokenizer_is_cached_and_depends_on_training_text_only(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "common words here"}\n{"text": "zzzz zzzz zzzz zzzz"}\n')
  source = open_source(str(tmp_path / "a.jsonl"), DataConfig())
  first = load_tokenizer("bpe", 280, [source], tmp_path / "cache")
  assert len(first.encode("zzzz")) == 4  # The second record is held out.
  files = list((tmp_path / "cache" / "tokenizers").iterdir())
  assert len(files) == 1
  written = files[0].stat().st_mtime_ns
  assert load_tokenizer("bpe", 280, [source], tmp_path / "cache").fingerprint == first.fingerprint
  assert files[0].stat().st_mtime_ns == written
  load_tokenizer("bpe", 270, [source], tmp_path / "cache")
  assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 2


def test_sample_is_bounded_and_spread(tmp_path):
  from lmjax.data.tokenizer import _sample
  (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i:05d}"}}\n' for i in range(1000)))
  sample = _sample(open_source(str(tmp_path / "a.jsonl"), DataConfig(validation_fraction=0.0)), 500)
  assert 50 <= len(sample) <= 100
  assert np.all(np.diff([int(text) for text in sample]) == 16)
