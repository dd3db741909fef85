"""Prefix language modelling: a decoder that sees the beginning of a text from both sides.

(Liu et al. 2018, arXiv 1801.10198; Raffel et al. 2019, arXiv 1910.10683, section 3.2.1.) Of each text in an example a
prefix is drawn, from one token to all that the decoder reads, every length equally likely. Its tokens see each other
whatever their order; those after it see the prefix and what stands before them. Only tokens after the prefix are
predicted.
"""

import numpy as np

from lmjax.objectives.causal_lm import loss
from lmjax.objectives.recipe import Recipe

__all__ = ["loss", "make_example"]


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a packed example with `prefix` [T], 1 on tokens that all see, and no weight on targets within a prefix.

  Where attention is kept within documents, each document in the example has a prefix of its own.
  """
  del recipe
  rng = np.random.default_rng(key)
  real = example["weights"] > 0
  segments = example.get("segment_ids", real.astype(np.int32))
  prefix = np.zeros(len(real), np.int32)
  for start, stop in runs(segments[real]):
    prefix[start:start + int(rng.integers(1, stop - start + 1))] = 1
  # Targets are the inputs moved by one: the last token of a prefix predicts the first after it.
  told = np.append(prefix[1:], 0) * (np.append(segments[1:], 0) == segments)
  return {**example, "prefix": prefix, "weights": example["weights"] * (1 - told).astype(np.float32)}


def runs(values: np.ndarray) -> list[tuple[int, int]]:
  """Returns where runs of equal values start and stop."""
  bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
  return [(start, stop) for start, stop in zip(bounds, bounds[1:]) if start < stop]
