"""Text from a model."""

import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError
from lmjax.generation.sampling import Sampler, decode
from lmjax.models.attention import init_cache


def generate(model: Any, params: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, eos_id: int | None = None,
             vocab_size: int | None = None, decoder_start_token_id: int | None = None,
             both_sides: bool = False) -> list[list[int]]:
  """Continues prompts; an encoder-decoder reads them, and answers.

  Args:
    model: as `lmjax.load` returns it.
    params: its parameters.
    prompts: token ids of each prompt; lengths may differ.
    max_new_tokens: at most this many tokens are added.
    temperature: 0 is greedy.
    top_k: keep only the k likeliest tokens; 0 keeps all.
    top_p: keep only the likeliest tokens that together reach this probability; 1 keeps all.
    seed: of the sampling.
    eos_id: ends a sequence, and is not returned.
    vocab_size: the tokenizer's size, where the model's vocabulary is padded beyond it.
    decoder_start_token_id: what the text of an encoder-decoder begins with, which is not returned: 0 in T5, 2 in BART.
    both_sides: whether the tokens of a prompt see each other whatever their order, as a decoder learns with prefix_lm.

  Returns:
    The new tokens of each prompt.

  Raises:
    UserError: for an empty prompt, a token outside the vocabulary, a setting out of range, or a text longer than the
      model has positions for.
  """
  _check(model.cfg, prompts, max_new_tokens, temperature, top_k, top_p, decoder_start_token_id)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  # Lengths are rounded up so that prompts of nearby lengths share a compiled program.
  width = -(-int(lengths.max()) // 32) * 32
  aligned = np.zeros((len(prompts), width), np.int32)
  reads = model.cfg.architecture == "encoder_decoder"
  for row, prompt in zip(aligned, prompts):
    row[slice(len(prompt)) if reads else slice(width - len(prompt), None)] = prompt
  tokens = np.asarray(decode_prompts(
      model, params, aligned, lengths, max_new_tokens, Sampler(temperature, top_k, top_p), seed, eos_id, vocab_size,
      decoder_start_token_id, both_sides))
  return [_until(row, eos_id) for row in tokens.tolist()]


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 7, 8, 9, 10))
def decode_prompts(model: Any, params: Any, prompts_BP: jax.Array, lengths_B: jax.Array, num_tokens: int,
                   sampler: Sampler, seed: int, eos_id: int | None, vocab_size: int | None,
                   start_id: int | None, both_sides: bool = False) -> jax.Array:
  """Returns tokens_BT after prompts, or of an encoder-decoder's answers to them.

  Args:
    model, params, seed, eos_id, vocab_size, both_sides: as `generate` takes them; what follows eos_id is eos_id too.
    prompts_BP: right-aligned, with padding first; for an encoder-decoder left-aligned.
    lengths_B: tokens of each prompt.
    num_tokens: T.
    sampler: chooses each token.
    start_id: what the text of an encoder-decoder begins with.
  """
  B, P = prompts_BP.shape
  if model.cfg.architecture == "encoder_decoder":
    real_BP = (jnp.arange(P) < lengths_B[:, None]).astype(jnp.int32)
    cache = model.apply({"params": params}, prompts_BP, real_BP, max_length=1 + num_tokens, method="start")
    prompts_BP, lengths_B, options = jnp.full((B, 1), start_id, jnp.int32), jnp.ones(B, jnp.int32), {}
  else:
    # A token that is made sees all before it either way.
    cache, options = init_cache(model.cfg, B, P + num_tokens), {"both_sides": both_sides}
  step = lambda tokens, positions, cache: model.apply(
      {"params": params}, tokens, positions, cache, **options, method="step")
  return decode(step, cache, prompts_BP, lengths_B, num_tokens=num_tokens, sampler=sampler, key=jax.random.key(seed),
                eos_id=eos_id, vocab_size=vocab_size)


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
  return tokens[:tokens.index(eos_id)] if eos_id in tokens else tokens


def _check(cfg, prompts, max_new_tokens, temperature, top_k, top_p, start_id) -> None:
  if cfg.architecture not in ("decoder", "encoder_decoder") or cfg.head != "lm":
    raise UserError(f"The model is of architecture {cfg.architecture} with head {cfg.head}, but only a decoder or an "
                    "encoder_decoder with head lm makes text.")
  reads = cfg.architecture == "encoder_decoder"
  if reads and (start_id is None or not 0 <= start_id < cfg.vocab_size):
    raise UserError(f"decoder_start_token_id is {start_id}, but the text of an encoder_decoder begins with a token "
                    f"from 0 to {cfg.vocab_size - 1}; a Hugging Face folder tells it in config.json.")
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise UserError("A prompt is empty; give at least one token, such as the end-of-text token.")
  largest = max(max(prompt) for prompt in prompts)
  if largest >= cfg.vocab_size or min(min(prompt) for prompt in prompts) < 0:
    raise UserError(f"A prompt has token {largest}, but the model's vocabulary has {cfg.vocab_size} tokens; "
                    "was another tokenizer used?")
  for name, value, good, words in (("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                   ("temperature", temperature, temperature >= 0, "0 or more"),
                                   ("top_k", top_k, top_k >= 0, "0 (all) or more"),
                                   ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")):
    if not good:
      raise UserError(f"{name} is {value}, but it must be {words}.")
  longest = max(map(len, prompts))
  total = max(longest, max_new_tokens) if reads else longest + max_new_tokens
  if cfg.position == "learned" and total > cfg.max_positions:
    raise UserError(f"The {'longer of prompt' if reads else 'prompt'} and max_new_tokens make {total} tokens, but the "
                    f"model has {cfg.max_positions} learned positions; shorten one of them.")
