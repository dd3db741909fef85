"""ELECTRA in pre-training (Clark et al. 2020, arXiv 2003.10555): a generator and a discriminator, two encoders.

They share the embeddings of tokens, positions and token types (section 3.2). The norm of their sum and its projection
to the width of each are each one's own; in the released code the norm is shared too.

Shapes: B batch, T length, P masked places, D model width, V vocabulary.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmjax.config import ModelConfig, electra_parts
from lmjax.models.layers import EmbeddingTables
from lmjax.models.transformer import Transformer


class Electra(nn.Module):
  """A pair of encoders, of which the discriminator is what is kept."""
  cfg: ModelConfig

  def setup(self):
    generator, discriminator = electra_parts(self.cfg)
    self.embed = EmbeddingTables(discriminator)
    self.generator = Transformer(generator, self.embed)
    self.discriminator = Transformer(discriminator, self.embed)

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None, token_types_BT: jax.Array | None = None) -> jax.Array:
    """Returns the discriminator's logits_BT, above 0 where a token looks replaced; the rest is `Transformer`'s."""
    if self.is_initializing():
      self.generator(tokens_BT, positions_BT, segment_ids_BT, token_types_BT)
    return self.discriminator(tokens_BT, positions_BT, segment_ids_BT, token_types_BT)

  def masked_outputs(self, *args, **kwargs) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the generator's x_BPD of the tokens at some places, w_VD and bias_V; see `Transformer`."""
    return self.generator.masked_outputs(*args, **kwargs)[0]

  @property
  def dummy_inputs(self) -> tuple[jax.Array, ...]:
    """Smallest inputs that make all parameters."""
    return (jnp.zeros((1, 2), jnp.int32),)


def discriminator_of(model: Electra, params: dict) -> tuple[Transformer, dict]:
  """Returns the discriminator as a model of its own, and its parameters."""
  own = params["discriminator"]
  return Transformer(electra_parts(model.cfg)[1]), {**own, "embed": {**params["embed"], **own.get("embed", {})}}
