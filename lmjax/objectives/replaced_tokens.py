"""Replaced token detection: tell which tokens a generator has put in (Clark et al. 2020, arXiv 2003.10555, section 2).

A share of the tokens is hidden as in masked_lm.py. A small generator is trained to tell them, and a token drawn from
its softmax takes the place of each; the discriminator is trained to tell for every token, those of the frame too,
whether it is the original one. A drawn token that equals the original counts as original. With x the text, m the hidden
places and x' the text with drawn tokens there, the loss is

  mean over m of -log p_G(x_i | hidden x) + replaced_weight * mean over all i of the binary cross-entropy of
  D(x', i) with [x'_i != x_i],

replaced_weight being 50 (table 6). No gradient flows through the drawing, and no generator is trained to mislead.

In the paper all hidden tokens become [MASK] (mask_random = mask_same = 0); in its released code 85% do and 15% stay
what they are (mask_same = 0.15), and all of them are told and drawn anew. Both are settings here.

What is drawn depends on the logits, a number that the row brings along, and the place: not on the step, on how a batch
is split, or on whether it is an evaluation.

Shapes: B batch, T length, P hidden places, D model width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import Config, ObjectiveConfig
from lmjax.models.products import vocabulary_logits
from lmjax.objectives import masked_lm
from lmjax.objectives.cross_entropy import chunk_size, cross_entropy, loss_options
from lmjax.objectives.labelled import label_terms, scaled_terms
from lmjax.objectives.recipe import Recipe

SPECIAL_TOKENS = masked_lm.SPECIAL_TOKENS
num_places = masked_lm.num_places


def text_len(config: Config) -> int:
  """Returns the tokens of text in an example."""
  return masked_lm.text_len(config)


def balance(batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Scales the weights of a whole batch so that each term counts as the settings say."""
  return scaled_terms(batch, {"replaced": cfg.replaced_weight})


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row of masked_lm.py, and beside it `replaced_weights` [T], 1 on real tokens, and `sample_keys` []."""
  row = masked_lm.make_example(example, key, recipe)
  rng = np.random.default_rng((*key, 1))
  return row | {"replaced_weights": (row["segment_ids"] > 0).astype(np.float32),
                "sample_keys": rng.integers(2 ** 32, dtype=np.uint32)}


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch: the generator's cross-entropy, and the discriminator's.

  Args and returns as in causal_lm.py, of batches that `make_example` makes, for an `Electra`; the discriminator's terms
  are `replaced_...`, of which `replaced_share` is the tokens that are not the original ones.
  """
  apply = functools.partial(model.apply, {"params": params}, rngs=rngs)
  segments, types = batch["segment_ids"], batch["token_types"] if model.cfg.token_types > 1 else None
  output = apply(batch["inputs"], batch["places"], segments, types, method="masked_outputs")
  options = loss_options(cfg, model.cfg)
  total, sums = cross_entropy(*output[:2], batch["targets"], batch["weights"], options, output[2])
  drawn_BP = draw(*jax.lax.stop_gradient(output), batch["sample_keys"], options.softcap, options.chunk)
  tokens_BT, is_replaced_BT = replace(batch, drawn_BP)
  logits_BT = apply(tokens_BT, None, segments, types)
  weights = batch["replaced_weights"]
  # The softmax of 0 and a logit is its sigmoid.
  both = jnp.stack([jnp.zeros_like(logits_BT), logits_BT], -1)
  loss_of_tokens, of_tokens = label_terms(both, is_replaced_BT, weights)
  of_tokens["share"] = jnp.sum(is_replaced_BT * weights)
  return total + loss_of_tokens, sums | {f"replaced_{name}": value for name, value in of_tokens.items()}


def draw(x_BPD: jax.Array, w_VD: jax.Array, bias_V: jax.Array | None, keys_B: jax.Array, softcap: float | None = None,
         chunk: int | None = None) -> jax.Array:
  """Draws a token from the softmax at each place, some places at a time.

  Args:
    x_BPD, w_VD, bias_V, softcap, chunk: as `cross_entropy` takes them.
    keys_B: uint32; what is drawn at a place of a row depends on the row's key and the number of the place.

  Returns:
    tokens_BP.
  """
  B, P, D = x_BPD.shape
  size = chunk_size(B, P, w_VD.shape[0], chunk)

  def of_chunk(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    x_BCD, numbers_C = inputs
    logits = vocabulary_logits(x_BCD, w_VD, bias_V, softcap)
    at_place = lambda key, number, row: jax.random.categorical(jax.random.fold_in(key, number), row)
    of_row = lambda key, rows: jax.vmap(at_place, (None, 0, 0))(jax.random.key(key), numbers_C, rows)
    return jax.vmap(of_row)(keys_B, logits)

  chunks = x_BPD.reshape(B, P // size, size, D).swapaxes(0, 1), jnp.arange(P).reshape(-1, size)
  return jax.lax.map(of_chunk, chunks).swapaxes(0, 1).reshape(B, P)


def replace(batch: dict[str, jax.Array], drawn_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the text with what was drawn at the hidden places, and 1 where that is not the original token, [B, T]."""
  T = batch["inputs"].shape[1]
  places = jnp.where(batch["weights"] > 0, batch["places"], T)  # Beyond the end nothing is put in.
  put = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))
  tokens_BT = put(batch["inputs"], places, drawn_BP)
  return tokens_BT, (tokens_BT != put(batch["inputs"], places, batch["targets"])).astype(jnp.int32)
