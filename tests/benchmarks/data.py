"""How fast examples are read, how soon reading begins far into a run, and how near tokenising comes to its bound.

    python tests/benchmarks/data.py [--quick] [--rounds=N] [--json=FILE]

Reading: the whole pipeline from the memory-mapped store to stacked batches of 32,768 tokens, shuffled, for each packing
and length of example, against plain Grain and torch's DataLoader, which read the same tokens, shuffled, in batches of
the same size. Nothing is computed with the batches, and the store lies in the page cache. Starting and stopping the
threads and processes counts.

Tokenising: `build_store` over the standard library's source, against `encode_batch_fast` of the tokenizers library
alone on the same pieces, which writes nothing and uses all cores: its time is the bound.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import resource
import tempfile
import time
from typing import Any, Callable, Iterator

import harness
import numpy as np

from lmjax.config import Config, DataConfig, TrainConfig
from lmjax.data import pipeline
from lmjax.data.packing import BestFit, Concat
from lmjax.data.pieces import Piece, digest
from lmjax.data.sources import open_source
from lmjax.data.token_store import FORMAT_VERSION, Manifest, TokenStore, build_store
from lmjax.data.tokenizer import Tokenizer, train_bpe
from lmjax.objectives.causal_lm import make_example

BATCH_TOKENS = 1 << 15
PACKINGS = {
    "concat": dict(packing="concat"),
    "concat, document mask": dict(packing="concat", document_mask=True),
    "best_fit": dict(packing="best_fit"),
}
SEEK_STEP = 1_000_000


def main() -> None:
  args = harness.parser(__doc__).parse_args()
  rounds = args.rounds or (3 if args.quick else 7)
  notes = []
  with tempfile.TemporaryDirectory() as folder:
    store = make_store(pathlib.Path(folder) / "store", 1 << 23 if args.quick else 1 << 26)
    rows = []
    for seq_len in (1024,) if args.quick else (256, 1024, 4096):
      rows += reading(store, seq_len, rounds, 100 if args.quick else 300, notes)
    rows += seeking(store)
    rows += tokenising(pathlib.Path(folder), 2 << 20 if args.quick else 8 << 20, rounds)
  harness.report("Data", rows, " ".join(dict.fromkeys(notes)))


# Reading.


def make_store(path: pathlib.Path, num_tokens: int) -> TokenStore:
  """Writes a store of random tokens in documents of about 600 tokens, some of them very long."""
  rng = np.random.default_rng(0)
  lengths = np.maximum(rng.lognormal(np.log(600), 1.0, num_tokens // 400), 2).astype(np.int64)
  ends = np.cumsum(lengths)
  ends = np.append(ends[ends < num_tokens], num_tokens)
  path.mkdir()
  rng.integers(0, 1 << 15, num_tokens).astype(np.uint16).tofile(path / "tokens.bin")
  ends.tofile(path / "ends.bin")
  manifest = Manifest(FORMAT_VERSION, "random", "none", "train", "uint16", num_tokens, len(ends), 4 * num_tokens)
  (path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
  return TokenStore(path)


def make_config(seq_len: int, **data: Any) -> Config:
  return Config(data=DataConfig(seq_len=seq_len, **data),
                train=TrainConfig(num_steps=1, batch_size=BATCH_TOKENS // seq_len))


def make_data(store: TokenStore, config: Config) -> pipeline.Data:
  """Packs a store as a config says, without the tokenizer that nothing here needs."""
  if config.data.packing == "best_fit":
    part = BestFit(store, config.data.seq_len, 0)
  else:
    part = Concat(store, config.data.seq_len, 0, config.data.document_mask)
  return pipeline.Data(tokenizer=None, train=pipeline.TokenSet("train", (part,)), eval_sets={})


def reading(store: TokenStore, seq_len: int, rounds: int, num_batches: int, notes: list[str]) -> list[dict]:
  """Returns a row for each packing and peer."""
  makers = {}
  for name, settings in PACKINGS.items():
    config = make_config(seq_len, **settings)
    data = make_data(store, config)
    len(data.train.parts[0])  # Makes the plan of best_fit, once a run; `seeking` says what it takes.
    makers[f"lmjax, {name}"] = lambda config=config, data=data: pipeline.train_batches(
        data, config, start_step=0, make_example=make_example)
  for name, make_peer in PEERS.items():
    try:
      make_peer(store, seq_len).close()
    except ImportError as e:
      notes.append(f"Not compared with {name}: {e}.")
      continue
    makers[name] = lambda make_peer=make_peer: make_peer(store, seq_len)
  cpu = {name: [] for name in makers}
  taken = harness.medians(harness.interleave(
      {name: measure_cpu(lambda make=make: drain(make(), num_batches), cpu[name]) for name, make in makers.items()},
      rounds))
  cpu = harness.medians(cpu)
  tokens, first = num_batches * BATCH_TOKENS / 1e6, "lmjax, concat"
  return [{"what": "read", "variant": name, "seq_len": seq_len, "million tokens/s": tokens / taken[name],
           "ratio": taken[first] / taken[name], "ratio to": first, "million tokens/CPU s": tokens / cpu[name]}
          for name in makers]


def drain(reader: Iterator[Any], count: int) -> None:
  """Reads some batches with a reader of their own, for one that waits in between goes on reading ahead."""
  for _ in itertools.islice(reader, count):
    pass
  reader.close()


def grain_reader(store: TokenStore, seq_len: int) -> Iterator[Any]:
  """Plain Grain with its defaults: a source of examples, shuffled, repeated, batched."""
  import grain

  class Examples:
    def __len__(self):
      return store.num_tokens // seq_len - 1

    def __getitem__(self, index):
      tokens = store.tokens[index * seq_len:(index + 1) * seq_len + 1].astype(np.int32)
      return {"inputs": tokens[:-1], "targets": tokens[1:], "weights": np.ones(seq_len, np.float32)}

  dataset = grain.MapDataset.source(Examples()).shuffle(seed=0).repeat().batch(BATCH_TOKENS // seq_len)
  iterator = iter(dataset.to_iter_dataset())
  try:
    yield from iterator
  finally:
    iterator.close()


def torch_reader(store: TokenStore, seq_len: int, num_workers: int) -> Iterator[Any]:
  """torch's DataLoader over the same examples."""
  import torch

  class Examples(torch.utils.data.Dataset):
    def __len__(self):
      return store.num_tokens // seq_len - 1

    def __getitem__(self, index):
      tokens = torch.from_numpy(store.tokens[index * seq_len:(index + 1) * seq_len + 1].astype(np.int64))
      return tokens[:-1], tokens[1:]

  loader = torch.utils.data.DataLoader(
      Examples(), batch_size=BATCH_TOKENS // seq_len, shuffle=True, drop_last=True, num_workers=num_workers)
  while True:
    yield from loader


def peer(name: str, module: str, make: Callable[..., Iterator[Any]], *args: Any) -> tuple[str, Callable]:
  """Returns a reader that raises ImportError when it is made, and not when it is first read."""
  def checked(store: TokenStore, seq_len: int) -> Iterator[Any]:
    __import__(module)
    return make(store, seq_len, *args)
  return name, checked


PEERS = dict([
    peer("plain Grain", "grain", grain_reader),
    peer("torch DataLoader", "torch", torch_reader, 0),
    peer("torch DataLoader, 2 workers", "torch", torch_reader, 2),
])


# Seeking.


def seeking(store: TokenStore) -> list[dict]:
  """Returns the seconds until the first batch of a run that goes on from a late step; opening the store counts."""
  rows = []
  for name, settings in PACKINGS.items():
    config = make_config(1024, **settings)
    start = time.perf_counter()
    data = make_data(TokenStore(store.path), config)
    len(data.train.parts[0])
    opened = time.perf_counter()
    reader = pipeline.train_batches(data, config, start_step=SEEK_STEP, make_example=make_example)
    next(reader)
    rows.append({"what": f"seek to step {SEEK_STEP:,}", "variant": f"lmjax, {name}", "seq_len": 1024,
                 "seconds": time.perf_counter() - start, "of which opening": opened - start})
    reader.close()
  return rows


# Tokenising.


class Texts:
  """A source of pieces that are in memory."""

  spec = "benchmark"

  def __init__(self, pieces: list[Piece]):
    self._pieces = pieces
    self.fingerprint = digest(*(piece.text for piece in pieces))

  def pieces(self, split: str) -> Iterator[Piece]:
    yield from self._pieces

  def approximate_bytes(self, split: str) -> int:
    return sum(len(piece.text) for piece in self._pieces)


def tokenising(folder: pathlib.Path, num_characters: int, rounds: int) -> list[dict]:
  """Returns rows for the bound and for building a store."""
  pieces = take(open_source("stdlib", DataConfig(validation_fraction=0.0)).pieces("train"), num_characters)
  texts = [piece.text for piece in pieces]
  megabytes = sum(len(text.encode()) for text in texts) / 1e6
  tokenizer, source = train_bpe(texts[::4], 4096), Texts(pieces)
  folders = (folder / f"cache{number}" for number in itertools.count())
  cpu: dict[str, list[float]] = {}
  variants = {
      "tokenizers alone": lambda: encode(tokenizer, texts),
      "lmjax, build_store": lambda: build_store(source, "train", tokenizer, next(folders)),
  }
  measured = {name: measure_cpu(call, cpu.setdefault(name, [])) for name, call in variants.items()}
  for call in measured.values():
    call()
  for values in cpu.values():
    values.clear()
  seconds = harness.interleave(measured, min(rounds, 5))
  middle = harness.medians(seconds)
  return [{"what": "tokenise", "variant": name, "MB/s": megabytes / middle[name],
           "ratio": middle["tokenizers alone"] / middle[name], "ratio to": "tokenizers alone",
           "MB/CPU s": megabytes * len(cpu[name]) / sum(cpu[name]),
           "cores in use": sum(cpu[name]) / sum(seconds[name])} for name in variants]


def take(pieces: Iterator[Piece], num_characters: int) -> list[Piece]:
  """Returns the first pieces that make so many characters."""
  taken, size = [], 0
  for piece in pieces:
    taken.append(piece)
    size += len(piece.text)
    if size >= num_characters:
      break
  return taken


def encode(tokenizer: Tokenizer, texts: list[str]) -> None:
  tokenizer._backend.encode_batch_fast(texts, add_special_tokens=False)


def measure_cpu(call: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
  """Returns a call that also notes the processor time of all its threads, and of processes that end with it."""
  def measured() -> None:
    start = processor_time()
    call()
    seconds.append(processor_time() - start)
  return measured


def processor_time() -> float:
  usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(u.ru_utime + u.ru_stime for u in usage)


if __name__ == "__main__":
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # Else the fork of torch's workers turns it off.
  main()
