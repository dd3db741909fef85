"""What a model ends in when it predicts no next token: small maps of the features to labels, bounds or a vector.

Which one it is and how it is made are settings: head, pooler, num_labels and head_bias.

Shapes: B batch, T length, D model width, L labels.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmjax.config import ModelConfig
from lmjax.models.layers import ACTIVATIONS, Dropout, Einsum

_POOLERS = {**ACTIVATIONS, "tanh": jnp.tanh}


class TaskHead(nn.Module):
  """Every head but the language model's, by cfg.head."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None = None) -> Any:
    """Returns what the head makes of the features, in float32.

    Args:
      x_BTD: the features.
      segment_ids_BT: 0 is padding; None means there is none.

    Returns:
      sequence: label logits_BL. choice: a logit for each row, [B]. sentence, pretraining: the two logits [B, 2] of
      whether a second sentence follows the first. token: label logits_BTL. span: logits [B, T] of the first and of the
      last token of an answer. replaced: a logit for each token, [B, T], above 0 where it looks replaced. pooled: the
      mean over the real tokens, of length 1, [B, D] (Reimers and Gurevych 2019, arXiv 1908.10084). none: x_BTD, and
      beside it the pooler's vector_BD where there is a pooler.
    """
    cfg = self.cfg
    if cfg.head == "pooled":
      return mean_vector(x_BTD, segment_ids_BT)
    if cfg.head == "token":
      return self._out(x_BTD, cfg.num_labels)
    if cfg.head == "span":
      start, end = jnp.moveaxis(self._out(x_BTD, 2), -1, 0)
      return start, end
    if cfg.head == "replaced":
      h_BTD = ACTIVATIONS[cfg.activation](self._dense("dense", x_BTD))
      return self._out(h_BTD, 1)[..., 0]
    if cfg.head == "none" and cfg.pooler == "none":
      return x_BTD.astype(jnp.float32)
    vector_BD = sequence_vector(x_BTD, segment_ids_BT, last=cfg.architecture == "decoder")
    if cfg.pooler != "none":
      vector_BD = _POOLERS[cfg.pooler](self._dense("pooler", vector_BD))
    if cfg.head == "none":
      return x_BTD.astype(jnp.float32), vector_BD.astype(jnp.float32)
    if cfg.head == "choice":
      return self._out(vector_BD, 1)[..., 0]
    return self._out(vector_BD, cfg.num_labels if cfg.head == "sequence" else 2)

  def _dense(self, name: str, x: jax.Array) -> jax.Array:
    width = self.cfg.embed_dim
    equation = "BTD,DE->BTE" if x.ndim == 3 else "BD,DE->BE"
    return Einsum(self.cfg, equation, (width, width), ("embed", "pooled"), self.cfg.init_std, True, name=name)(x)

  def _out(self, x: jax.Array, num_labels: int) -> jax.Array:
    cfg = self.cfg
    equation = "BTD,DL->BTL" if x.ndim == 3 else "BD,DL->BL"
    out = Einsum(cfg, equation, (cfg.embed_dim, num_labels), ("embed", "labels"), cfg.init_std, cfg.head_bias,
                 name="out")
    return out(Dropout(cfg.dropout)(x)).astype(jnp.float32)


def sequence_vector(x_BTD: jax.Array, segment_ids_BT: jax.Array | None, last: bool) -> jax.Array:
  """Returns the features of a sequence's first real token, or of its last one, which alone a decoder lets see all."""
  if segment_ids_BT is None:
    return x_BTD[:, -1 if last else 0]
  real_BT = segment_ids_BT > 0
  at_B = jnp.argmax(jnp.arange(x_BTD.shape[1]) * real_BT if last else real_BT, axis=1)
  return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]


def mean_vector(x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
  """Returns the mean over the real tokens, scaled to length 1, in float32."""
  x_BTD = x_BTD.astype(jnp.float32)
  real_BT = jnp.ones(x_BTD.shape[:2]) if segment_ids_BT is None else (segment_ids_BT > 0).astype(jnp.float32)
  mean_BD = jnp.einsum("BTD,BT->BD", x_BTD, real_BT) / jnp.maximum(real_BT.sum(1, keepdims=True), 1)
  return mean_BD * jax.lax.rsqrt(jnp.maximum(jnp.square(mean_BD).sum(-1, keepdims=True), 1e-24))
