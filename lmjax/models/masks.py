"""Which key a query sees, described and not built: only the part that a chunk of scores needs ever is an array.

Shapes: B batch, T query length, S key length, N query heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """What is static about an attention.

  Attributes:
    causal: a query sees keys at its own position and before.
    window: a query sees this many keys at most, its own included; None means no bound.
    softcap: scores are squashed to +-this.
    alibi: scores fall linearly with distance (Press et al. 2021, arXiv 2108.12409).
    scale: scores are multiplied by this; None means 1 / sqrt(H).
    prefix: every query sees the keys of a prefix too, which are told by an array.
  """
  causal: bool = True
  window: int | None = None
  softcap: float | None = None
  alibi: bool = False
  scale: float | None = None
  prefix: bool = False

  def scale_of(self, head_dim: int) -> float:
    """Returns what scores are multiplied by."""
    return head_dim ** -0.5 if self.scale is None else self.scale

  def keys_of(self, start: int, stop: int, length: int) -> tuple[int, int]:
    """Returns the range that holds all keys which queries start..stop of a row of `length` may see."""
    low = 0 if self.window is None else max(0, start + 1 - self.window)
    return low, stop if self.causal and not self.prefix else length

  def queries_of(self, start: int, stop: int, length: int) -> tuple[int, int]:
    """Returns the range that holds all queries which may see keys start..stop of a row of `length`."""
    high = length if self.window is None else min(length, stop - 1 + self.window)
    return start if self.causal and not self.prefix else 0, high


def seen(spec: AttentionSpec, query_at: jax.Array, key_at: jax.Array,
         in_prefix: jax.Array | None = None) -> jax.Array:
  """Does the query at one position see the key at the other?

  Args:
    spec: the rule.
    query_at: integer positions.
    key_at: integer positions that broadcast against them.
    in_prefix: whether a key is of a prefix, which broadcasts likewise; None means that none is.

  Returns:
    Booleans of their common shape.
  """
  seen = jnp.ones(jnp.broadcast_shapes(query_at.shape, key_at.shape), bool)
  if spec.causal:
    seen &= key_at <= query_at if in_prefix is None else (key_at <= query_at) | in_prefix
  if spec.window is not None:
    seen &= query_at - key_at < spec.window
  return seen


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slope of each head: powers of 2^(-8/n), with every other one of 2n's filled in where n is no power of 2."""
  powers = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
  n = 2 ** int(np.log2(num_heads))
  return np.concatenate([powers(n), powers(2 * n)[::2][:num_heads - n]]).astype(np.float32)
