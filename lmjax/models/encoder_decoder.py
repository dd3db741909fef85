"""The encoder-decoder: two Transformers, of which the decoder's blocks also read what the encoder has made.

It serves the 2017 Transformer (Vaswani et al., arXiv 1706.03762), T5 and BART, which are presets.

Shapes: B batch, S encoder length, T decoder length, D model width, V vocabulary.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmjax.config import ModelConfig
from lmjax.models.attention import KVCache, init_cache
from lmjax.models.layers import TokenTable
from lmjax.models.transformer import Transformer


class EncoderDecoder(nn.Module):
  """A model of a sequence that reads another."""
  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    if cfg.share_embeddings:
      self.embed = TokenTable(cfg)
    table = self.embed if cfg.share_embeddings else None
    # The encoder ends in no projection to the vocabulary.
    self.encoder = Transformer(
        dataclasses.replace(cfg, architecture="encoder", tie_embeddings=True, head_bias=False, head_transform=False),
        table)
    self.decoder = Transformer(
        dataclasses.replace(cfg, architecture="decoder", num_layers=cfg.num_decoder_layers), table, cross=True)

  def __call__(self, encoder_tokens_BS: jax.Array, decoder_tokens_BT: jax.Array,
               encoder_positions_BS: jax.Array | None = None, encoder_segment_ids_BS: jax.Array | None = None,
               decoder_positions_BT: jax.Array | None = None,
               decoder_segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """Returns logits_BTV in float32.

    Args:
      encoder_tokens_BS: integer tokens of the text that is read.
      decoder_tokens_BT: integer tokens of the text that is written.
      encoder_positions_BS: positions in the document; None means 0, 1, 2, ...
      encoder_segment_ids_BS: attention stays within equal ids, which count from 1; 0 is padding. Cross-attention goes
        to the same id of the other side. None means that every token there is seen.
      decoder_positions_BT: as for the encoder.
      decoder_segment_ids_BT: as for the encoder; None means that all are of segment 1.
    """
    encoded_BSD = self.encode(encoder_tokens_BS, encoder_positions_BS, encoder_segment_ids_BS)
    return self.decode(decoder_tokens_BT, encoded_BSD, decoder_positions_BT, decoder_segment_ids_BT,
                       encoder_segment_ids_BS)

  def encode(self, tokens_BS: jax.Array, positions_BS: jax.Array | None = None,
             segment_ids_BS: jax.Array | None = None) -> jax.Array:
    """Returns encoded_BSD, what the decoder reads of a text."""
    if positions_BS is None and self.cfg.position == "learned":
      # A lone encoder whose table begins after some rows numbers the real tokens (RoBERTa); BART numbers padding too.
      positions_BS = jnp.arange(tokens_BS.shape[1])[None]
    return self.encoder.features(tokens_BS, positions_BS, segment_ids_BS)[0]

  def decode(self, tokens_BT: jax.Array, encoded_BSD: jax.Array, positions_BT: jax.Array | None = None,
             segment_ids_BT: jax.Array | None = None, encoder_segment_ids_BS: jax.Array | None = None) -> jax.Array:
    """Returns logits_BTV in float32 after what `encode` has made."""
    x_BTD, _ = self.decoder.features(tokens_BT, positions_BT, segment_ids_BT, encoded_BSD=encoded_BSD,
                                     encoded_segment_ids_BS=encoder_segment_ids_BS)
    return self.decoder.logits(x_BTD)

  def features_and_output(
      self, encoder_tokens_BS: jax.Array, decoder_tokens_BT: jax.Array, encoder_positions_BS: jax.Array | None = None,
      encoder_segment_ids_BS: jax.Array | None = None, decoder_positions_BT: jax.Array | None = None,
      decoder_segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns what `Transformer.features_and_output` does of the decoder, and takes what `__call__` does."""
    encoded_BSD = self.encode(encoder_tokens_BS, encoder_positions_BS, encoder_segment_ids_BS)
    return self.decoder.features_and_output(
        decoder_tokens_BT, decoder_positions_BT, decoder_segment_ids_BT, encoded_BSD=encoded_BSD,
        encoded_segment_ids_BS=encoder_segment_ids_BS)

  def start(self, encoder_tokens_BS: jax.Array, encoder_segment_ids_BS: jax.Array | None = None, *,
            max_length: int) -> KVCache:
    """Begins decoding step by step.

    Args:
      encoder_tokens_BS: the texts to read, one a row.
      encoder_segment_ids_BS: 0 for padding and 1 for the rest; None means that there is no padding.
      max_length: slots for the text that is written.

    Returns:
      A cache for `step`, empty but for each layer's keys and values of the encoded texts, which are made only here.
    """
    B, S = encoder_tokens_BS.shape
    encoded_BSD = self.encode(encoder_tokens_BS, segment_ids_BS=encoder_segment_ids_BS)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    if encoder_segment_ids_BS is not None:
      positions = jnp.where(encoder_segment_ids_BS > 0, positions, -1)
    cache = init_cache(self.cfg, B, max_length)
    cache = cache.replace(cross=init_cache(self.cfg, B, S).extend(positions))
    # The decoder runs over no tokens: of its blocks only the maps of the encoded texts have something to do.
    nothing = jnp.zeros((B, 0), jnp.int32)
    return self.decoder.features(nothing, nothing, cache=cache, encoded_BSD=encoded_BSD)[1]

  def step(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """One step of decoding: logits_BV after the last of the given tokens, and the cache that now holds them."""
    return self.decoder.step(tokens_BT, positions_BT, cache)

  @property
  def dummy_inputs(self) -> tuple[jax.Array, ...]:
    """Smallest inputs that make all parameters."""
    return jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32)
