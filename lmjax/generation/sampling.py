"""Decoding one token at a time, in one compiled loop.

The loop knows no model: it is given `tokens_to_logits` and a cache, an opaque pytree that the function threads through.

Shapes: B batch, P prompt length, T tokens generated, V vocabulary.
"""

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Chooses tokens from logits.

  Attributes:
    temperature: logits are divided by it; 0 is greedy.
    top_k: keep the k likeliest tokens (Fan et al. 2018, arXiv 1805.04833); 0 keeps all.
    top_p: keep the likeliest tokens that together reach this probability (Holtzman et al. 2019, arXiv 1904.09751);
      1 keeps all.
  """
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __call__(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
    """Returns tokens_B."""
    if self.temperature == 0:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / self.temperature
    lowest = jnp.finfo(logits_BV.dtype).min
    if self.top_k:
      kth = jax.lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[0][:, -1:]
      logits_BV = jnp.where(logits_BV < kth, lowest, logits_BV)
    if self.top_p < 1:
      ordered = jnp.sort(logits_BV, axis=-1, descending=True)
      probs = jax.nn.softmax(ordered, axis=-1)
      # A token stays while those before it fall short of top_p; the first always does.
      count = jnp.sum(jnp.cumsum(probs, axis=-1) - probs < self.top_p, axis=-1, keepdims=True)
      last = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0), axis=-1)
      logits_BV = jnp.where(logits_BV < last, lowest, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


TokensToLogits = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def decode(tokens_to_logits: TokensToLogits, cache: Any, prompts_BP: jax.Array, lengths_B: jax.Array, *,
           num_tokens: int, sampler: Sampler, key: jax.Array, eos_id: int | None = None,
           vocab_size: int | None = None) -> jax.Array:
  """Continues prompts.

  Args:
    tokens_to_logits: (tokens_BT, positions_BT, cache) -> (logits_BV of the token after them, cache). A position of -1
      marks padding, which nobody may attend to.
    cache: empty, with room for P + num_tokens positions.
    prompts_BP: right-aligned, so that all prompts end together; padding comes first.
    lengths_B: tokens of each prompt, at least 1.
    num_tokens: T.
    sampler: chooses each token.
    key: for sampling.
    eos_id: ends a sequence; what follows it is eos_id too. None never ends.
    vocab_size: tokens at or above this are never chosen; None allows all.

  Returns:
    tokens_BT.
  """
  B, P = prompts_BP.shape
  positions = jnp.arange(P)[None] - (P - lengths_B)[:, None]
  logits, cache = tokens_to_logits(prompts_BP, jnp.maximum(positions, -1), cache)

  def choose(logits, index, done):
    if vocab_size is not None:
      logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, jnp.finfo(logits.dtype).min)
    token = sampler(logits, jax.random.fold_in(key, index))
    if eos_id is None:
      return token, done
    token = jnp.where(done, eos_id, token)
    return token, done | (token == eos_id)

  def going_on(carry):
    index, _, done, _, _ = carry
    return (index < num_tokens) & ~jnp.all(done)

  def body(carry):
    index, token, done, cache, out = carry
    logits, cache = tokens_to_logits(token[:, None], (lengths_B + index - 1)[:, None], cache)
    token, done = choose(logits, index, done)
    return index + 1, token, done, cache, out.at[:, index].set(token)

  token, done = choose(logits, 0, jnp.zeros(B, bool))
  out = jnp.full((B, num_tokens), eos_id if eos_id is not None else 0, jnp.int32).at[:, 0].set(token)
  return jax.lax.while_loop(going_on, body, (jnp.int32(1), token, done, cache, out))[-1]
