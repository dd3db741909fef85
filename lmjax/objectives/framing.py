"""How an encoder's input is framed: [CLS] text [SEP], or a pair of texts, [CLS] first [SEP] second [SEP].

Of a pair the model tells either whether the second follows the first (next; Devlin et al. 2018, arXiv 1810.04805,
section 3.1) or whether the two are in order (order; Lan et al. 2019, arXiv 1909.11942, section 3.1). Texts are cut at
any token, not at ends of sentences.
"""

from typing import NamedTuple

import numpy as np

from lmjax.objectives.recipe import Recipe, text_of

SPECIAL_TOKENS = ("cls", "sep")


class Frame(NamedTuple):
  """What a model reads, without padding.

  Attributes:
    tokens: [n].
    segment_ids: [n] what attends to each other, from 1.
    token_types: [n] 1 in the second text of a pair with its [SEP], else 0.
    label: of the pair: 0 where the second follows the first, 1 where it is another text or the two are swapped; None
      where there is no pair.
  """
  tokens: np.ndarray
  segment_ids: np.ndarray
  token_types: np.ndarray
  label: int | None


def text_len(sentence_pairs: str, seq_len: int) -> int:
  """Returns the tokens of text that fill a frame."""
  return seq_len - (2 if sentence_pairs == "none" else 3)


def frame(example: dict[str, np.ndarray], rng: np.random.Generator, recipe: Recipe) -> Frame:
  """Frames a packed example, drawing what makes a pair of it."""
  text, pairs = text_of(example), recipe.cfg.sentence_pairs
  cls, sep = (np.array([recipe.special[name]]) for name in SPECIAL_TOKENS)
  if pairs == "none" or len(text) < 2:
    tokens = np.concatenate([cls, text, sep])
    segments = np.ones(len(tokens), np.int32)
    if "segment_ids" in example:  # Texts that are packed beside each other stay apart; the frame is of those it meets.
      segments[1:-1] = example["segment_ids"][example["weights"] > 0]
      segments[-1] = segments[-2]
    return Frame(tokens, segments, np.zeros(len(tokens), np.int32), None)
  cut = int(rng.integers(1, len(text)))
  first, second, label = text[:cut], text[cut:], int(rng.random() < 0.5)
  if label and pairs == "order":
    first, second = second, first
  elif label:
    other = text_of(recipe.texts[int(rng.integers(recipe.texts.num_examples))])
    start = int(rng.integers(max(len(other) - len(second), 0) + 1))
    drawn = other[start:start + len(second)]
    label, second = int(not np.array_equal(drawn, second)), drawn  # What was drawn may be the text itself.
  tokens = np.concatenate([cls, first, sep, second, sep])
  types = (np.arange(len(tokens)) >= len(first) + 2).astype(np.int32)
  return Frame(tokens, np.ones(len(tokens), np.int32), types, label)
