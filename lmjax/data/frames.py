"""Texts as the tokens that a model of labels reads: framed as its tokenizer file says, cut to a length.

Where the file says nothing, one text is [CLS] text [SEP] and two are [CLS] first [SEP] second [SEP] for a model that
sees both sides, with token type 1 from the second on; for a decoder, or a model that has one, each text is followed by
the token that ends a document.
"""

from typing import Any, Sequence

import numpy as np

from lmjax.data.tokenizer import Tokenizer

SPECIAL_TOKENS = ("cls", "sep")


class Framer:
  """Frames texts, in at most so many tokens.

  Attributes:
    length: tokens of a frame at most.
  """

  def __init__(self, tokenizer: Tokenizer, length: int):
    """Args: `tokenizer`: which says how texts are framed."""
    self.length = length
    self._cut, self._windowed = _copy(tokenizer), _copy(tokenizer)
    self._cut.enable_truncation(length, strategy="longest_first")
    self._windowed.enable_truncation(length, stride=length // 4, strategy="only_second")

  def frame(self, text: str, pair: str | None = None) -> Any:
    """Returns the `tokenizers.Encoding` of a text or two; where they are too long, the longer one is cut."""
    return self._cut.encode(text, pair)

  def windows(self, pairs: Sequence[tuple[str, str]]) -> list[list[Any]]:
    """Returns for each pair the encodings of its first text with a part each of the second.

    Parts overlap by a quarter of the length.

    Raises:
      ValueError: where a first text takes more than half of the length; its argument is the number of the pair.
    """
    for number, first in enumerate(self._cut.encode_batch([text for text, _ in pairs])):
      if len(first.ids) > self.length // 2:
        raise ValueError(number)
    return [[first, *first.overflowing] for first in self._windowed.encode_batch(list(pairs))]


def model_inputs(encoding: Any, length: int) -> dict[str, np.ndarray]:
  """Returns `inputs`, `segment_ids` (1, and 0 on padding) and `token_types` [T] of an encoding."""
  rows = {"inputs": encoding.ids, "segment_ids": [1] * len(encoding.ids), "token_types": encoding.type_ids}
  return {name: np.pad(np.array(values, np.int32), (0, length - len(values))) for name, values in rows.items()}


def first_tokens(offsets: Sequence[tuple[int, int]], sequence_ids: Sequence[int | None],
                 words: Sequence[str]) -> dict[int, int]:
  """Returns {word: place of its first token} for words that are joined by spaces into the first text of an encoding."""
  ends = np.cumsum([len(word) + 1 for word in words]) - 1
  places: dict[int, int] = {}
  for place, ((_, end), sequence) in enumerate(zip(offsets, sequence_ids)):
    # A token may begin with the space before its word, but it ends inside it.
    word = int(np.searchsorted(ends, end))
    if sequence == 0 and word < len(words) and end > ends[word] - len(words[word]):
      places.setdefault(word, place)
  return places


def add_frame(tokenizer: Tokenizer, architecture: str) -> None:
  """Makes a tokenizer say how texts are framed, where its file does not, so that whoever reads it frames alike."""
  if architecture == "encoder":
    ids = tokenizer.add_special(SPECIAL_TOKENS)
    tokenizer.add_template("{cls} $A {sep}", "{cls} $A {sep} $B:1 {sep}:1", ids)
  else:
    tokenizer.add_template("$A {end}", "$A {end} $B:1 {end}:1", {"end": tokenizer.eos_id})


def _copy(tokenizer: Tokenizer) -> Any:
  import tokenizers
  backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  backend.encode_special_tokens = True
  return backend
