"""Labelled tasks, declared: where the records lie, which columns are read as what, and what is measured.

A task is a name of `task_specs.TASKS`, or in an experiment file a mapping of the settings of `Task`:

    config.data.tasks = (dict(name="reviews", kind="classification", source="reviews.csv", text="{title}. {body}",
                              label="stars", labels=("bad", "good")),)

Templates name columns in braces; `{answers/text}` is the field `text` in the column `answers`, `{endings/0}` the first
element of a list.
"""

import dataclasses
import math
import re
from typing import Any, Mapping, Sequence

from lmjax.config import setting
from lmjax.config_checks import UserError, checked, nearest, reject_unknown

KINDS = ("classification", "regression", "token_classification", "extractive_qa", "multiple_choice", "text_to_text",
         "chat")


@dataclasses.dataclass(frozen=True)
class Task:
  """A labelled task."""
  name: str = setting("", "What its sets, its head and its metrics are called.")
  kind: str = setting("classification", "What is learned, an objective of this name.", choices=KINDS)
  source: str = setting("", "Where records lie: a path or glob of .jsonl, .csv, .tsv or .parquet files, "
                        "tfds:NAME[/CONFIG][:VERSION], a prepared TFDS folder, or stdlib:NAME.")
  validation: str | None = setting(
      None, "The same of held-out records, tfds:NAME[SPLIT] for another split; None means the split that the source "
      "has, else data.validation_fraction of its records.")
  text: str = setting("", "Template of the text, or of the question of extractive_qa and multiple_choice.")
  text_pair: str = setting("", "Template of a second text, or of the text that holds the answers.")
  choices: tuple = setting((), "Templates of the answers to choose from.")
  words: str = setting("", "Column of the words that token_classification labels.")
  messages: str = setting("", "Column of a chat's messages, each with role and content.")
  label: str = setting("", "Column of the label, of a number, or of the labels of words: a number from 0 or a name.")
  labels: tuple = setting((), "Names of the labels; () means those of the data.")
  answers: str = setting("", "Column of the answers' texts, a text or a list; none means that there is no answer.")
  starts: str = setting("", "Column of the characters at which they start; unset means where they first stand.")
  target: str = setting("", "Template of the text to write.")
  prefix: str | None = setting(None, "What its texts begin with in text_to_text; None means the task's name and a "
                               "space where labels are written as words, and nothing else.")
  metrics: tuple = setting((), "Metrics of lmjax/scores.py; () means those that are usual for the kind.")
  max_answer_tokens: int = setting(64, "Longest answer of extractive_qa.", unit="tokens", low=1)
  no_answer: bool = setting(True, "Whether in extractive_qa a text may hold no answer.")
  max_target_tokens: int | None = setting(
      None, "Longest text that an encoder-decoder writes, the rest being cut; None means data.seq_len.", unit="tokens",
      low=2)

  @property
  def head(self) -> str:
    """The head of the model that is trained, as in config.model.head."""
    return {"classification": "sequence", "regression": "sequence", "token_classification": "token",
            "extractive_qa": "span", "multiple_choice": "choice"}.get(self.kind, "lm")

  @property
  def num_labels(self) -> int:
    """Labels of that head; 1 where it has none."""
    return len(self.labels) if self.kind in ("classification", "token_classification") else 1

  @property
  def measured(self) -> tuple[str, ...]:
    """The metrics, those that are usual for the kind unless others are set."""
    if self.metrics or self.kind != "token_classification":
      return self.metrics or _USUAL[self.kind]
    in_spans = bool(self.labels) and all(label == "O" or label[:2] in ("B-", "I-") for label in self.labels)
    return ("span_f1",) if in_spans else ("accuracy", "f1_macro")

  @property
  def templates(self) -> tuple[str, ...]:
    """All templates that are set."""
    return tuple(text for text in (self.text, self.text_pair, self.target, *self.choices) if text)

  @property
  def columns(self) -> tuple[str, ...]:
    """Paths of all columns that are read."""
    named = [column for template in self.templates for column in _COLUMN.findall(template)]
    own = [self.words, self.messages, self.label, self.answers, self.starts]
    return tuple(dict.fromkeys([*named, *filter(None, own)]))


# What each kind must have, and what it may have besides.
_NEEDS = {
    "classification": (("text", "label"), ("text_pair", "labels")),
    "regression": (("text", "label"), ("text_pair",)),
    "token_classification": (("words", "label"), ("labels",)),
    "extractive_qa": (("text", "text_pair", "answers"), ("starts",)),
    "multiple_choice": (("text", "choices", "label"), ()),
    "text_to_text": (("text", "target"), ()),
    "chat": (("messages",), ()),
}
_USUAL = {"classification": ("accuracy",), "regression": ("pearson", "spearman"), "extractive_qa": ("squad",),
          "multiple_choice": ("accuracy",), "text_to_text": ("exact_match", "chrf"), "chat": ()}
_OF_KINDS = {name for needed, further in _NEEDS.values() for name in needed + further}
_COLUMN = re.compile(r"\{([^{}]+)\}")


def parse_task(entry: Any, ready: Mapping[str, Task]) -> Task:
  """Returns the task that an entry of `config.data.tasks` declares.

  Args:
    entry: a name in `ready`, or a mapping of settings.
    ready: tasks by name.

  Raises:
    UserError: for an unknown name or setting, or one that the kind lacks or does not read.
  """
  if isinstance(entry, str):
    if entry not in ready:
      raise UserError(f"config.data.tasks names {entry!r}, which is no task{nearest(entry, ready)}")
    return ready[entry]
  if not isinstance(entry, Mapping):
    raise UserError(f"config.data.tasks has the entry {entry!r}, but each is the name of a task or a mapping of its "
                    "settings.")
  where = f"The task {entry.get('name', '')!r} of config.data.tasks"
  fields, types = Task.__dataclass_fields__, Task.__annotations__
  reject_unknown(where, entry, fields)
  task = Task(**{name: checked(where, name, value, types[name], fields[name]) for name, value in entry.items()})
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", task.name):
    raise UserError(f"{where} needs a name of letters, digits, dots, - and _ , for its metrics are called by it.")
  needed, further = _NEEDS[task.kind]
  for name in ("source", *needed):
    if not getattr(task, name):
      raise UserError(f"{where} has no {name}, which kind {task.kind} needs; set it.")
  for name in sorted(_OF_KINDS - {*needed, *further}):
    if getattr(task, name):
      raise UserError(f"{where} has {name} = {getattr(task, name)!r}, which kind {task.kind} does not read; leave it "
                      "out.")
  for what, templates in (("text", (task.text, task.text_pair, *task.choices)), ("target", (task.target,))):
    if any(templates) and not any(map(_COLUMN.search, templates)):
      raise UserError(f"{where} has {what} = {getattr(task, what)!r}, which names no column, so that all records would "
                      "be alike; write the names of columns in braces, as in '{title}'.")
  if task.kind == "multiple_choice" and len(task.choices) < 2:
    raise UserError(f"{where} has one choice; give the template of each.")
  if len(task.labels) == 1:
    raise UserError(f"{where} has but one label, {task.labels[0]!r}; there is nothing to tell.")
  if len({*task.labels}) < len(task.labels):
    raise UserError(f"{where} has a label twice among {task.labels}; give each once.")
  return task


def value_at(record: Mapping[str, Any], column: str, where: str) -> Any:
  """Returns what a record has at the path of a column.

  Raises:
    UserError: where there is no such column.
  """
  value = record
  for part in column.split("/") if column not in record else (column,):
    if isinstance(value, Mapping) and part in value:
      value = value[part]
    elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
      value = value[int(part)]
    else:
      raise UserError(f"{where} has no column {column!r}{nearest(part, map(str, record))}")
  return value


def render(template: str, record: Mapping[str, Any], where: str) -> str:
  """Returns a template with its columns' values in place of their names.

  Raises:
    UserError: for an unknown column, or one that holds neither text nor a number.
  """
  def text(match):
    value = value_at(record, match[1], where)
    if not isinstance(value, (str, int, float)):
      raise UserError(f"{where}: the column {match[1]!r} is {type(value).__name__}, which is no text; use one that is.")
    return str(value)

  return _COLUMN.sub(text, template)


def label_of(task: Task, value: Any, where: str) -> int:
  """Returns the number of a label that data give by number or name.

  Raises:
    UserError: for one that the task does not have.
  """
  if isinstance(value, bool):
    value = int(value)
  if isinstance(value, str) and value not in task.labels and re.fullmatch(r"-?\d+", value):
    value = int(value)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if value in task.labels and isinstance(value, str):
    return task.labels.index(value)
  count = len(task.labels) or len(task.choices)
  if isinstance(value, int) and 0 <= value < count:
    return value
  known = f"the names {', '.join(map(str, task.labels[:20]))} or " if task.labels else ""
  raise UserError(f"{where} has the label {value!r}, but the task {task.name!r} has {known}numbers from 0 to "
                  f"{count - 1}; mend the record or the task's labels.")


def label_in(task: Task, record: Mapping[str, Any], where: str) -> int:
  """Returns the number of a record's label; see `label_of`."""
  return label_of(task, value_at(record, task.label, where), where)


def number_in(task: Task, record: Mapping[str, Any], where: str) -> float:
  """Returns the number that a regression is to predict of a record; see `number_of`."""
  return number_of(task, value_at(record, task.label, where), where)


def number_of(task: Task, value: Any, where: str) -> float:
  """Returns the number that a regression is to predict.

  Raises:
    UserError: for what is no finite number.
  """
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise UserError(f"{where} has {task.label} = {value!r}, which is no number, but the task {task.name!r} is a "
                    "regression; mend the record.")
  return number
