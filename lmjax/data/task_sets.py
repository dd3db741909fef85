"""Sets of labelled examples, of one task or several, as `pipeline.TokenSet` is one of text.

An example is what an objective's host function gets: {"task": number of the task, "number": that of the example in the
set, "record": its columns, "where": what a message calls it}. A long text of extractive_qa makes several examples,
which also have "window", the number of the part, and "of", that of the record.
"""

import dataclasses
import functools
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from lmjax.config import Config
from lmjax.config_checks import UserError
from lmjax.data.answers import check_answers, find_answers
from lmjax.data.frames import Framer
from lmjax.data.pieces import Piece, digest
from lmjax.data.records import Records, distinct, open_records
from lmjax.data.task import Task, label_in, label_of, number_in, parse_task, render, value_at
from lmjax.data.task_specs import TASKS
from lmjax.data.tokenizer import Tokenizer

_AT_A_TIME = 256
_CHECKED = 10_000  # Records whose labels are looked at before a run begins.


@dataclasses.dataclass(frozen=True)
class TaskPart:
  """The records of one task in a set.

  Attributes:
    task: with its labels found.
    records: which of its data.
    windows: of extractive_qa, into how many parts the text of each record is cut; None for other kinds.
  """
  task: Task
  records: Records
  windows: np.ndarray | None = None

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum(self.windows)

  def __len__(self) -> int:
    return len(self.records) if self.windows is None else int(self._ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = index if self.windows is None else int(np.searchsorted(self._ends, index, side="right"))
    example = {"record": self.records[record], "where": self.records.name(record)}
    if self.windows is None:
      return example
    windows = int(self.windows[record])
    return {**example, "of": record, "window": index - int(self._ends[record]) + windows, "windows": windows}


@dataclasses.dataclass(frozen=True)
class TaskSet:
  """Examples of one or more tasks, one after the other.

  Attributes:
    name: "train", or that of an evaluation set.
    parts: one a task.
    indices: number of each part's task among `config.data.tasks`.
    seq_len: T, what the model reads of an example at most.
  """
  name: str
  parts: tuple[TaskPart, ...]
  indices: tuple[int, ...]
  seq_len: int

  @functools.cached_property
  def num_examples(self) -> int:
    """Examples of an epoch."""
    return sum(map(len, self.parts))

  @property
  def num_tokens(self) -> int:
    """Tokens that the model reads in an epoch, padding included."""
    return self.num_examples * self.seq_len

  @functools.cached_property
  def _offsets(self) -> np.ndarray:
    return np.cumsum([0, *map(len, self.parts)])

  def __getitem__(self, index: int) -> dict[str, Any]:
    part = int(np.searchsorted(self._offsets, index, side="right")) - 1
    example = self.parts[part][index - int(self._offsets[part])]
    return {"task": self.indices[part], "number": index, **example}

  def examples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the examples of these numbers."""
    return [self[int(index)] for index in indices]


class TaskTexts:
  """The texts of tasks as a `pieces.Source`, for a tokenizer to be trained on."""

  spec = "config.data.tasks"

  def __init__(self, parts: Sequence[tuple[Task, Records]]):
    self._parts = parts
    self.fingerprint = digest("tasks", *(text for task, records in parts for text in (task, records.fingerprint)))

  def pieces(self, split: str) -> Iterator[Piece]:
    """Yields the texts of each record."""
    assert split == "train"
    for task, records in self._parts:
      for index in range(len(records)):
        for text in texts_of(task, records[index], records.name(index)):
          yield Piece(text, True)

  def approximate_bytes(self, split: str) -> int | None:
    """Returns None: it is not known before reading."""


def texts_of(task: Task, record: Mapping[str, Any], where: str) -> list[str]:
  """Returns all texts that a model could read or write of a record."""
  texts = [render(template, record, where) for template in task.templates]
  if task.words:
    texts.append(" ".join(words_of(task, record, where)))
  if task.messages:
    texts += [message["content"] for message in messages_of(task, record, where)]
  return texts


def words_of(task: Task, record: Mapping[str, Any], where: str) -> list[str]:
  """Returns the words of a record of token_classification.

  Raises:
    UserError: where they are no list of texts, or an empty one.
  """
  words = value_at(record, task.words, where)
  if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
    raise UserError(f"{where} has no list of words in the column {task.words!r}, each a text; mend the record.")
  return words


def messages_of(task: Task, record: Mapping[str, Any], where: str) -> list[Mapping[str, str]]:
  """Returns the messages of a chat.

  Raises:
    UserError: where they are no list of mappings with the texts role and content.
  """
  messages = value_at(record, task.messages, where)
  good = isinstance(messages, list) and messages and all(
      isinstance(message, Mapping) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
      for message in messages)
  if not good:
    raise UserError(f"{where} has no list of messages in the column {task.messages!r}, each with a role and a content; "
                    "mend the record.")
  return messages


def open_tasks(config: Config, labels: Mapping[str, tuple[str, ...]]) -> list[tuple[Task, Records]]:
  """Returns the tasks of a config with their training records, their labels found.

  Args:
    config: the experiment.
    labels: by task, where they are known; they are those of the data of others that declare none.

  Raises:
    UserError: for a task that is declared wrongly, that has no record, or two of the same name.
  """
  tasks = [parse_task(entry, TASKS) for entry in config.data.tasks]
  for number, task in enumerate(tasks):
    if any(task.name == other.name for other in tasks[:number]):
      raise UserError(f"config.data.tasks has two tasks called {task.name!r}; give each a name of its own.")
  made = []
  for task in tasks:
    records = open_records(task.source, "train", config.data, whole=task.validation is not None)
    for column in task.columns:  # A mistake in the spec is told before anything is made of the data.
      value_at(records[0], column, records.name(0))
    made.append((_with_labels(task, records, labels.get(task.name)), records))
  return made


def _with_labels(task: Task, records: Records, known: tuple[str, ...] | None) -> Task:
  if task.labels or task.kind not in ("classification", "token_classification"):
    return task
  labels = known or records.names.get(task.label) or distinct(records, task.label)
  if len(labels) < 2:
    raise UserError(f"The task {task.name!r} has but one label, {labels[0]!r}, in {records.where}; there is nothing to "
                    "tell.")
  return dataclasses.replace(task, labels=labels)


def make_part(task: Task, records: Records, framer: Framer | None, training: bool = True) -> TaskPart:
  """Returns the part of a set that some records make.

  Args:
    task: with its labels found.
    records: of the set.
    framer: cuts the long texts of extractive_qa; None where its answers are written, and texts are not cut in windows.
    training: whether an answer that is too long is refused; in an evaluation it counts as one that is not found.

  Raises:
    UserError: for a label that the task does not have, a question that leaves no room for its text, or an answer that
      is too long.
  """
  if task.kind != "extractive_qa" or framer is None:
    _check_labels(task, records)
    return TaskPart(task, records)
  windows = []
  for start in range(0, len(records), _AT_A_TIME):
    numbers = range(start, min(start + _AT_A_TIME, len(records)))
    pairs = [tuple(render(text, records[i], records.name(i)) for text in (task.text, task.text_pair)) for i in numbers]
    try:
      made = framer.windows(pairs)
    except ValueError as e:
      raise UserError(f"{records.name(start + e.args[0])} has a question that takes more than half of the "
                      f"{framer.length} tokens of config.data.seq_len; make that larger.") from e
    for i, encodings in zip(numbers, made):
      answers = find_answers(task, records[i], records.name(i))
      if training:
        check_answers(task, answers, encodings, records.name(i))
      windows.append(len(encodings))
  return TaskPart(task, records, np.array(windows))


def _check_labels(task: Task, records: Records) -> None:
  """Raises a UserError for a label that the task does not have, in up to some thousands of its records."""
  if not task.label:
    return
  check = {"regression": number_in, "token_classification": word_labels}.get(task.kind, label_in)
  for i in np.linspace(0, len(records) - 1, min(len(records), _CHECKED)).astype(int):
    check(task, records[i], records.name(i))


def word_labels(task: Task, record: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
  """Returns the words of a record of token_classification and the numbers of their labels.

  Raises:
    UserError: where there are not as many labels as words, or one that the task does not have.
  """
  words, labels = words_of(task, record, where), value_at(record, task.label, where)
  if not isinstance(labels, list) or len(words) != len(labels):
    raise UserError(f"{where} needs a list of words in {task.words!r} and one of as many labels in {task.label!r}; "
                    "mend the record.")
  return words, [label_of(task, label, where) for label in labels]


def eval_parts(entry: str, config: Config, trained: Sequence[tuple[Task, Records]],
               make: Callable[[Task, Records], TaskPart]) -> dict[str, tuple[int, TaskPart]]:
  """Returns {name of the set: (number of its task, part)} of an entry of config.eval.sets.

  Raises:
    UserError: for an entry that is neither validation, nor train, nor NAME=SOURCE.
  """
  name, equals, source = entry.partition("=")
  if name not in ("validation", "train") and not (equals and name and source):
    raise UserError(f"config.eval.sets has the entry {entry!r}, which is neither validation, nor train, nor "
                    "NAME=SOURCE.")
  if equals and len(trained) > 1:
    raise UserError(f"config.eval.sets has the entry {entry!r}, but does not say of which of the "
                    f"{len(trained)} tasks; declare a task with that validation.")
  parts = {}
  for index, (task, records) in enumerate(trained):
    if equals:
      records = open_records(source, "train", config.data, whole=True)
    elif name == "validation" and task.validation is not None:
      records = open_records(task.validation, "train", config.data, whole=True)
    elif name == "validation":
      records = open_records(task.source, "validation", config.data)
    parts[name if len(trained) == 1 else f"{name}/{task.name}"] = index, make(task, records)
  return parts


def describe_part(part: TaskPart, tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
  """Returns figures of a part: records, examples, tokens of its texts and, where it has labels, the share of each."""
  task, records = part.task, part.records
  sample = np.linspace(0, len(records) - 1, min(len(records), 1000)).astype(int)
  texts = [" ".join(texts_of(task, records[i], records.name(i))) for i in sample]
  lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)])
  figures = {"records": len(records), "examples": len(part), "tokens a record": float(lengths.mean()),
             "records longer than seq_len": float((lengths > seq_len).mean())}
  if task.kind == "classification":
    found = [label_in(task, records[i], records.name(i)) for i in range(len(records))]
    counts = np.bincount(found, minlength=len(task.labels))
    figures["labels"] = dict(zip(task.labels, (counts / len(records)).tolist()))
  return figures
