"""Span corruption: write what is missing from a text (Raffel et al. 2019, arXiv 1910.10683, section 3.1.4).

Of a text of n tokens round(n * noise_density) are noise, in round(noise / mean_span_length) spans. Noise and what
stays is each cut into as many parts, all cuts being equally likely, and they take turns, the text beginning with what
stays: the `random_spans_noise_mask` that was released with T5. The encoder reads the text with each span replaced by a
token of its own, <extra_id_0>, <extra_id_1>, ..., and the end token; the decoder writes those tokens, each followed by
its span, and the end token. The length of the text is such that the encoder's row is full.

    text     the cat sat on the mat .
    encoder  the <extra_id_0> on the <extra_id_1> </s>
    decoder  <extra_id_0> cat sat <extra_id_1> mat . </s>

The decoder's text begins with `Recipe.start_id`. Documents stand joined in a text, and a span may go across their ends.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.config import Config, ObjectiveConfig
from lmjax.config_checks import UserError
from lmjax.objectives.cross_entropy import cross_entropy, loss_options
from lmjax.objectives.recipe import Recipe, padded, text_of


class Denoiser(NamedTuple):
  """How a text is corrupted.

  Attributes:
    density: share of its tokens that are noise.
    mean_span: mean length of a span; None is one span at the end of the text.
    mode: name of a special token that the encoder reads first; None is none.
  """
  density: float
  mean_span: float | None
  mode: str | None = None


class Lengths(NamedTuple):
  """Tokens that fit: of a text, of the decoder's row, and most spans of a text."""
  text: int
  decoder: int
  spans: int


def noise_of(length: int, denoiser: Denoiser) -> tuple[int, int]:
  """Returns how many tokens of a text of at least two are noise, and in how many spans."""
  noise = min(max(round(length * denoiser.density), 1), length - 1)
  spans = 1 if denoiser.mean_span is None else round(noise / denoiser.mean_span)
  return noise, min(max(spans, 1), noise, length - noise)


@functools.lru_cache
def lengths(denoisers: tuple[Denoiser, ...], seq_len: int) -> Lengths:
  """Returns the longest text that each denoiser makes an encoder's row of `seq_len` of at most, and what it needs."""
  def encoder(length):
    made = [(noise_of(length, denoiser), denoiser) for denoiser in denoisers]
    return max(length - noise + spans + 1 + (denoiser.mode is not None) for (noise, spans), denoiser in made)

  text = 2
  if encoder(text) > seq_len:
    raise UserError(f"config.data.seq_len is {seq_len}, but a text of two tokens takes {encoder(text)} once it is "
                    "corrupted; make it longer.")
  while encoder(text + 1) <= seq_len:
    text += 1
  made = [noise_of(text, denoiser) for denoiser in denoisers]
  return Lengths(text, max(noise + spans + 1 for noise, spans in made), max(spans for _, spans in made))


def checked_lengths(denoisers: tuple[Denoiser, ...], config: Config) -> Lengths:
  """Returns the lengths of an experiment, after checking that the decoder has as many positions."""
  made, model = lengths(denoisers, config.data.seq_len), config.model
  held = model.max_positions or config.data.seq_len
  if model.position == "learned" and made.decoder > held:
    raise UserError(f"config.objective.name is {config.objective.name}, whose decoder then writes up to {made.decoder} "
                    f"tokens, more than the {held} learned positions of config.model.max_positions; raise it, or "
                    "shorten config.data.seq_len.")
  return made


def _denoisers(cfg: ObjectiveConfig) -> tuple[Denoiser, ...]:
  return (Denoiser(cfg.noise_density, cfg.mean_span_length),)


def text_len(config: Config) -> int:
  """Returns the tokens of text in an example."""
  return checked_lengths(_denoisers(config.objective), config).text


def decoder_len(config: Config) -> int:
  """Returns the tokens that the decoder writes of a full example."""
  return lengths(_denoisers(config.objective), config.data.seq_len).decoder


def special_tokens(config: Config) -> list[str]:
  """Returns the names of the special tokens."""
  return sentinels(lengths(_denoisers(config.objective), config.data.seq_len).spans)


def sentinels(count: int) -> list[str]:
  """Returns the first tokens that stand for spans."""
  return [f"<extra_id_{number}>" for number in range(count)]


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: a corrupted text, and what is missing from it.

  Returns:
    `encoder_inputs` and `encoder_segment_ids` [S]; `inputs`, `targets`, `weights` and `segment_ids` [T] of the decoder.
    Segment ids are 1, and 0 on padding.
  """
  denoisers = _denoisers(recipe.cfg)
  return corrupted(text_of(example), denoisers[0], denoisers, np.random.default_rng(key), recipe)


def corrupted(text: np.ndarray, denoiser: Denoiser, denoisers: tuple[Denoiser, ...], rng: np.random.Generator,
              recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns the row that one of some denoisers makes of a text; its shapes are the same for all of them."""
  S, T = recipe.seq_len, lengths(denoisers, recipe.seq_len).decoder
  noise, end = noise_mask(rng, len(text), denoiser), [recipe.eos_id]
  mode = [] if denoiser.mode is None else [recipe.special[denoiser.mode]]
  encoder = np.concatenate([mode, _replaced(text, noise, recipe.special), end])
  decoder = np.concatenate([_replaced(text, ~noise, recipe.special), end])
  ones = np.ones(len(decoder))
  return {
      "encoder_inputs": padded(encoder, S), "encoder_segment_ids": padded(np.ones(len(encoder)), S),
      "inputs": padded(np.concatenate([[recipe.start_id], decoder[:-1]]), T), "targets": padded(decoder, T),
      "weights": padded(ones, T, np.float32), "segment_ids": padded(ones, T)}


def noise_mask(rng: np.random.Generator, length: int, denoiser: Denoiser) -> np.ndarray:
  """Returns [length] booleans of the tokens that are noise: none of a single token."""
  if length < 2:
    return np.zeros(length, bool)
  noise, spans = noise_of(length, denoiser)
  runs = np.stack([_parts(rng, length - noise, spans), _parts(rng, noise, spans)], axis=1).ravel()
  return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _parts(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
  """Returns the lengths of parts that a total is cut into, none of which is empty."""
  cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
  return np.diff(np.concatenate([[0], cuts, [total]]))


def _replaced(text: np.ndarray, out: np.ndarray, special: dict[str, int]) -> np.ndarray:
  """Returns the text with each run of tokens that are to be out replaced by the next of the sentinels."""
  starts = out & ~np.concatenate([[False], out[:-1]])
  made = text.copy()
  made[starts] = [special[name] for name in sentinels(np.count_nonzero(starts))]
  return made[~out | starts]


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch: the cross-entropy of what the decoder writes, sentinels and end token included.

  Args and returns as in causal_lm.py, of an encoder-decoder and of batches that `make_example` makes.
  """
  x_BTD, w_VD, bias_V = model.apply(
      {"params": params}, batch["encoder_inputs"], batch["inputs"], None, batch["encoder_segment_ids"], None,
      batch["segment_ids"], rngs=rngs, method="features_and_output")
  return cross_entropy(x_BTD, w_VD, batch["targets"], batch["weights"], loss_options(cfg, model.cfg), bias_V)
