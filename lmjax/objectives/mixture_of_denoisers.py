"""UL2's mixture of denoisers (Tay et al. 2022, arXiv 2205.05131, section 3.1 and table 1).

Each text is corrupted as in span_corruption.py by one of the seven denoisers of the table, here all equally likely: two
with short spans and little noise (R), one that cuts the last quarter off, which makes a language model of a prefix (S),
and four with long spans or much noise (X). Which kind it was the encoder reads first, as a token [R], [S] or [X]; a
tokenizer that has [NLU], [S2S] or [NLG], as the released models call them, keeps its own. The text is as long as fits
whatever is drawn, so that all rows have the same shapes.
"""

import numpy as np

from lmjax.config import Config
from lmjax.objectives import span_corruption
from lmjax.objectives.recipe import Recipe, text_of
from lmjax.objectives.span_corruption import Denoiser, loss

__all__ = ["DENOISERS", "loss", "decoder_len", "make_example", "special_tokens", "text_len"]

DENOISERS = (
    Denoiser(0.15, 3, "R"), Denoiser(0.15, 8, "R"), Denoiser(0.25, None, "S"),
    Denoiser(0.5, 3, "X"), Denoiser(0.5, 8, "X"), Denoiser(0.15, 64, "X"), Denoiser(0.5, 64, "X"))


def text_len(config: Config) -> int:
  """Returns the tokens of text in an example."""
  return span_corruption.checked_lengths(DENOISERS, config).text


def decoder_len(config: Config) -> int:
  """Returns the tokens of the decoder's row."""
  return span_corruption.lengths(DENOISERS, config.data.seq_len).decoder


def special_tokens(config: Config) -> list[str]:
  """Returns the names of the special tokens."""
  return ["R", "S", "X", *span_corruption.sentinels(span_corruption.lengths(DENOISERS, config.data.seq_len).spans)]


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row as span_corruption.py does, by a denoiser that is drawn."""
  rng = np.random.default_rng(key)
  drawn = DENOISERS[int(rng.integers(len(DENOISERS)))]
  return span_corruption.corrupted(text_of(example), drawn, DENOISERS, rng, recipe)
