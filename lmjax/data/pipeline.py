"""From the config to batches: opens sources, tokenises, packs, mixes, and reads in the order of (seed, step) alone."""

import atexit
import dataclasses
import functools
import math
import multiprocessing
import os
import pathlib
import threading
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from lmjax.config import Config, DataConfig, cache_dir
from lmjax.config_checks import UserError, nearest, split_sources
from lmjax.data import frames, task_sets
from lmjax.data.packing import BestFit, Concat
from lmjax.data.pieces import Source
from lmjax.data.sources import open_source, short_name
from lmjax.data.task import Task
from lmjax.data.task_sets import TaskSet
from lmjax.data.token_store import TokenStore, build_store
from lmjax.data.tokenizer import Tokenizer, load_tokenizer

Example = dict[str, np.ndarray]

# An objective's host function. It gets a packed example (see packing.py) or a labelled one (see task_sets.py), and a
# key, and returns a row of the batch. The
# key is (seed, place of the example in the order), for `np.random.default_rng(key)` where the objective draws
# something; where it does not, no generator is made.
MakeExample = Callable[[Example, tuple[int, int]], Example]


@dataclasses.dataclass(frozen=True)
class TokenSet:
  """Packed examples of one or more stores, one after the other.

  Attributes:
    name: "train", or that of an evaluation set.
    parts: the packed stores.
  """
  name: str
  parts: tuple[Concat | BestFit, ...]

  @functools.cached_property
  def num_examples(self) -> int:
    """Examples of an epoch."""
    return sum(map(len, self.parts))

  @property
  def num_tokens(self) -> int:
    """Targets of an epoch."""
    return sum(part.store.num_tokens for part in self.parts)

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the text."""
    return sum(part.store.manifest.num_bytes for part in self.parts)

  @property
  def num_documents(self) -> int:
    return sum(part.store.manifest.num_documents for part in self.parts)

  def __getitem__(self, index: int) -> Example:
    return {name: values[0] for name, values in self.read(np.array([index])).items()}

  def examples(self, indices: Sequence[int]) -> list[Example]:
    """Returns the examples of these numbers."""
    read = self.read(np.array(indices))
    return [dict(zip(read, values)) for values in zip(*read.values())]

  def read(self, indices: np.ndarray) -> Example:
    """Returns the examples of these numbers, as arrays [examples, T]."""
    if len(self.parts) == 1:
      return self.parts[0].read(indices)
    offsets = np.cumsum([0, *map(len, self.parts)])
    owners = np.searchsorted(offsets, indices, side="right") - 1
    rows = {number: np.flatnonzero(owners == number) for number in np.unique(owners)}
    read = {number: self.parts[number].read(indices[chosen] - offsets[number]) for number, chosen in rows.items()}
    back = np.argsort(np.concatenate([*rows.values()]))
    return {name: np.concatenate([examples[name] for examples in read.values()])[back]
            for name in next(iter(read.values()))}


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads.

  Attributes:
    train: the training set; a mixture has one part a source.
    eval_sets: evaluation sets by name, in the order of the config.
    tasks: those of labelled data, with their labels found.
  """
  tokenizer: Tokenizer
  train: TokenSet | TaskSet
  eval_sets: dict[str, TokenSet | TaskSet]
  tasks: tuple[Task, ...] = ()


def open_data(config: Config, text_len: int | None = None, special_tokens: Sequence[str] = (),
              labels: Mapping[str, tuple[str, ...]] | None = None) -> Data:
  """Prepares all data of a config: what is not in the cache is read and tokenised, with a progress bar.

  Evaluation sets are named as in `config.eval.sets`. `validation` is what the source holds out; for a mixture it is one
  set a source, `validation/NAME`. `NAME=SOURCE` is the training split of that source with nothing held out.

  Args:
    config: the experiment.
    text_len: tokens of text in an example that the objective gets; None means data.seq_len.
    special_tokens: which the tokenizer is to have, by the names that `Tokenizer.add_special` takes.
    labels: of tasks, by name, that a model has learned, where its data has given them; else the data is asked.

  Raises:
    UserError: where a source, the tokenizer or an evaluation set is missing, broken or empty.
  """
  if config.data.tasks:
    return _open_tasks(config, special_tokens, labels or {})
  sources = [open_source(spec, config.data) for spec in split_sources(config.data.source) or [""]]
  prepare = _Preparer(config.data, sources, text_len or config.data.seq_len)
  prepare.tokenizer.add_special(special_tokens)
  train = prepare.token_set("train", sources, "train")
  sets = {}
  for entry in config.eval.sets:
    for token_set in _eval_sets(entry, config.data, sources, train, prepare):
      _refuse_twice(token_set.name, sets)
      sets[token_set.name] = token_set
  return Data(prepare.tokenizer, train, sets)


def _open_tasks(config: Config, special_tokens: Sequence[str], labels: Mapping[str, tuple[str, ...]]) -> Data:
  trained = task_sets.open_tasks(config, labels)
  texts = [task_sets.TaskTexts(trained)]
  tokenizer = load_tokenizer(config.data.tokenizer, config.data.tokenizer_vocab_size, texts, _cache_dir(config.data))
  tokenizer.add_special(special_tokens)
  length = config.data.seq_len
  if (config.model.architecture, config.model.head) != ("decoder", "lm"):  # It goes on from a text without an end.
    frames.add_frame(tokenizer, config.model.architecture)
  framer = None if config.objective.name == "text_to_text" else frames.Framer(tokenizer, length)
  make = functools.partial(task_sets.make_part, framer=framer)
  numbers = tuple(range(len(trained)))
  train = task_sets.TaskSet("train", tuple(make(task, records) for task, records in trained), numbers, length)
  sets, made = {}, functools.partial(make, training=False)
  for entry in config.eval.sets:
    for name, (index, part) in task_sets.eval_parts(entry, config, trained, made).items():
      _refuse_twice(name, sets)
      sets[name] = task_sets.TaskSet(name, (part,), (index,), length)
  return Data(tokenizer, train, sets, tuple(task for task, _ in trained))


def train_batches(data: Data, config: Config, *, start_step: int, make_example: MakeExample,
                  rows: Sequence[int] | None = None) -> Iterator[Example]:
  """Yields the batches of training without end.

  Batch k is a function of (config.seed, k) and the data alone: not of where reading began, of the number of processes,
  or of workers. Reading may begin anywhere at once.

  Args:
    start_step: number of the first batch, from 0.
    make_example: the objective's host function. With `data.num_workers` it must be importable by name.
    rows: which rows of each batch to read, where processes share it; None means all.

  Returns:
    An iterator over dicts of arrays [rows, T]: inputs, targets (int32), weights (float32), and positions and
    segment_ids (int32) where attention is kept within documents, for an objective that leaves examples as they are.
  """
  import grain

  from lmjax.data import mixing
  batch_size = config.train.batch_size
  sizes = [len(part) for part in data.train.parts]
  weights = config.data.weights or mixing.shares(sizes, config.data.mixing_temperature, config.data.mixing_limit)
  order = mixing.training_order(sizes, weights, config.seed, config.data.shuffle)
  batches = grain.MapDataset.source(_Batches(
      data.train, order, make_example, config.seed, batch_size, range(batch_size) if rows is None else rows))
  workers, prefetch = config.data.num_workers, config.data.prefetch
  # One thread: reading is mostly Python, and holds the interpreter's lock.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  dataset = batches[start_step:].to_iter_dataset(options)
  if workers:
    from absl import flags
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read flags of its own, which only absl's app.run parses.
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=math.ceil(prefetch / workers)),
        worker_init_fn=_end_with_parent)
  iterator = iter(dataset)
  # Else threads and workers that read ahead while Python shuts down would print their complaints.
  atexit.register(iterator.close)
  try:
    for batch in iterator:
      # Workers pass arrays in shared memory, which a reader that keeps them would not give back.
      yield {key: np.array(value) for key, value in batch.items()} if workers else batch
  finally:
    atexit.unregister(iterator.close)
    iterator.close()


def eval_batches(token_set: TokenSet, config: Config, *, batch_size: int, num_batches: int | None = None,
                 make_example: MakeExample, rows: Sequence[int] | None = None) -> Iterator[Example]:
  """Yields the batches of an evaluation: each example once, in order, or some that are spread evenly.

  The last batch is filled up with rows of zeros, whose weights count nothing, so that every batch has the same shape
  and every process sees as many.

  Args:
    batch_size: of the whole batch, over all processes.
    num_batches: at most so many; None means all.
    make_example: as for `train_batches`; its key is (config.seed, number of the example).
    rows: as for `train_batches`.
  """
  total = token_set.num_examples
  count = min(total, num_batches * batch_size) if num_batches else total
  rows = range(batch_size) if rows is None else rows
  for first in range(0, count, batch_size):
    examples = [(first + row) * total // count for row in rows if first + row < count]
    # A process whose rows are all padding still needs one example, for the shape.
    made = _make_rows(token_set, make_example, config.seed, examples or [0], examples or [0])
    padding = len(rows) - len(examples)
    yield {name: np.concatenate([values[:len(examples)], np.zeros((padding, *values.shape[1:]), values.dtype)])
           for name, values in made.items()}


def describe(config: Config, text_len: int | None = None, special_tokens: Sequence[str] = ()) -> dict[str, Any]:
  """Prepares the data of a config and describes it.

  Args:
    config, text_len, special_tokens: as `open_data` takes them.

  Returns:
    A nested dict of names and figures: the tokenizer, steps of an epoch, and for each set its tokens, documents, UTF-8
    bytes, bytes a token, examples and share of padding; and the beginning of the training text, decoded.
  """
  data = open_data(config, text_len, special_tokens)
  figures = {
      "tokenizer": {"name": config.data.tokenizer, "size": data.tokenizer.size,
                    "end of document": data.tokenizer.eos_id},
      "steps per epoch": data.train.num_examples / config.train.batch_size}
  sets = {token_set.name: token_set for token_set in (data.train, *data.eval_sets.values())}
  if data.tasks:
    return figures | {name: {part.task.name: task_sets.describe_part(part, data.tokenizer, config.data.seq_len)
                             for part in task_set.parts} for name, task_set in sets.items()}
  first = data.train.parts[0].store.tokens[:200]
  return figures | {name: _figures(token_set, text_len or config.data.seq_len) for name, token_set in sets.items()} | {
      "first training text": data.tokenizer.decode(first)[:200]}


def _figures(token_set: TokenSet, text_len: int) -> dict[str, Any]:
  return {
      "tokens": token_set.num_tokens, "documents": token_set.num_documents, "bytes": token_set.num_bytes,
      "bytes per token": token_set.num_bytes / token_set.num_tokens, "examples": token_set.num_examples,
      "share of padding": 1 - token_set.num_tokens / (token_set.num_examples * text_len),
  }


def _refuse_twice(name: str, sets: dict[str, Any]) -> None:
  if name in sets:
    raise UserError(f"config.eval.sets names {name!r} twice; give each set a name of its own.")


def _cache_dir(config: DataConfig) -> pathlib.Path:
  return pathlib.Path(config.cache_dir).expanduser() if config.cache_dir else cache_dir()


class _Preparer:
  """Makes token sets by the settings of a config, all with one tokenizer."""

  def __init__(self, config: DataConfig, sources: Sequence[Source], text_len: int):
    self._config, self._text_len = config, text_len
    self._cache_dir = _cache_dir(config)
    self.tokenizer = load_tokenizer(config.tokenizer, config.tokenizer_vocab_size, sources, self._cache_dir)

  def token_set(self, name: str, sources: Sequence[Source], split: str) -> TokenSet:
    stores = [build_store(source, split, self.tokenizer, self._cache_dir) for source in sources]
    return TokenSet(name, tuple(map(self._pack, stores)))

  def _pack(self, store: TokenStore) -> Concat | BestFit:
    if self._config.packing == "best_fit":
      return BestFit(store, self._text_len, self.tokenizer.eos_id)
    return Concat(store, self._text_len, self.tokenizer.eos_id, self._config.document_mask)


def _eval_sets(entry: str, config: DataConfig, sources: Sequence[Source], train: TokenSet,
               prepare: _Preparer) -> list[TokenSet]:
  """Returns the sets that an entry of config.eval.sets names."""
  if entry == "train":
    return [train]
  if entry == "validation":
    names = ["validation"] if len(sources) == 1 else [f"validation/{short_name(source.spec)}" for source in sources]
    return [prepare.token_set(name, [source], "validation") for name, source in zip(names, sources)]
  name, equals, spec = entry.partition("=")
  if not equals or not name or not spec:
    raise UserError(f"config.eval.sets has the entry {entry!r}, which is neither validation, nor train, nor NAME=SOURCE"
                    f"{nearest(entry, ('validation', 'train'))}")
  whole = dataclasses.replace(config, validation_fraction=0.0)
  return [prepare.token_set(name, [open_source(part, whole) for part in split_sources(spec)], "train")]


@dataclasses.dataclass(frozen=True)
class _Batches:
  """A source for Grain whose element k is the part of training batch k that one process reads.

  Attributes:
    order: element i is the number of the i-th example.
    batch_size: of the whole batch.
    rows: which of it are read.
  """
  token_set: TokenSet
  order: Sequence[int]
  make_example: MakeExample
  seed: int
  batch_size: int
  rows: Sequence[int]

  def __len__(self) -> int:
    return len(self.order) // self.batch_size

  def __getitem__(self, index: int) -> Example:
    places = [index * self.batch_size + row for row in self.rows]
    examples = [self.order[place] for place in places]
    return _make_rows(self.token_set, self.make_example, self.seed, examples, places)


def _make_rows(token_set: TokenSet, make_example: MakeExample, seed: int, examples: Sequence[int],
               places: Sequence[int]) -> Example:
  """Returns rows of a batch, [examples, ...], from the numbers of examples and their places in the order."""
  made = [make_example(example, (seed, place)) for place, example in zip(places, token_set.examples(examples))]
  # Not np.stack, which takes four times as long.
  return {name: np.array([row[name] for row in made]) for name in made[0]}


def _end_with_parent(*_: int) -> None:
  """Makes a reading worker end when the run that started it is killed; it would wait for that run for ever."""
  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
