"""The composable Transformer: one block whose norm, position, MLP and order are settings, and what is made of it.

Shapes: B batch, T length, D model width, E embedding width, V vocabulary.
"""

import dataclasses
import functools
import re
from typing import Any, Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmjax import partitioning
from lmjax.config import ModelConfig, fill_sizes
from lmjax.models import pipeline, remat
from lmjax.models.attention import Attention, Context, KVCache
from lmjax.models.heads import TaskHead
from lmjax.models.layers import ACTIVATIONS, Dropout, Einsum, Embed, Mlp, Norm, initial_std, param, scaled
from lmjax.models.moe import ROUTER, Moe
from lmjax.models.products import vocabulary_logits
from lmjax.models.relative import RelativeBias
from lmjax.parametrization import base_width, branch_factor, output_factor, width_ratio
from lmjax.partitioning import constrain

# The collection that Flax keeps what modules make in, for a caller who asks.
_SEEN = "intermediates"


class Block(nn.Module):
  """Attention, cross-attention where there is an encoder, and MLP around a residual stream; cfg.block orders them.

  pre: GPT-2, Llama. post: the 2017 Transformer, BERT. inner: OLMo 2. sandwich: Gemma 2. parallel: GPT-J.
  parallel_two: GPT-NeoX.

  Attributes:
    cfg: the model's settings.
    causal: whether a token sees none after it.
    cross: whether there is cross-attention.
  """
  cfg: ModelConfig
  causal: bool = True
  cross: bool = False

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, KVCache | None], layer: jax.Array,
               context: Context) -> tuple[tuple[jax.Array, KVCache | None], None]:
    cfg = self.cfg
    x, cache = carry
    norm = lambda name: Norm(cfg, name=name)
    drop = Dropout(cfg.dropout)
    mlp = functools.partial(Moe(cfg, name="mlp"), context=context) if cfg.num_experts else Mlp(cfg, name="mlp")

    def attention(h: jax.Array) -> jax.Array:
      nonlocal cache
      y, cache = Attention(cfg, self.causal, name="attention")(h, context, cache, layer)
      return y

    def cross_attention(h: jax.Array) -> jax.Array:
      nonlocal cache
      y, cache = Attention(cfg, causal=False, cross=True, name="cross_attention")(h, context, cache, layer)
      return y

    if cfg.block == "parallel":
      h = norm("norm")(x)
      x = x + self._branch(drop(attention(h) + mlp(h)))
    elif cfg.block == "parallel_two":
      x = x + self._branch(drop(attention(norm("attention_norm")(x)) + mlp(norm("mlp_norm")(x))))
    else:
      x = self._part(x, "attention", attention, norm, drop)
      if self.cross:
        x = self._part(x, "cross_attention", cross_attention, norm, drop)
      x = self._part(x, "mlp", mlp, norm, drop)
    return (_stream(x), cache), None

  def _part(self, x, name, function, norm, drop):
    block = self.cfg.block
    if block == "post":
      return norm(f"{name}_norm")(_stream(x + drop(function(x))))
    y = function(x if block == "inner" else norm(f"{name}_norm")(x))
    return _stream(x + self._branch(drop(y if block == "pre" else norm(f"{name}_out_norm")(y))))

  def _branch(self, y):
    return scaled(y, branch_factor(self.cfg))


def _stream(x: jax.Array) -> jax.Array:
  return constrain(x, "batch", "stream_length", "act_embed")


def stack(cfg: ModelConfig, num_layers: int, causal: bool = True, cross: bool = False) -> nn.Module:
  """Returns a loop over blocks: (carry, layer numbers, context) -> (carry, None)."""
  return repeat(cfg, Block, num_layers)(cfg, causal, cross)


def repeat(cfg: ModelConfig, block: type[nn.Module], num_layers: int) -> Callable[..., nn.Module]:
  """Makes of a kind of block (carry, its layer's, all layers') -> (carry, result) a loop over blocks.

  The parameters of all blocks are stacked on a leading "layers" axis, whether the loop over them is rolled or unrolled
  (cfg.scan_layers), so that a checkpoint serves both; with cfg.share_layers there is one block's.
  """
  if cfg.remat_policy != "none":
    block = nn.remat(block, policy=remat.policy(cfg), prevent_cse=not cfg.scan_layers)
  split = {"variable_broadcast": "params", "variable_axes": {ROUTER: 0, _SEEN: 0}} if cfg.share_layers else {
      "variable_axes": {"params": 0, ROUTER: 0, _SEEN: 0}, "metadata_params": {nn.PARTITION_NAME: "layers"}}
  return nn.scan(
      block, split_rngs={"params": not cfg.share_layers, "dropout": True}, in_axes=(0, nn.broadcast),
      length=num_layers, unroll=1 if cfg.scan_layers else num_layers, **split)


class Transformer(nn.Module):
  """One stack of blocks between embeddings and a head: a decoder or an encoder, for tokens or for labels.

  Attributes:
    cfg: the model's settings.
    table: holds the token embeddings where the other side of an encoder-decoder reads them too.
    cross: whether there is cross-attention to what an encoder has made.
  """
  cfg: ModelConfig
  table: nn.Module | None = None
  cross: bool = False

  def setup(self):
    cfg = self.cfg
    causal = cfg.architecture == "decoder"
    self.embed = Embed(cfg, self.table)
    self.embed_dropout = Dropout(cfg.dropout)
    if cfg.position == "relative":
      self.relative = RelativeBias(cfg, bidirectional=not causal)
    self.layers = stack(cfg, cfg.num_layers, causal, self.cross)
    if cfg.block != "post":
      self.final_norm = Norm(cfg)
    if cfg.num_future > 1:
      self.future = Future(cfg)
    if cfg.head in ("lm", "pretraining"):
      if cfg.head_transform:
        self.head_transform = HeadTransform(cfg)
      if not cfg.tie_embeddings or cfg.head_bias:
        self.head = Head(cfg)
    if cfg.head == "tasks":
      self.task_heads = {
          name: TaskHead(dataclasses.replace(cfg, head=head, num_labels=num_labels), name=f"{head_name(name)}_head")
          for name, head, num_labels in cfg.task_heads}
    elif cfg.head != "lm":
      # Each has its own name, so that a checkpoint says what its parameters are for.
      self.task_head = TaskHead(cfg, name=f"{cfg.head}_head")

  def features(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None, token_types_BT: jax.Array | None = None,
               cache: KVCache | None = None, encoded_BSD: jax.Array | None = None,
               encoded_segment_ids_BS: jax.Array | None = None,
               prefix_BT: jax.Array | None = None) -> tuple[jax.Array, KVCache | None]:
    """Returns x_BTD, what the head reads, and the cache with this call's keys and values."""
    x_BTD, cache, _ = self._run(tokens_BT, positions_BT, segment_ids_BT, token_types_BT, cache, encoded_BSD,
                                encoded_segment_ids_BS, prefix_BT)
    return self._normed(x_BTD), cache

  def _run(self, tokens_BT, positions_BT, segment_ids_BT, token_types_BT=None, cache=None, encoded_BSD=None,
           encoded_segment_ids_BS=None, prefix_BT=None) -> tuple[jax.Array, KVCache | None, Context]:
    """Returns x_BTD as the last block leaves it, the cache, and what the blocks have read."""
    if cache is not None:
      cache = cache.extend(positions_BT)
    if (self.cfg.position_offset and self.cfg.architecture == "encoder" and positions_BT is None
        and segment_ids_BT is not None):
      # Tables with rows before the first position number the real tokens; padding is at the row before that.
      real_BT = segment_ids_BT > 0
      positions_BT = jnp.where(real_BT, jnp.cumsum(real_BT, axis=1), 0) - 1
    x_BTD = self.embed_dropout(self.embed(tokens_BT, positions_BT, token_types_BT))
    context = Context(positions_BT, segment_ids_BT, self._bias(tokens_BT, positions_BT, cache), encoded_BSD,
                      encoded_segment_ids_BS, prefix_BT)
    if cache is None and not self.is_initializing() and pipeline.is_served(x_BTD.shape[0]):
      x_BTD = self._in_stages(x_BTD, context)
    else:
      (x_BTD, cache), _ = self.layers((x_BTD, cache), jnp.arange(self.cfg.num_layers), context)
    if self.is_initializing() and self.cfg.num_future > 1:
      self.future(x_BTD, context)
    return x_BTD, cache, context

  def _in_stages(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    cfg, reports = self.cfg, self.is_mutable_collection(ROUTER) and self.cfg.num_experts

    def layers(params, x, numbers, context, key):
      kind = repeat(cfg, Block, len(numbers))
      some = kind(cfg, cfg.architecture == "decoder", self.cross, parent=None)
      ((x, _), _), reported = some.apply(
          {"params": params}, (x, None), numbers, context, rngs=None if key is None else {"dropout": key},
          mutable=[ROUTER] if reports else [])
      return x, reported[ROUTER]["mlp"]["stats"] if reports else {}

    # With none, what passes between groups of layers is still made again: else each tick would save its parameters.
    kept = dataclasses.replace(cfg, remat_policy="products") if cfg.remat_policy == "none" else cfg
    x_BTD, stats = pipeline.run(
        layers, self.layers.variables["params"], x_BTD, context,
        self.make_rng("dropout") if self.has_rng("dropout") else None, cfg.stage_microbatches, cfg.stage_repeats,
        functools.partial(jax.checkpoint, policy=remat.policy(kept)))
    if reports:
      self.sow(ROUTER, "stats", stats, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return x_BTD

  def _normed(self, x: jax.Array) -> jax.Array:
    return x if self.cfg.block == "post" else self.final_norm(x)

  def _bias(self, tokens_BT, positions_BT, cache) -> jax.Array | None:
    if self.cfg.position != "relative":
      return None
    positions = jnp.arange(tokens_BT.shape[1])[None] if positions_BT is None else positions_BT
    return self.relative(positions, positions if cache is None else cache.positions)

  def output_embedding(self) -> jax.Array:
    """Returns the output projection w_VD."""
    return self.embed.embedding if self.cfg.tie_embeddings else self.head.kernel

  def features_and_output(self, *args, **kwargs) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns x_BTD, w_VD and bias_V, or None for no bias, for a loss that never holds all logits."""
    return self._output(self.features(*args, **kwargs)[0])

  def future_outputs(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
                     segment_ids_BT: jax.Array | None = None) -> tuple[tuple, jax.Array]:
    """Returns the same for the next token, and x_KBTD for each of those further ahead."""
    x_BTD, _, context = self._run(tokens_BT, positions_BT, segment_ids_BT)
    x_KBTD = self._transformed(self._normed(self.future(x_BTD, context)))
    return self._output(self._normed(x_BTD)), x_KBTD

  def masked_outputs(self, tokens_BT: jax.Array, places_BP: jax.Array, segment_ids_BT: jax.Array | None = None,
                     token_types_BT: jax.Array | None = None) -> tuple[tuple, jax.Array | None]:
    """Returns the same of the tokens at some places, and the logits of a pair of sentences where the head has them."""
    x_BTD = self.features(tokens_BT, None, segment_ids_BT, token_types_BT)[0]
    made = self.task_head(x_BTD, segment_ids_BT) if self.cfg.head == "pretraining" else None
    return self._output(jnp.take_along_axis(x_BTD, places_BP[..., None], axis=1)), made

  def _output(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    return self._transformed(x_BTD), self.output_embedding(), self.head.bias if self.cfg.head_bias else None

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None, token_types_BT: jax.Array | None = None) -> Any:
    """Returns what the head makes, in float32: logits_BTV, or what `heads.TaskHead` says.

    The pretraining head makes a pair: logits_BTV, and the sentences'; several tasks' heads a dict by task.

    Args:
      tokens_BT: integer tokens. For the choice head all arguments may be [B, choices, T], and the logits are then
        [B, choices].
      positions_BT: positions in the document; None means 0, 1, 2, ...
      segment_ids_BT: attention stays within equal ids, which count from 1; 0 is padding. None means one document a row.
      token_types_BT: rows of the token type embedding; None means type 0.
    """
    *rows, length = tokens_BT.shape
    if self.cfg.head == "choice":
      flat = lambda x: None if x is None else x.reshape(-1, length)
      tokens_BT, positions_BT, segment_ids_BT, token_types_BT = map(
          flat, (tokens_BT, positions_BT, segment_ids_BT, token_types_BT))
    x_BTD = self.features(tokens_BT, positions_BT, segment_ids_BT, token_types_BT)[0]
    if self.cfg.head == "lm":
      return self.logits(x_BTD)
    if self.cfg.head == "tasks":
      return {name: head(x_BTD, segment_ids_BT) for name, head in self.task_heads.items()}
    made = self.task_head(x_BTD, segment_ids_BT)
    if self.cfg.head == "pretraining":
      return self.logits(x_BTD), made
    return made.reshape(rows) if self.cfg.head == "choice" else made

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Projects features to logits_BTV in float32."""
    return constrain(vocabulary_logits(*self._output(x_BTD), self.cfg.logit_softcap), "batch", "length", "act_vocab")

  def step(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache,
           both_sides: bool = False) -> tuple[jax.Array, KVCache]:
    """One step of decoding: logits_BV after the last of the given tokens, and the cache that now holds them.

    With both_sides the given tokens see each other whatever their order, as those of a prefix do.
    """
    prefix_BS = jnp.ones(cache.positions.shape, bool) if both_sides else None
    x_BTD, cache = self.features(tokens_BT, positions_BT, cache=cache, prefix_BT=prefix_BS)
    return self.logits(x_BTD[:, -1:])[:, 0], cache

  def _transformed(self, x_BTD: jax.Array) -> jax.Array:
    if self.cfg.head_transform:
      x_BTD = self.head_transform(x_BTD)
    factor = output_factor(self.cfg) * (base_width(self.cfg) ** -0.5 if self.cfg.scale_logits else 1.0)
    return scaled(x_BTD, factor)

  @property
  def dummy_inputs(self) -> tuple[jax.Array, ...]:
    """Smallest inputs that make all parameters."""
    return (jnp.zeros((1, 2), jnp.int32),)


def head_name(task: str) -> str:
  """Returns what the head of a task is called in the parameters, whose paths have slashes between their parts."""
  return re.sub(r"\W", "_", task)


class Future(nn.Module):
  """A block side by side for each token beyond the next one; their parameters are stacked like those of layers."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    """Returns x_KBTD, K being the tokens beyond the next."""
    cfg = self.cfg
    blocks = nn.vmap(Block, variable_axes={"params": 0, ROUTER: 0}, split_rngs={"params": True, "dropout": True},
                     in_axes=((None, None), None, None), axis_size=cfg.num_future - 1,
                     metadata_params={nn.PARTITION_NAME: "layers"})
    (x_KBTD, _), _ = blocks(cfg, name="layers")((x_BTD, None), jnp.int32(cfg.num_layers - 1), context)
    return x_KBTD


class HeadTransform(nn.Module):
  """What stands before the output projection of a masked language model: dense, activation, norm."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Returns x_BTE, of the embeddings' width."""
    cfg = self.cfg
    dense = Einsum(cfg, "BTD,DE->BTE", (cfg.embed_dim, cfg.embedding_dim), ("embed", "embedding"), cfg.init_std, True,
                   name="dense")
    return Norm(cfg, name="norm")(ACTIVATIONS[cfg.activation](dense(x_BTD)))


class Head(nn.Module):
  """What the output projection has of its own: a kernel, unless it is the embedding's, and a bias."""
  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    width = cfg.embedding_dim if cfg.head_transform else cfg.embed_dim
    if not cfg.tie_embeddings:
      init = nn.initializers.normal(initial_std(cfg, width / width_ratio(cfg)))
      self.kernel = param(self, "kernel", init, (cfg.vocab_size, width),
                          ("vocab", "embed" if width == cfg.embed_dim else "embedding"))
    if cfg.head_bias:
      self.bias = param(self, "bias", nn.initializers.zeros, (cfg.vocab_size,), ("vocab",))


def make_model(cfg: ModelConfig, platform: str | None = None) -> nn.Module:
  """Returns the model of a config whose sizes are resolved.

  Args:
    cfg: with a vocabulary and, for learned positions, their number.
    platform: "cpu", "gpu" or "tpu", which decides what dtype "auto" is; None means that of the mesh in use.
  """
  cfg = fill_sizes(cfg)
  if cfg.dtype == "auto":
    platform = platform or partitioning.platform()
    cfg = dataclasses.replace(cfg, dtype="float32" if platform == "cpu" else "bfloat16")
  if cfg.architecture == "encoder_decoder":
    from lmjax.models.encoder_decoder import EncoderDecoder  # Is made of what stands here.
    return EncoderDecoder(cfg)
  if cfg.architecture == "xlnet":
    from lmjax.models.xlnet import XLNet  # Which is made of parts of this file.
    return XLNet(cfg)
  if cfg.architecture == "electra":
    from lmjax.models.electra import Electra  # Is made of what stands here.
    return Electra(cfg)
  return Transformer(cfg)


def init_params(model: nn.Module, key: jax.Array) -> dict:
  """Returns initial parameters, each boxed with the names of its axes."""
  return model.init(key, *model.dummy_inputs)["params"]
