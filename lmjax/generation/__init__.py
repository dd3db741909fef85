"""Text from a model."""

import functools
from typing import Any, Sequence

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.generation.sampling import Sampler, decode
from lmjax.models.attention import init_cache


def generate(model: Any, params: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, eos_id: int | None = None,
             vocab_size: int | None = None) -> list[list[int]]:
  """Continues prompts.

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

  Returns:
    The new tokens of each prompt.

  Raises:
    UserError: for an empty prompt, a token outside the vocabulary, a setting out of range, or a text longer than the
      model has positions for.
  """
  _check(model.cfg, prompts, max_new_tokens, temperature, top_k, top_p)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  # Lengths are rounded up so that prompts of nearby lengths share a compiled program.
  width = -(-int(lengths.max()) // 32) * 32
  aligned = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(aligned, prompts):
    row[width - len(prompt):] = prompt
  tokens = np.asarray(_decode(model, params, aligned, lengths, max_new_tokens, Sampler(temperature, top_k, top_p), seed,
                              eos_id, vocab_size))
  return [_until(row, eos_id) for row in tokens.tolist()]


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 7, 8))
def _decode(model, params, prompts_BP, lengths_B, num_tokens, sampler, seed, eos_id, vocab_size):
  cache = init_cache(model.cfg, prompts_BP.shape[0], prompts_BP.shape[1] + num_tokens)
  step = lambda tokens, positions, cache: model.apply({"params": params}, tokens, positions, cache, method="step")
  return decode(step, cache, prompts_BP, lengths_B, num_tokens=num_tokens, sampler=sampler, key=jax.random.key(seed),
                eos_id=eos_id, vocab_size=vocab_size)


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
  return tokens[:tokens.index(eos_id)] if eos_id in tokens else tokens


def _check(cfg, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
  if cfg.architecture != "decoder" or cfg.head != "lm":
    raise UserError(f"The model is of architecture {cfg.architecture} with head {cfg.head}, but only a decoder with "
                    "head lm goes on from a prompt; an encoder_decoder is decoded with its methods start and step.")
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
  total = max(map(len, prompts)) + max_new_tokens
  if cfg.position == "learned" and total > cfg.max_positions:
    raise UserError(f"The prompt and max_new_tokens make {total} tokens, but the model has {cfg.max_positions} learned "
                    "positions; shorten one of them.")
