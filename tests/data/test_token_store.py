import os
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from lmjax.config import DataConfig, UserError
from lmjax.data import token_store
from lmjax.data.sources import open_source
from lmjax.data.token_store import TokenStore, build_store
from lmjax.data.tokenizer import byte_tokenizer, train_bpe

BYTES = byte_tokenizer()


@pytest.fixture
def source(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "held"}\n{"text": "é"}\n')
  return open_source(str(tmp_path / "a.jsonl"), DataConfig())


def test_store_holds_documents_with_their_ends(source, tmp_path):
  store = build_store(source, "train", BYTES, tmp_path / "cache")
  assert store.tokens.tolist() == [97, 98, 256, 195, 169, 256]
  assert store.tokens.dtype == np.uint16
  assert store.ends.tolist() == [3, 6]
  manifest = store.manifest
  assert (manifest.num_tokens, manifest.num_documents, manifest.num_bytes, manifest.split) == (6, 2, 4, "train")
  held_out = build_store(source, "validation", BYTES, tmp_path / "cache")
  assert held_out.tokens.tolist() == [*b"held", 256]


def test_store_is_made_once_and_again_for_another_tokenizer(source, tmp_path):
  first = build_store(source, "train", BYTES, tmp_path / "cache")
  written = (first.path / "tokens.bin").stat().st_mtime_ns
  again = build_store(source, "train", BYTES, tmp_path / "cache")
  assert again.path == first.path and (again.path / "tokens.bin").stat().st_mtime_ns == written
  assert build_store(source, "train", train_bpe(["ab é"], 260), tmp_path / "cache").path != first.path


def test_a_document_in_many_batches_is_one_document(tmp_path, monkeypatch):
  monkeypatch.setattr(token_store, "_BATCH_SIZE", 1)
  text = "some line of text\n" * 20_000
  (tmp_path / "a.txt").write_text(text)
  source = open_source(str(tmp_path / "a.txt"), DataConfig(validation_fraction=0.0))
  store = build_store(source, "train", BYTES, tmp_path / "cache")
  assert store.ends.tolist() == [len(text) + 1]
  assert bytes(store.tokens[:-1].astype(np.uint8)).decode() == text


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
  import tokenizers
  words = {"</s>": 0} | {f"w{i}": i for i in range(1, 70_000)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  (tmp_path / "a.txt").write_text("w69999 w5")
  source = open_source(str(tmp_path / "a.txt"), DataConfig(validation_fraction=0.0))
  store = build_store(source, "train", token_store.Tokenizer(backend), tmp_path / "cache")
  assert store.tokens.dtype == np.uint32 and store.tokens.tolist() == [69999, 5, 0]


def test_store_pickles_as_its_path(source, tmp_path):
  store = build_store(source, "train", BYTES, tmp_path / "cache")
  assert store.tokens[0] == 97
  data = pickle.dumps(store)
  assert len(data) < 1000
  assert pickle.loads(data).tokens.tolist() == store.tokens.tolist()


def test_an_empty_split_leaves_nothing(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  source = open_source(str(tmp_path / "a.txt"), DataConfig(validation_fraction=0.0))
  with pytest.raises(UserError, match="validation split of .* has no text; raise config.data.validation_fraction"):
    build_store(source, "validation", BYTES, tmp_path / "cache")
  assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_a_broken_source_leaves_nothing(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n{"text": 3}\n')
  source = open_source(str(tmp_path / "a.jsonl"), DataConfig())
  with pytest.raises(UserError, match="a.jsonl:3"):
    build_store(source, "train", BYTES, tmp_path / "cache")
  assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(source, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written to .*config.data.cache_dir"):
    build_store(source, "train", BYTES, tmp_path / "file")


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(token_store, "_write_batch", full)
  with pytest.raises(UserError, match="No space left on device"):
    build_store(source, "train", BYTES, tmp_path / "cache")
  assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", [
    lambda path: (path / "tokens.bin").write_bytes(b"12"), lambda path: (path / "manifest.json").write_text("{"),
    lambda path: (path / "ends.bin").unlink(), lambda path: (path / "manifest.json").write_text("{}")])
def test_damage_is_seen(source, tmp_path, damage):
  path = build_store(source, "train", BYTES, tmp_path / "cache").path
  damage(path)
  with pytest.raises(UserError, match="delete the folder"):
    TokenStore(path)


_BUILD = """
import sys, time
from lmjax.config import DataConfig
from lmjax.data import token_store
from lmjax.data.sources import open_source
from lmjax.data.tokenizer import byte_tokenizer
path, cache, delay = sys.argv[1:]
write = token_store._write_batch
def slow(*args):
  print("writing", flush=True)
  time.sleep(float(delay))
  return write(*args)
token_store._write_batch = slow
source = open_source(path, DataConfig(validation_fraction=0.0))
print(token_store.build_store(source, "train", byte_tokenizer(), cache).num_tokens, flush=True)
"""


def _start(path, cache, delay):
  return subprocess.Popen([sys.executable, "-c", _BUILD, str(path), str(cache), str(delay)], stdout=subprocess.PIPE,
                          text=True, cwd=pathlib.Path(__file__).parents[2])


def test_killed_build_is_cleared_away_by_the_next(tmp_path):
  (tmp_path / "a.txt").write_text("hello")
  process = _start(tmp_path / "a.txt", tmp_path / "cache", 60)
  assert process.stdout.readline() == "writing\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  tokens = tmp_path / "cache" / "tokens"
  assert sorted(path.suffix for path in tokens.iterdir()) == [".lock", ".tmp"]
  source = open_source(str(tmp_path / "a.txt"), DataConfig(validation_fraction=0.0))
  store = build_store(source, "train", BYTES, tmp_path / "cache")
  assert store.num_tokens == 6
  assert sorted(path.suffix for path in tokens.iterdir()) == ["", ".lock"]


def test_of_two_builders_one_waits_for_the_other(tmp_path):
  (tmp_path / "a.txt").write_text("hello")
  processes = [_start(tmp_path / "a.txt", tmp_path / "cache", 1) for _ in range(2)]
  outputs = [process.communicate(timeout=60)[0].split() for process in processes]
  assert sorted(outputs) == [["6"], ["writing", "6"]]


_MEASURE = """
import re, sys
from lmjax.config import DataConfig
from lmjax.data import token_store
from lmjax.data.sources import open_source
from lmjax.data.tokenizer import byte_tokenizer
import tokenizers, tqdm
token_store._BATCH_SIZE = 1 << 16
source = open_source(sys.argv[1], DataConfig())
token_store.build_store(source, "train", byte_tokenizer(), sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the peak from Linux")
def test_memory_does_not_grow_with_the_text(tmp_path):
  # One thread and one heap, for what many of them keep for later differs by tens of MB from run to run. Not getrusage:
  # its peak is at least that of the process that started this one.
  environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
  peaks = []
  for megabytes in (4, 16):
    path = tmp_path / f"{megabytes}.txt"
    path.write_text("some words of a line that is not too long\n" * (megabytes * 25_000))
    result = subprocess.run([sys.executable, "-c", _MEASURE, str(path), str(tmp_path / "cache")], text=True, check=True,
                            stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2], env=environment)
    peaks.append(int(result.stdout) / 1024)
  # In MiB. Twelve more megabytes of text would be 24 of tokens, and hundreds inside the tokenizers library; chance
  # makes six.
  assert peaks[1] < peaks[0] + 12, peaks
