"""The batch of an experiment as shapes, made without its data."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lmjax import objectives, partitioning
from lmjax.config import Config
from lmjax.data import frames
from lmjax.data.task import Task, parse_task
from lmjax.data.task_specs import TASKS
from lmjax.data.tokenizer import Tokenizer, byte_tokenizer

_PLACEHOLDER = "a"


class _Data:
  """What `lmjax.data.pipeline.Data` is to a recipe: a tokenizer, and tasks with some labels."""

  def __init__(self, tasks: tuple[Task, ...]):
    self.tokenizer, self.tasks = byte_tokenizer(), tasks


class _Texts:
  """One example, over and over."""
  num_examples = 2

  def __init__(self, example: dict[str, Any]):
    self._example = example

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._example


def vocab_size(config: Config) -> int:
  """Returns the tokens that the tokenizer of an experiment has, or will have once it is trained."""
  if config.model.vocab_size:
    return config.model.vocab_size
  sizes = {"bytes": byte_tokenizer().size, "bpe": config.data.tokenizer_vocab_size}
  spec = config.data.tokenizer
  _, special = objectives.text_needs(config)
  return (sizes[spec] if spec in sizes else Tokenizer.from_file(spec).size) + len(special)


def tasks_of(config: Config) -> tuple[Task, ...]:
  """Returns the tasks of an experiment; labels that only the data would tell are as many as the model has, or two."""
  names = tuple(map(str, range(config.model.num_labels or 2)))
  tasks = (parse_task(entry, TASKS) for entry in config.data.tasks)
  return tuple(task if task.labels or task.kind not in ("classification", "token_classification")
               else dataclasses.replace(task, labels=names) for task in tasks)


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the arrays of a training batch, split over the mesh.

  Args:
    config: with sizes resolved.
    mesh: the devices.
  """
  data = _Data(tasks_of(config))
  text_len, special = objectives.text_needs(config)
  data.tokenizer.add_special(special)
  example = _labelled(data.tasks[0]) if data.tasks else _text(config, text_len)
  if config.model.architecture != "decoder" or config.model.head != "lm":
    frames.add_frame(data.tokenizer, config.model.architecture)
  recipe = objectives.recipe_of(config, data, _Texts(example))
  row = objectives.host_function(recipe)(example, (0, 0))
  sharding, size = partitioning.batch_sharding(mesh), config.train.batch_size
  return {name: jax.ShapeDtypeStruct((size, *np.shape(value)), np.asarray(value).dtype, sharding=sharding)
          for name, value in row.items()}


def _text(config: Config, length: int) -> dict[str, np.ndarray]:
  example = {"inputs": np.full(length, 97, np.int32), "targets": np.full(length, 97, np.int32),
             "weights": np.ones(length, np.float32)}
  if config.data.packing == "best_fit" or config.data.document_mask:
    example |= {"segment_ids": np.ones(length, np.int32), "positions": np.arange(length, dtype=np.int32)}
  return example


def _labelled(task: Task) -> dict[str, Any]:
  record: dict[str, Any] = {}
  values = {task.words: [_PLACEHOLDER], task.label: [0] if task.words else 0, task.answers: [], task.starts: [],
            task.messages: [{"role": role, "content": _PLACEHOLDER} for role in ("user", "assistant")]}
  for column in task.columns:
    record[column] = values.get(column, _PLACEHOLDER)
  return {"task": 0, "number": 0, "record": record, "where": "A record", "window": 0, "of": 0}

