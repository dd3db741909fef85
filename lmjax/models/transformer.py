"""The composable Transformer: one block whose norm, position, MLP and order are settings, and the decoder made of it.

Shapes: B batch, T length, D model width, V vocabulary.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmjax import partitioning
from lmjax.config import ModelConfig
from lmjax.models.attention import Attention, KVCache
from lmjax.models.layers import Dropout, Embed, Mlp, Norm, param
from lmjax.partitioning import constrain


def _saves_products(primitive, *args, **params) -> bool:
  """What "products" saves: results of matrix products and attention's; norms and activations are made again."""
  # JAX's fused attention names none of its results, and its softmax sums are no output that could be named here.
  return primitive.name.startswith("dot_product_attention_fwd") or _named(primitive, *args, **params)


_named = jax.checkpoint_policies.save_only_these_names("product", "attention")

# What the backward pass finds saved of a block, beside its input; None is nothing.
REMAT_POLICIES = {"products": _saves_products, "full": None}


class Block(nn.Module):
  """Attention and MLP around a residual stream.

  pre: x + f(norm(x)), twice (GPT-2, Llama). post: norm(x + f(x)), twice (the 2017 Transformer). parallel: both read one
  norm and are added together (GPT-J).
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, KVCache | None], layer: jax.Array, positions_BT: jax.Array | None,
               segment_ids_BT: jax.Array | None) -> tuple[tuple[jax.Array, KVCache | None], None]:
    cfg = self.cfg
    x, cache = carry
    attention = lambda h: Attention(cfg, name="attention")(h, positions_BT, segment_ids_BT, cache, layer)
    mlp, drop = Mlp(cfg, name="mlp"), Dropout(cfg.dropout)
    if cfg.block == "parallel":
      h = Norm(cfg, name="norm")(x)
      a, cache = attention(h)
      x = x + drop(a + mlp(h))
    else:
      attention_norm, mlp_norm = Norm(cfg, name="attention_norm"), Norm(cfg, name="mlp_norm")
      pre = cfg.block == "pre"
      a, cache = attention(attention_norm(x) if pre else x)
      x = x + drop(a) if pre else attention_norm(x + drop(a))
      x = x + drop(mlp(mlp_norm(x))) if pre else mlp_norm(x + drop(mlp(x)))
    return (constrain(x, "batch", "length", "act_embed"), cache), None


class Transformer(nn.Module):
  """A decoder-only language model.

  The parameters of all blocks are stacked on a leading "layers" axis, whether the loop over them is rolled or unrolled
  (cfg.scan_layers), so that a checkpoint serves both.
  """
  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    self.embed = Embed(cfg)
    self.embed_dropout = Dropout(cfg.dropout)
    block = Block
    if cfg.remat_policy != "none":
      block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat_policy], prevent_cse=not cfg.scan_layers)
    self.layers = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast), length=cfg.num_layers,
        unroll=1 if cfg.scan_layers else cfg.num_layers, metadata_params={nn.PARTITION_NAME: "layers"})(cfg)
    if cfg.block != "post":
      self.final_norm = Norm(cfg)
    if not cfg.tie_embeddings:
      self.head = Head(cfg)

  def features(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None,
               cache: KVCache | None = None) -> tuple[jax.Array, KVCache | None]:
    """Returns x_BTD, what the output projection reads, and the cache with this call's keys and values."""
    if cache is not None:
      cache = cache.extend(positions_BT)
    x_BTD = self.embed_dropout(self.embed(tokens_BT, positions_BT))
    layers = jnp.arange(self.cfg.num_layers)
    (x_BTD, cache), _ = self.layers((x_BTD, cache), layers, positions_BT, segment_ids_BT)
    return (x_BTD if self.cfg.block == "post" else self.final_norm(x_BTD)), cache

  def output_embedding(self) -> jax.Array:
    """Returns the output projection w_VD."""
    return self.embed.embedding if self.cfg.tie_embeddings else self.head()

  def features_and_output(self, *args, **kwargs) -> tuple[jax.Array, jax.Array]:
    """Returns x_BTD and w_VD, for a loss that never holds all logits."""
    return self.features(*args, **kwargs)[0], self.output_embedding()

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """Returns logits_BTV in float32.

    Args:
      tokens_BT: integer tokens.
      positions_BT: positions in the document; None means 0, 1, 2, ...
      segment_ids_BT: attention stays within equal ids; None means one document a row.
    """
    return self.logits(self.features(tokens_BT, positions_BT, segment_ids_BT)[0])

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Projects features to logits_BTV in float32."""
    w_VD = self.output_embedding().astype(x_BTD.dtype)
    logits = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32)
    cap = self.cfg.logit_softcap
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return constrain(logits, "batch", "length", "act_vocab")

  def step(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """One step of decoding: logits_BV after the last of the given tokens, and the cache that now holds them."""
    x_BTD, cache = self.features(tokens_BT, positions_BT, cache=cache)
    return self.logits(x_BTD[:, -1:])[:, 0], cache


class Head(nn.Module):
  """An output projection of its own."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self) -> jax.Array:
    cfg = self.cfg
    return param(self, "kernel", nn.initializers.normal(cfg.init_std), (cfg.vocab_size, cfg.embed_dim),
                 ("vocab", "embed"))


def make_model(cfg: ModelConfig, platform: str | None = None) -> Transformer:
  """Returns the model of a config whose sizes are resolved.

  Args:
    cfg: from `config.resolve_model`.
    platform: "cpu", "gpu" or "tpu", which decides what dtype "auto" is; None means that of the mesh in use.
  """
  if cfg.dtype == "auto":
    platform = platform or partitioning.platform()
    cfg = dataclasses.replace(cfg, dtype="float32" if platform == "cpu" else "bfloat16")
  return Transformer(cfg)


def init_params(model: Transformer, key: jax.Array) -> dict:
  """Returns initial parameters, each boxed with the names of its axes."""
  return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
