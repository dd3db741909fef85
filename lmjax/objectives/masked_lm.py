"""Masked language modelling: tell hidden tokens from those on both sides (Devlin et al. 2018, arXiv 1810.04805).

A share of the tokens is chosen, anew each time a text is seen (Liu et al. 2019, arXiv 1907.11692, section 4.1): single
tokens, whole words, or spans of words whose number is geometric, with p = 0.2 and at most 10 (Joshi et al. 2019, arXiv
1907.10529, section 3.1). Of those chosen 80% become [MASK], 10% a random token, and 10% stay what they are; tokens of a
span all become alike (the same section). With `sentence_pairs` the model also tells pairs of texts apart, a second term
of the loss: see framing.py.
"""

from typing import Any

import jax
import numpy as np

from lmjax.config import Config, ObjectiveConfig
from lmjax.objectives import framing
from lmjax.objectives.cross_entropy import cross_entropy, loss_options
from lmjax.objectives.labelled import label_terms, scaled_terms
from lmjax.objectives.recipe import Recipe, padded

SPECIAL_TOKENS = ("mask", *framing.SPECIAL_TOKENS)
_SPAN_P, _LONGEST_SPAN = 0.2, 10


def text_len(config: Config) -> int:
  """Returns the tokens of text in an example."""
  return framing.text_len(config.objective.sentence_pairs, config.data.seq_len)


def num_places(cfg: ObjectiveConfig, seq_len: int) -> int:
  """Returns the places of a full example at which tokens are predicted."""
  return max(1, round(cfg.mask_rate * framing.text_len(cfg.sentence_pairs, seq_len)))


def balance(batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Scales the weights of a whole batch so that each term counts as the settings say."""
  return scaled_terms(batch, {"sentence": cfg.sentence_weight} if cfg.sentence_pairs != "none" else {})


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: a framed text with hidden tokens, and where and what they are.

  Returns:
    `inputs`, `segment_ids` and `token_types` [T]; `places`, `targets` and `weights` [P] of the hidden tokens, P being
    the mask rate's share of a full text; and with pairs `sentence_labels` and `sentence_weights` [].
  """
  rng = np.random.default_rng(key)
  made = framing.frame(example, rng, recipe)
  cfg, T = recipe.cfg, recipe.seq_len
  most = num_places(cfg, T)
  count = min(most, max(1, round(cfg.mask_rate * (len(made.tokens) - 2))))
  places, units = choose(rng, made.tokens, count, recipe)
  row = {
      "inputs": padded(hide(rng, made.tokens, places, units, recipe), T), "segment_ids": padded(made.segment_ids, T),
      "token_types": padded(made.token_types, T), "places": padded(places, most),
      "targets": padded(made.tokens[places], most), "weights": padded(np.ones(len(places)), most, np.float32)}
  if cfg.sentence_pairs != "none":
    row |= {"sentence_labels": np.int32(made.label or 0), "sentence_weights": np.float32(made.label is not None)}
  return row


def hide(rng: np.random.Generator, tokens: np.ndarray, places: np.ndarray, units: np.ndarray,
         recipe: Recipe) -> np.ndarray:
  """Returns the tokens with those at the places masked, replaced or left, by the shares that the settings say."""
  cfg, hidden, draw = recipe.cfg, tokens.copy(), rng.random(len(places))[units]
  hidden[places[draw >= cfg.mask_random + cfg.mask_same]] = recipe.special["mask"]
  at_random = places[draw < cfg.mask_random]
  hidden[at_random] = rng.choice(recipe.ordinary, len(at_random))
  return hidden


def choose(rng: np.random.Generator, tokens: np.ndarray, count: int,
           recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
  """Chooses at most `count` ordinary tokens, fewer where whole words or spans do not fill it.

  Returns:
    Their sorted places [n], and which are hidden alike: numbers below n, equal for the tokens of a span.
  """
  candidates = np.flatnonzero(recipe.is_ordinary[tokens])
  if recipe.cfg.mask_unit == "token":
    places = np.sort(rng.permutation(candidates)[:count])
    return places, np.arange(len(places))
  words = _words(tokens, candidates, recipe)
  longest = 1 if recipe.cfg.mask_unit == "word" else _LONGEST_SPAN
  lengths = np.minimum(rng.geometric(_SPAN_P, len(words)), longest)
  chosen: dict[int, int] = {}
  for number, (first, length) in enumerate(zip(rng.permutation(len(words)), lengths)):
    for word in words[first:first + length]:
      more = dict.fromkeys(word.tolist(), number) | chosen
      if len(more) > count:
        break
      chosen = more
  places = np.array(sorted(chosen), np.int64)
  if recipe.cfg.mask_unit == "word":
    return places, np.arange(len(places))
  return places, np.unique([chosen[place] for place in places.tolist()], return_inverse=True)[1]


def _words(tokens: np.ndarray, candidates: np.ndarray, recipe: Recipe) -> list[np.ndarray]:
  """Groups places of tokens into words."""
  if not len(candidates):
    return []
  goes_on, ends = recipe.word_flags
  before, after = candidates[:-1], candidates[1:]
  same = (after == before + 1) & goes_on[tokens[after]] & ends[tokens[before]]
  return np.split(candidates, np.flatnonzero(~same) + 1)


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch: the cross-entropy of the hidden tokens, and that of the pairs' labels.

  Args and returns as in causal_lm.py, of batches that `make_example` makes; the terms of the pairs are `sentence_...`.
  """
  types = batch["token_types"] if model.cfg.token_types > 1 else None
  output, sentence = model.apply({"params": params}, batch["inputs"], batch["places"], batch["segment_ids"], types,
                                 rngs=rngs, method="masked_outputs")
  total, sums = cross_entropy(*output[:2], batch["targets"], batch["weights"], loss_options(cfg, model.cfg), output[2])
  if cfg.sentence_pairs != "none":
    loss_of_pairs, of_pairs = label_terms(sentence, batch["sentence_labels"], batch["sentence_weights"])
    total += loss_of_pairs
    sums |= {f"sentence_{name}": value for name, value in of_pairs.items()}
  return total, sums
