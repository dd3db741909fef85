"""Training texts made a little different each time: words replaced, left out, put in or swapped.

The four operations of Wei and Zou 2019 (arXiv 1901.11196), with words drawn from other training texts where the paper
has synonyms. What stands between words stays. Where all four shares are 0 a text stays as it is.
"""

import re
from typing import Callable

import numpy as np

from lmjax.config import DataConfig


def is_on(cfg: DataConfig) -> bool:
  """Returns whether any operation has a share above 0."""
  return any((cfg.augment_replace, cfg.augment_delete, cfg.augment_insert, cfg.augment_swap))


def augment(text: str, rng: np.random.Generator, cfg: DataConfig, draw: Callable[[], str]) -> str:
  """Returns a text that has been through the four operations, in the order swap, replace, insert, delete.

  Args:
    text: of which at least one word is kept.
    rng: what is changed.
    cfg: `augment_replace`, `augment_delete`, `augment_insert` and `augment_swap` are the shares of its words.
    draw: returns a word of another text.
  """
  if not is_on(cfg):
    return text
  before, *parts = re.split(r"(\S+)", text)
  words, spaces = parts[::2], parts[1::2]
  count = len(words)
  if not count:
    return text
  for i in np.flatnonzero(rng.random(count) < cfg.augment_swap):
    j = int(rng.integers(count))
    words[i], words[j] = words[j], words[i]
  for i in np.flatnonzero(rng.random(count) < cfg.augment_replace):
    words[i] = draw()
  for i in np.flatnonzero(rng.random(count) < cfg.augment_insert):
    words[i] = f"{words[i]} {draw()}"
  kept = rng.random(count) >= cfg.augment_delete
  kept[int(rng.integers(count))] = True
  return before + "".join(word + space for word, space, keep in zip(words, spaces, kept) if keep)
