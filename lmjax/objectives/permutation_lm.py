"""Permutation language modelling: predict tokens in an order drawn for each text (Yang et al. 2019, arXiv 1906.08237).

The paper maximises the expected sum over t > c of log p(x_z(t) | x_z(<t)), z being a permutation of the places and
1 - c / T a fraction 1/K (sections 2.2 and 2.3). Here, as in the code released with it, the first c tokens of the order
are all those that are not predicted. They see each other and no target; which of them comes first then matters to
nothing. The targets follow in a random order, and one sees the tokens not predicted and the targets before it.

Targets are spans: a length L of 1 to 5, with a probability in proportion to 1/L, and a span of L tokens anywhere in the
next K L tokens, until the text ends; single tokens elsewhere make up what is then missing (section 3.1, and the
released code, which counts words and puts K L tokens beside a span). A text is a piece of the corpus as it is: no
special tokens, and no pairs of segments (section 2.5).

With `memory` (section 2.4) an example has two texts, one going on from the other. The first is read whole, for what the
layers make of it, through which no gradient flows. Where the model has `reverse_half`, half of the examples, drawn at
random, are written from end to start before anything else.
"""

from typing import Any

import jax
import numpy as np

from lmjax.config import Config, ObjectiveConfig
from lmjax.objectives.cross_entropy import cross_entropy, loss_options
from lmjax.objectives.recipe import Recipe, padded, text_of

_LENGTHS = np.arange(1, 6)
_LENGTH_SHARES = (1 / _LENGTHS) / np.sum(1 / _LENGTHS)


def text_len(config: Config) -> int:
  """Returns the tokens of text in an example."""
  return config.data.seq_len * (2 if config.objective.memory else 1)


def num_places(cfg: ObjectiveConfig, seq_len: int) -> int:
  """Returns the places of a full example at which tokens are predicted."""
  return max(1, round(cfg.predict_fraction * seq_len))


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: a text, and which of its tokens are predicted in which order.

  Returns:
    `inputs` and `segment_ids` [T]; `order` [T], 1, 2, ... on targets and 0 elsewhere; `places` (-1 is none), `targets`
    and `weights` [P] of the targets in their order, P being the fraction of a full text. With reverse_half `reversed`
    [], 1 where the text is written from end to start; with memory `before` [T] and `has_before` [], 0 where the example
    is too short for two texts.
  """
  rng = np.random.default_rng(key)
  cfg, T = recipe.cfg, recipe.seq_len
  text, segments = text_of(example), np.ones(np.count_nonzero(example["weights"]), np.int32)
  if "segment_ids" in example:
    segments = example["segment_ids"][example["weights"] > 0]
  extra = {}
  if recipe.model.reverse_half:
    extra["reversed"] = np.int32(rng.random() < 0.5)
    if extra["reversed"]:
      text, segments = text[::-1], segments[::-1]
  if cfg.memory:
    before = text[:T] if len(text) > T else text[:0]
    text, segments = text[len(before):], segments[len(before):]
    extra |= {"before": padded(before, T), "has_before": np.int32(len(before) > 0)}
  most = num_places(cfg, T)
  places = rng.permutation(spans(rng, len(text), min(most, max(1, round(cfg.predict_fraction * len(text)))), cfg))
  order = np.zeros(T, np.int32)
  order[places] = np.arange(1, len(places) + 1)
  return {
      "inputs": padded(text, T), "segment_ids": padded(segments, T), "order": order,
      "places": padded(places, most, fill=-1), "targets": padded(text[places], most),
      "weights": padded(np.ones(len(places)), most, np.float32), **extra}


def spans(rng: np.random.Generator, length: int, count: int, cfg: ObjectiveConfig) -> np.ndarray:
  """Returns the sorted places of `count` targets in a text of this length: spans, and single tokens for the rest."""
  chosen, at = np.zeros(length, bool), 0.0
  while (left := count - np.count_nonzero(chosen)) > 0:
    size = min(int(rng.choice(_LENGTHS, p=_LENGTH_SHARES)), left)
    begin, end = int(at + 0.5), int(at + size / cfg.predict_fraction + 0.5)
    if end > length:
      break
    start = rng.integers(begin, max(begin, end - size) + 1)
    chosen[start:start + size] = True
    at += size / cfg.predict_fraction
  missing = count - np.count_nonzero(chosen)
  chosen[rng.permutation(np.flatnonzero(~chosen))[:missing]] = True
  return np.flatnonzero(chosen)


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch: the cross-entropy of the targets, each under what comes before it in the order.

  Args and returns as in causal_lm.py, of batches that `make_example` makes, for an XLNet.
  """
  x_BPD, w_VD, bias_V = model.apply(
      {"params": params}, batch["inputs"], batch["places"], segment_ids_BT=batch["segment_ids"],
      hidden_BTT=hidden(batch["order"]), before_BT=batch.get("before"), has_before_B=batch.get("has_before"),
      reversed_B=batch.get("reversed"), rngs=rngs, method="masked_outputs")
  return cross_entropy(x_BPD, w_VD, batch["targets"], batch["weights"], loss_options(cfg, model.cfg), bias_V)


def hidden(order_BT: jax.Array) -> jax.Array:
  """Returns hidden_BTT, True where the first token may not see the second: a target that does not come before it."""
  return (order_BT[:, :, None] <= order_BT[:, None, :]) & (order_BT[:, None, :] > 0)
