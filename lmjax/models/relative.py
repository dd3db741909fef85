"""Relative positions as buckets of distances (Raffel et al. 2019, arXiv 1910.10683, section 2.1).

Shapes: B batch, T query length, S key length, N query heads.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ModelConfig
from lmjax.models.layers import initial_std, param
from lmjax.parametrization import base_width
from lmjax.partitioning import constrain


def bucket_of_distances(num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each distance from 0 to `max_distance`; all further ones share the last.

  The first half of the buckets hold one distance each, the others ranges that grow by a common factor.
  """
  exact = num_buckets // 2
  distances = np.arange(max_distance + 1)
  # In float32, as Hugging Face computes it, so that a distance on the border of two ranges falls into the same one.
  ratios = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
  far = exact + (ratios / np.float32(np.log(max_distance / exact)) * np.float32(num_buckets - exact)).astype(int)
  return np.where(distances < exact, distances, np.minimum(far, num_buckets - 1)).astype(np.int32)


def relative_buckets(cfg: ModelConfig, query_at: jax.Array, key_at: jax.Array, bidirectional: bool) -> jax.Array:
  """Returns the bucket of a key's position as a query sees it.

  Args:
    cfg: with the number of buckets and the distance from which on all share one.
    query_at: integer positions.
    key_at: integer positions that broadcast against them.
    bidirectional: whether keys after the query have half of the buckets for themselves; else all of them share the
      bucket of distance 0.

  Returns:
    Integers from 0 to cfg.relative_buckets - 1 of the common shape.
  """
  ahead = key_at - query_at
  each = cfg.relative_buckets // 2 if bidirectional else cfg.relative_buckets
  distance = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)
  table = jnp.asarray(bucket_of_distances(each, cfg.relative_max_distance))
  buckets = table[jnp.minimum(distance, cfg.relative_max_distance)]
  return buckets + jnp.where(ahead > 0, each, 0) if bidirectional else buckets


class RelativeBias(nn.Module):
  """What each head adds to its scores for each bucket; one table serves all layers of a stack.

  Attributes:
    cfg: the model's settings.
    bidirectional: whether a token also sees those after it.
  """
  cfg: ModelConfig
  bidirectional: bool

  @nn.compact
  def __call__(self, query_positions_BT: jax.Array, key_positions_BS: jax.Array) -> jax.Array:
    """Returns bias_BNTS in float32; B is 1 where it is that of both positions."""
    cfg = self.cfg
    init = nn.initializers.normal(initial_std(cfg, base_width(cfg)))
    table = param(self, "bias", init, (cfg.relative_buckets, cfg.num_heads), ("buckets", "heads"))
    buckets_BTS = relative_buckets(cfg, query_positions_BT[:, :, None], key_positions_BS[:, None], self.bidirectional)
    bias_BNTS = table.astype(jnp.float32)[buckets_BTS].transpose(0, 3, 1, 2)
    return constrain(bias_BNTS, None if bias_BNTS.shape[0] == 1 else "batch", "act_heads", None, None)
