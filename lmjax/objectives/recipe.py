"""What the host functions of objectives know besides the example at hand."""

import dataclasses
import functools
from typing import Any, Sequence

import numpy as np

from lmjax.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from lmjax.data.chat import chat_template
from lmjax.data.frames import Framer
from lmjax.data.task import Task


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How examples are made of text.

  Attributes:
    cfg: the objective's settings.
    model: those of the model that reads the examples.
    seq_len: T, length of what the model reads.
    special: ids of special tokens by name.
    eos_id: of the token that ends a text.
    start_id: of the token that a text begins with which a decoder writes after an encoder has read another: token 0
      where that is <pad>, as in T5; else the one that ends a text, as in BART.
    ordinary: [n] ids of all tokens that texts are made of.
    is_ordinary: [tokenizer's size] booleans.
    word_flags: [tokenizer's size] booleans each, see `Tokenizer.word_flags`; None where words do not matter.
    texts: the set that the examples are of, for objectives that put texts together: `texts[i]` is an example,
      `texts.num_examples` their number.
    tokenizer: what makes tokens of texts, for labelled examples.
    tasks: of labelled examples.
    data: settings of the data.
    training: whether the examples are for training, and not for evaluation.
    chat_template: in Jinja, of chats.
  """
  cfg: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  special: dict[str, int]
  eos_id: int
  start_id: int
  ordinary: np.ndarray
  is_ordinary: np.ndarray
  word_flags: tuple[np.ndarray, np.ndarray] | None = None
  texts: Any = None
  tokenizer: Any = None
  tasks: tuple[Task, ...] = ()
  data: DataConfig = DataConfig()
  training: bool = False
  chat_template: str = ""

  @functools.cached_property
  def framer(self) -> Framer:
    """Frames texts for the model."""
    return Framer(self.tokenizer, self.seq_len)

  @functools.cached_property
  def opening(self) -> list[int]:
    """Tokens with which a text begins that is written after an encoder has read another: `Tokenizer.opening`."""
    return self.tokenizer.opening if self.model.architecture == "encoder_decoder" else []


def make_recipe(config: Config, tokenizer: Any, special_tokens: Sequence[str], texts: Any, tasks: Sequence[Task] = (),
                training: bool = False) -> Recipe:
  """Returns the recipe of an experiment.

  Args:
    config: the experiment.
    tokenizer: a `lmjax.data.tokenizer.Tokenizer`, which is given the special tokens that it lacks.
    special_tokens: names as `Tokenizer.add_special` takes them.
    texts: the set that the examples are of.
    tasks: of labelled examples, their labels found.
    training: whether the examples are for training.
  """
  special = tokenizer.add_special(special_tokens)
  is_ordinary = np.ones(tokenizer.size, bool)
  is_ordinary[tokenizer.special_ids()] = False
  start = config.objective.start_token
  flags = tokenizer.word_flags() if config.objective.mask_unit != "token" else None
  return Recipe(
      cfg=config.objective, model=config.model, seq_len=config.data.seq_len, special=special, eos_id=tokenizer.eos_id,
      start_id=tokenizer.start_id if start is None else start, ordinary=np.flatnonzero(is_ordinary),
      is_ordinary=is_ordinary, word_flags=flags, texts=texts, tokenizer=tokenizer, tasks=tuple(tasks), data=config.data,
      training=training, chat_template=chat_template(config.data.tokenizer) if config.objective.name == "chat" else "")


def text_of(example: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the tokens of a packed example without padding."""
  return example["targets"][example["weights"] > 0]


def padded(values: np.ndarray, length: int, dtype: Any = np.int32, fill: Any = 0) -> np.ndarray:
  """Returns values followed by what fills the row."""
  row = np.full(length, fill, dtype)
  row[:len(values)] = values
  return row
