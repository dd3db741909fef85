"""Texts and recipes for tests of objectives."""

import dataclasses
import json
import types

import numpy as np
import pytest

from lmjax import objectives
from lmjax.config import base_config, from_config_dict, resolve_model
from lmjax.config_checks import check_objective
from lmjax.data import pipeline
from lmjax.data.tokenizer import byte_tokenizer
from lmjax.models import families


class Texts:
  """Packed examples of printable bytes, the lengths of which differ; stands for `lmjax.data.pipeline.TokenSet`."""
  num_examples = 64

  def __init__(self, length):
    self._length = length

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    tokens = np.where(rng.random(self._length + 1) < 0.2, 32, rng.integers(97, 123, self._length + 1))
    real = np.arange(self._length) < rng.integers(self._length // 2, self._length + 1)
    example = {"inputs": tokens[:-1], "targets": tokens[1:]}
    return {name: np.where(real, value, 0).astype(np.int32) for name, value in example.items()} | {
        "weights": real.astype(np.float32)}


@dataclasses.dataclass
class Store:
  """Documents of random bytes, each with its end token; stands for `lmjax.data.token_store.TokenStore`."""
  lengths: tuple

  def __post_init__(self):
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(97, 123, length), 256) for length in self.lengths]
    self.tokens = np.concatenate(documents).astype(np.uint16)
    self.ends = np.cumsum([len(document) for document in documents])
    self.num_tokens = len(self.tokens)


class Task:
  """A small experiment with an objective, and the rows that are made for it."""

  def __init__(self, family, seq_len=32, train=None, **objective):
    """Args: `family`: a preset and what is changed of it; `train`: settings of the training; others the objective's."""
    config = base_config()
    preset, changes = family if isinstance(family, tuple) else (family, {})
    config.model.update({**families.debug(families.preset(preset)), **changes})
    config.data.update(tokenizer="bytes", seq_len=seq_len)
    config.objective.update(objective)
    config.train.update(num_steps=10, batch_size=8, **(train or {}))
    # The update of a step is then the gradient.
    config.optim.update(name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None)
    config = from_config_dict(config)
    self.tokenizer, (length, special) = byte_tokenizer(), objectives.text_needs(config)
    self.tokenizer.add_special(special)
    self.config, self.texts = resolve_model(config, self.tokenizer.size), Texts(length)
    data = types.SimpleNamespace(tokenizer=self.tokenizer, tasks=())
    self.make = objectives.host_function(objectives.recipe_of(self.config, data, self.texts))

  def row(self, number, seed=0):
    return self.make(self.texts[number % self.texts.num_examples], (seed, number))

  def batch(self, size=8):
    rows = [self.row(number) for number in range(size)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


class Labelled:
  """A small experiment on labelled tasks, whose records are written to files, and the rows that are made of them."""

  def __init__(self, folder, family, tasks, records, seq_len=32, data=None, **objective):
    """Args: `tasks`: settings of each, with the name; `records`: of each, the same for training and validation."""
    config = base_config()
    preset, changes = family
    config.model.update({**families.debug(families.preset(preset)), "pooler": "none", **changes})
    for task, rows in zip(tasks, records):
      path = folder / f"{task['name']}.jsonl"
      path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tuple(dict(task, source=str(folder / f"{task['name']}.jsonl")) for task in tasks)
    config.data.update(tokenizer="bytes", seq_len=seq_len, tasks=tasks, validation_fraction=0.25, **(data or {}))
    config.objective.update(objective)
    config.train.update(num_steps=10, batch_size=8)
    config.optim.update(name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None)
    config = from_config_dict(config)
    check_objective(config)
    self.data = pipeline.open_data(config, *objectives.text_needs(config))
    self.config = resolve_model(objectives.with_heads(config, self.data.tasks), self.data.tokenizer.size)
    self.tokenizer = self.data.tokenizer
    self.recipe = objectives.recipe_of(self.config, self.data, self.data.train, training=True)
    self.make = objectives.host_function(self.recipe)

  def row(self, number, seed=0):
    train = self.data.train
    return self.make(train[number * 7 % train.num_examples], (seed, number))

  def batch(self, size=8):
    rows = [self.row(number) for number in range(size)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
  """Returns a function that makes a `Labelled` in a folder of its own."""
  return lambda *args, **kwargs: Labelled(tmp_path_factory.mktemp("tasks"), *args, **kwargs)


@pytest.fixture(scope="session")
def task():
  """Returns the class `Task`."""
  return Task


@pytest.fixture(scope="session")
def store():
  """Returns the class `Store`."""
  return Store
