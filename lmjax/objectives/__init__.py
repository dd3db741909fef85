"""Objectives: a module each, with `make_example` for the host and `loss` for the device.

A module may also say how much text an example takes (`text_len`), which special tokens it needs (`SPECIAL_TOKENS`, or
`special_tokens` where that depends on the settings), and what terms of its loss beside the first count
(`term_weights`).
"""

import functools
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from lmjax.config import Config, ObjectiveConfig
from lmjax.objectives import (
  causal_lm,
  fill_in_the_middle,
  masked_lm,
  mixture_of_denoisers,
  multi_token,
  permutation_lm,
  prefix_lm,
  replaced_tokens,
  span_corruption,
)
from lmjax.objectives.recipe import make_recipe

OBJECTIVES = {
    "causal_lm": causal_lm, "multi_token": multi_token, "prefix_lm": prefix_lm,
    "fill_in_the_middle": fill_in_the_middle, "masked_lm": masked_lm, "replaced_tokens": replaced_tokens,
    "permutation_lm": permutation_lm, "span_corruption": span_corruption,
    "mixture_of_denoisers": mixture_of_denoisers}


def text_needs(config: Config) -> tuple[int, Sequence[str]]:
  """Returns the tokens of text in an example and the special tokens that an experiment's objective needs."""
  module = OBJECTIVES[config.objective.name]
  text_len = module.text_len(config) if hasattr(module, "text_len") else config.data.seq_len
  if hasattr(module, "special_tokens"):
    return text_len, module.special_tokens(config)
  return text_len, getattr(module, "SPECIAL_TOKENS", ())


def host_function(config: Config, tokenizer: Any, texts: Any) -> Callable[..., dict]:
  """Returns the objective's (packed example, key) -> row of a batch, for examples of the set `texts`."""
  recipe = make_recipe(config, tokenizer, text_needs(config)[1], texts)
  return functools.partial(OBJECTIVES[config.objective.name].make_example, recipe=recipe)


def balance(module: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Scales the weights of a whole batch's terms so that the loss is a sum of means, whatever it is then split into.

  All sums are divided by the sum of the first term's `weights`. A term's `TERM_weights` are therefore made to add up to
  that times what the term counts.
  """
  terms = module.term_weights(cfg) if hasattr(module, "term_weights") else {}
  whole = jnp.sum(batch["weights"])
  scaled = {}
  for term, factor in terms.items():
    weights = batch[f"{term}_weights"]
    scaled[f"{term}_weights"] = weights * (factor * whole / jnp.maximum(jnp.sum(weights), 1e-9))
  return {**batch, **scaled}
