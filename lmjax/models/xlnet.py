"""XLNet (Yang et al. 2019, arXiv 1906.08237): two streams of attention over relative positions, and a memory.

The content stream is an encoder's. The query stream stands for tokens to be predicted: it knows where they are and not
what they are, reads the content stream's keys and values, and shares all its parameters. Relative positions and the
memory of earlier segments are Transformer-XL's (Dai et al. 2019, arXiv 1901.02860).

Shapes: B batch, T length, M memory length, S = M + T, P targets, R distances, G directions of reading, L layers,
D model width, N heads, H head width, V vocabulary.
"""

from flax import linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from lmjax.config import ModelConfig
from lmjax.models.layers import Dropout, Einsum, Embed, Mlp, Norm, param, residual_std, scaled
from lmjax.models.masks import AttentionSpec, seen
from lmjax.models.products import vocabulary_logits
from lmjax.models.rope import rotary_periods
from lmjax.models.transformer import Head, repeat
from lmjax.parametrization import attention_scale, output_factor
from lmjax.partitioning import constrain


@struct.dataclass
class Context:
  """What all blocks read besides the two streams.

  Attributes:
    distances_GRD: encodings of the distances from query to key, S first, for each direction of reading.
    query_sees_BTS: which keys the query of the query stream at a place sees; B may be 1.
    content_sees_BTS: the same of the content stream, where a token sees itself in any case.
    other_type_BTS: whether query and key differ in token type; None where all have one.
    targets_BPT: one-hot places of the targets; None where there is no query stream.
    reversed_B: 1 where a text is read from end to start, else 0; what cfg.reverse_half asks for.
  """
  distances_GRD: jax.Array
  query_sees_BTS: jax.Array
  content_sees_BTS: jax.Array
  other_type_BTS: jax.Array | None
  targets_BPT: jax.Array | None
  reversed_B: jax.Array


class HeadBias(nn.Module):
  """Adds to queries a vector of each head's own, as one of the three kinds of scores has it."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, q_BTNH: jax.Array) -> jax.Array:
    cfg = self.cfg
    bias = param(self, "bias", nn.initializers.normal(cfg.init_std), (cfg.num_heads, cfg.head_dim),
                 ("heads", "head_dim"))
    return q_BTNH + bias.astype(q_BTNH.dtype)


class RelativeAttention(nn.Module):
  """Attention whose scores are of contents, of distances, and of whether the token types are the same."""
  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    shape, axes = (cfg.embed_dim, cfg.num_heads, cfg.head_dim), ("embed", "heads", "head_dim")
    into = lambda: Einsum(cfg, "BTD,DNH->BTNH", shape, axes, cfg.init_std, cfg.qkv_bias)
    self.query, self.key, self.value = into(), into(), into()
    self.distance = Einsum(cfg, "GRD,DNH->GRNH", shape, axes, cfg.init_std, False)
    self.out = Einsum(cfg, "BTNH,NHD->BTD", (*shape[1:], shape[0]), (*axes[1:], axes[0]), residual_std(cfg),
                      cfg.out_bias)
    self.for_content, self.for_distance, self.for_type = HeadBias(cfg), HeadBias(cfg), HeadBias(cfg)
    of_types = lambda name: param(self, name, nn.initializers.normal(cfg.init_std), shape[1:], axes[1:])
    self.same_type, self.other_type = of_types("same_type"), of_types("other_type")

  def __call__(self, x_BTD: jax.Array, g_BPD: jax.Array | None, memory_BMD: jax.Array | None,
               context: Context) -> tuple[jax.Array, jax.Array | None]:
    """Returns what attention makes of the content stream and, where there is one, of the query stream."""
    source_BSD = x_BTD if memory_BMD is None else jnp.concatenate([memory_BMD.astype(x_BTD.dtype), x_BTD], axis=1)
    k_BSNH = constrain(self.key(source_BSD), "batch", "length", "act_heads", None)
    v_BSNH = constrain(self.value(source_BSD), "batch", "length", "act_heads", None)
    r_BRNH = self.distance(context.distances_GRD)
    if r_BRNH.shape[0] == 2:
      r_BRNH = r_BRNH[context.reversed_B]

    def attend(q_BTNH: jax.Array, sees_BTS: jax.Array) -> jax.Array:
      q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", None)
      scores = self._scores(q_BTNH, k_BSNH, r_BRNH, context)
      scores = jnp.where(sees_BTS[:, None], scores, jnp.finfo(jnp.float32).min)
      weights = jax.nn.softmax(scores, axis=-1).astype(v_BSNH.dtype)
      y_BTNH = checkpoint_name(jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH), "attention")
      return constrain(y_BTNH, "batch", "length", "act_heads", None)

    x_BTD = self.out(attend(self.query(x_BTD), context.content_sees_BTS))
    if g_BPD is not None:
      q_BTNH = jnp.einsum("BPNH,BPT->BTNH", self.query(g_BPD), context.targets_BPT)
      y_BTNH = attend(q_BTNH, context.query_sees_BTS)
      g_BPD = self.out(jnp.einsum("BTNH,BPT->BPNH", y_BTNH, context.targets_BPT))
    return x_BTD, g_BPD

  def _scores(self, q_BTNH: jax.Array, k_BSNH: jax.Array, r_BRNH: jax.Array, context: Context) -> jax.Array:
    """Returns scores_BNTS in float32."""
    product = lambda equation, q, k: jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    scores = product("BTNH,BSNH->BNTS", self.for_content(q_BTNH), k_BSNH)
    scores += shift(product("BTNH,BRNH->BNTR", self.for_distance(q_BTNH), r_BRNH), k_BSNH.shape[1])
    q_BTNH = self.for_type(q_BTNH)
    if context.other_type_BTS is not None:
      same, other = (product("BTNH,NH->BNT", q_BTNH, x.astype(q_BTNH.dtype)) for x in (self.same_type, self.other_type))
      scores += jnp.where(context.other_type_BTS[:, None], other[..., None], same[..., None])
    scores *= AttentionSpec(scale=attention_scale(self.cfg)).scale_of(self.cfg.head_dim)
    self.sow("intermediates", "scores", scores)
    return scores


def shift(scores_BNTR: jax.Array, num_keys: int) -> jax.Array:
  """Picks the score of each query and key from those of each query and distance.

  The distance from query t to key s stands at r = T - t + s. Read as rows of T, without the first of them, the scores
  of a query begin where they should. Beyond the last distance stands what belongs to another query.
  """
  B, N, T, R = scores_BNTR.shape
  return scores_BNTR.reshape(B, N, R, T)[:, :, 1:].reshape(B, N, T, R - 1)[..., :num_keys]


def _is_reversed(batch_size: int) -> jax.Array:
  """Returns for each row of a batch 1 where it is read from end to start: in the second half."""
  return (jnp.arange(batch_size) >= (batch_size + 1) // 2).astype(jnp.int32)


class XLNetBlock(nn.Module):
  """Attention and MLP, each followed by a norm, over both streams."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, streams: tuple[jax.Array, jax.Array | None], memory_BMD: jax.Array | None,
               context: Context) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array]:
    """Returns the streams, and the layer's memory for the next segment."""
    cfg = self.cfg
    attention_norm, mlp_norm = Norm(cfg, name="attention_norm"), Norm(cfg, name="mlp_norm")
    mlp, drop = Mlp(cfg, name="mlp"), Dropout(cfg.dropout)

    def finish(x: jax.Array, y: jax.Array) -> jax.Array:
      x = attention_norm(x + drop(y))
      return constrain(mlp_norm(x + drop(mlp(x))), "batch", "length", "act_embed")

    x_BTD, g_BPD = streams
    y_BTD, h_BPD = RelativeAttention(cfg, name="attention")(x_BTD, g_BPD, memory_BMD, context)
    remembered = remember(cfg, x_BTD, memory_BMD)
    return (finish(x_BTD, y_BTD), None if g_BPD is None else finish(g_BPD, h_BPD)), remembered


def remember(cfg: ModelConfig, x_BTD: jax.Array, memory_BMD: jax.Array | None) -> jax.Array:
  """Returns the memory that a segment leaves to the next, through which no gradient flows."""
  x_BTD = x_BTD[:, :cfg.memory_reuse_len]
  if memory_BMD is not None:
    x_BTD = jnp.concatenate([memory_BMD.astype(x_BTD.dtype), x_BTD], axis=1)
  return jax.lax.stop_gradient(x_BTD if cfg.memory_len is None else x_BTD[:, -cfg.memory_len:])


class XLNet(nn.Module):
  """XLNet; with cfg.unidirectional, Transformer-XL."""
  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    self.embed = Embed(cfg)
    # What the query stream starts from, in place of the token.
    self.target = param(self, "target", nn.initializers.normal(cfg.init_std), (cfg.embed_dim,), ("embed",))
    self.embed_dropout = Dropout(cfg.dropout)
    self.layers = repeat(cfg, XLNetBlock, cfg.num_layers)(cfg)
    if cfg.head == "lm" and (not cfg.tie_embeddings or cfg.head_bias):
      self.head = Head(cfg)

  def features(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None,
               token_types_BT: jax.Array | None = None, hidden_BTT: jax.Array | None = None,
               targets_BP: jax.Array | None = None, memory_LBMD: jax.Array | None = None,
               has_memory_B: jax.Array | None = None,
               reversed_B: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns x_BTD, or x_BPD of the targets, and the memory_LBMD for the next segment.

    Args:
      has_memory_B: which rows see the memory; None means all.
      reversed_B: with cfg.reverse_half, 1 where a text is read from end to start; None means the second half.
      others: see `__call__`.
    """
    cfg = self.cfg
    B, T = tokens_BT.shape
    M = 0 if memory_LBMD is None else memory_LBMD.shape[2]
    x_BTD, g_BPD = self.embed_dropout(self.embed(tokens_BT, None)), None
    content_BTS, query_BTS = which_are_seen(cfg, T, M, segment_ids_BT, hidden_BTT, has_memory_B)
    other_BTS = targets_BPT = None
    if token_types_BT is not None:
      keys_BS = jnp.pad(token_types_BT, ((0, 0), (M, 0)))  # What is remembered counts as of type 0.
      other_BTS = token_types_BT[:, :, None] != keys_BS[:, None, :]
    if targets_BP is not None:
      targets_BPT = jax.nn.one_hot(targets_BP, T, dtype=x_BTD.dtype)
      target = jnp.broadcast_to(self.target.astype(x_BTD.dtype), (*targets_BP.shape, cfg.embed_dim))
      g_BPD = self.embed_dropout(target)
    distances_GRD = self.embed_dropout(encode_distances(cfg, T, M + T).astype(x_BTD.dtype))
    reversed_B = _is_reversed(B) if reversed_B is None else reversed_B
    context = Context(distances_GRD, query_BTS, content_BTS, other_BTS, targets_BPT, reversed_B)
    (x_BTD, g_BPD), memory_LBMD = self.layers((x_BTD, g_BPD), memory_LBMD, context)
    return x_BTD if g_BPD is None else g_BPD, memory_LBMD

  def masked_outputs(
      self, tokens_BT: jax.Array, targets_BP: jax.Array, *, before_BT: jax.Array | None = None,
      has_before_B: jax.Array | None = None, reversed_B: jax.Array | None = None,
      **inputs: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns x_BPD of the targets, w_VD and bias_V, or None for no bias, for a loss that never holds all logits.

    Args:
      tokens_BT, targets_BP: see `__call__`.
      before_BT: a text before, which is read first, and for its memory alone; None is none.
      has_before_B: which rows have one; None means all.
      reversed_B: see `features`.
      **inputs: other inputs of `features`.
    """
    memory_LBMD = None
    if before_BT is not None:
      memory_LBMD = self.features(before_BT, reversed_B=reversed_B)[1]
    x_BPD, _ = self.features(tokens_BT, targets_BP=targets_BP, memory_LBMD=memory_LBMD, has_memory_B=has_before_B,
                             reversed_B=reversed_B, **inputs)
    return self._scaled(x_BPD), self.output_embedding(), self.head.bias if self.cfg.head_bias else None

  @property
  def dummy_inputs(self) -> tuple[jax.Array, ...]:
    """Smallest inputs that make all parameters."""
    return (jnp.zeros((1, 2), jnp.int32),)

  def output_embedding(self) -> jax.Array:
    """Returns the output projection w_VD."""
    return self.embed.embedding if self.cfg.tie_embeddings else self.head.kernel

  def __call__(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None,
               token_types_BT: jax.Array | None = None, hidden_BTT: jax.Array | None = None,
               targets_BP: jax.Array | None = None, memory_LBMD: jax.Array | None = None) -> jax.Array:
    """Returns logits in float32, [B, T, V], or of the targets, [B, P, V]; without a head, the features.

    Args:
      tokens_BT: integer tokens.
      segment_ids_BT: attention stays within equal ids, which count from 1, and in the memory; 0 is padding, which
        nothing sees but itself. None means one document a row.
      token_types_BT: attention knows whether two tokens are of one type; None means that all are.
      hidden_BTT: the permutation's mask: True where the first token may not see the second. The content stream sees
        itself in any case. None hides none.
      targets_BP: places of the tokens to predict; -1 is none. None has no query stream: the result is the content's.
      memory_LBMD: what `segment` has returned for the text before.
    """
    return self.segment(tokens_BT, segment_ids_BT=segment_ids_BT, token_types_BT=token_types_BT, hidden_BTT=hidden_BTT,
                        targets_BP=targets_BP, memory_LBMD=memory_LBMD)[0]

  def segment(self, tokens_BT: jax.Array, **inputs: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """One segment of a longer text: the same as `__call__`, and the memory_LBMD to give with the next."""
    x, memory_LBMD = self.features(tokens_BT, **inputs)
    return self.logits(x) if self.cfg.head == "lm" else x, memory_LBMD

  def _scaled(self, x: jax.Array) -> jax.Array:
    return scaled(x, output_factor(self.cfg))

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Projects features to logits_BTV in float32."""
    bias_V = self.head.bias if self.cfg.head_bias else None
    logits_BTV = vocabulary_logits(self._scaled(x_BTD), self.output_embedding(), bias_V)
    return constrain(logits_BTV, "batch", "length", "act_vocab")


def which_are_seen(cfg: ModelConfig, length: int, memory_len: int, segment_ids_BT: jax.Array | None,
                   hidden_BTT: jax.Array | None,
                   has_memory_B: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns which keys, those of the memory first, are seen by the content and by the query stream.

  Args:
    cfg: of the model.
    length: T.
    memory_len: M.
    segment_ids_BT: None means one document.
    hidden_BTT: what a token may not see.
    has_memory_B: which rows see the memory; None means all.

  Returns:
    Two arrays of booleans [B, T, S] or [1, T, S].
  """
  query_at, key_at = jnp.arange(memory_len, memory_len + length)[:, None], jnp.arange(memory_len + length)[None]
  spec = AttentionSpec(causal=cfg.unidirectional, window=memory_len + 1 if cfg.memory_same_len else None)
  query = seen(spec, query_at, key_at)[None]
  allowed = jnp.ones((1, length, length), bool)
  if segment_ids_BT is not None:
    of_query, of_key = segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]
    # Padding sees all else, so that what a memory holds of it is what it is in the released models.
    allowed &= ((of_query == of_key) | (of_query == 0)) & (of_key != 0)
  if hidden_BTT is not None:
    allowed = allowed & ~hidden_BTT.astype(bool)
  query &= jnp.pad(allowed, ((0, 0), (0, 0), (memory_len, 0)), constant_values=True)
  if has_memory_B is not None:
    query &= (key_at >= memory_len) | has_memory_B.astype(bool)[:, None, None]
  return query | (query_at == key_at), query


def encode_distances(cfg: ModelConfig, length: int, num_keys: int) -> jax.Array:
  """Returns encodings_GRD: sines, then cosines, of the distances S, S - 1, ... to the farthest key after a query."""
  end = 0 if cfg.unidirectional else 1 - length
  distances = np.arange(num_keys, end - 1, -1).astype(np.float32)
  if cfg.distance_clamp is not None:
    distances = distances.clip(-cfg.distance_clamp, cfg.distance_clamp)
  directions = np.stack([distances, -distances] if cfg.reverse_half else [distances])
  angles = jnp.asarray(directions[..., None] * (np.float32(1.0) / rotary_periods(cfg.embed_dim, 10_000.0)))
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
