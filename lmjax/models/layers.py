"""The parts every Transformer here is made of: parameters with named axes, einsum maps, norms, embeddings, the MLP.

Shapes: B batch, T length, D model width, E embedding width, F MLP width, V vocabulary, N heads, H head width.
"""

import functools
import math
from typing import Any, Callable

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
import numpy as np

from lmjax import parametrization
from lmjax.config import ModelConfig
from lmjax.models import quantized
from lmjax.models.products import einsum
from lmjax.partitioning import constrain, platform

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    # x * sigmoid(x), with the sigmoid by tanh: XLA vectorises that on CPU, where its logistic takes ten times as long.
    "silu": lambda x: 0.5 * x * (1 + jnp.tanh(0.5 * x)),
}


def param(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
  """Declares a parameter with one logical axis name for each dimension; every parameter in lmjax is made here."""
  factor = parametrization.init_factor(module.cfg, name, axes)
  scaled = init if factor == 1 else lambda *args: init(*args) * factor
  return module.param(name, nn.with_logical_partitioning(scaled, axes), shape, jnp.dtype(module.cfg.param_dtype))


def scaled(x: jax.Array, factor: float) -> jax.Array:
  """Returns an activation times a factor of the model's parametrization; where that is 1, nothing is computed."""
  return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def residual_std(cfg: ModelConfig) -> float:
  """Initial standard deviation of a projection into the residual stream; GPT-2 divides by the root of their number."""
  return cfg.init_std / (2 * parametrization.base_layers(cfg)) ** 0.5 if cfg.scale_residual_init else cfg.init_std


def initial_std(cfg: ModelConfig, num_inputs: float, std: float | None = None) -> float:
  """Initial standard deviation of a map that sums `num_inputs` products; `std` None means cfg.init_std (cfg.init).

  All is as at the base size of the model's parametrization; what differs elsewhere, `param` sees to.
  """
  std = cfg.init_std if std is None else std
  return std / num_inputs ** 0.5 if cfg.init == "fan_in" else std


class Einsum(nn.Module):
  """A linear map whose equation is its documentation.

  Attributes:
    cfg: the model's settings.
    equation: such as "BTD,DNH->BTNH"; the second operand is the kernel.
    shape: of the kernel.
    axes: logical names of the kernel's dimensions.
    std: standard deviation of the initial kernel, or with cfg.init "fan_in" of what it makes of unit inputs.
    use_bias: whether something is added to the product.
  """
  cfg: ModelConfig
  equation: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float
  use_bias: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(self.cfg.dtype)
    operands, output = self.equation.split("->")
    letters = operands.split(",")[1]
    kept = [i for i, letter in enumerate(letters) if letter in output]
    num_inputs = math.prod(size for i, size in enumerate(self.shape) if i not in kept)
    axis = next((axis for i, axis in enumerate(self.axes) if i not in kept))
    at_base = parametrization.base_inputs(self.cfg, num_inputs, axis)
    init = nn.initializers.normal(initial_std(self.cfg, at_base, self.std))
    kernel = param(self, "kernel", init, self.shape, self.axes)
    plain = self.cfg.quantization == "none" or quantized.SERVED_AXES.isdisjoint(self.axes)
    product = einsum if plain else functools.partial(quantized.einsum, self.cfg.quantization)
    y = checkpoint_name(product(self.equation, x.astype(dtype), kernel.astype(dtype)), self.name or "product")
    if not self.use_bias:
      return y
    bias = param(self, "bias", nn.initializers.zeros, tuple(self.shape[i] for i in kept),
                 tuple(self.axes[i] for i in kept))
    return y + bias.astype(dtype)


def _row_major(x: jax.Array) -> jax.Array:
  """Keeps XLA on GPUs from storing x batch-last, as the sum over the batch for the position table asks for.

  The whole residual stream would follow, with a transposition around every fused attention.
  """
  return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if platform() == "gpu" else x


class Norm(nn.Module):
  """LayerNorm (Ba et al. 2016, arXiv 1607.06450) or RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467).

  Works in float32 whatever the compute type.

  Attributes:
    cfg: the model's settings.
    kind: "layernorm" or "rmsnorm"; "" means cfg.norm.
    num_axes: how many of the last axes are normalised together.
  """
  cfg: ModelConfig
  kind: str = ""
  num_axes: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg, kind = self.cfg, self.kind or self.cfg.norm
    shape, over = x.shape[-self.num_axes:], tuple(range(-self.num_axes, 0))
    names = ("norm",) if self.num_axes == 1 else ("norm_heads", "norm")
    scale = param(self, "scale", nn.initializers.zeros if cfg.norm_offset else nn.initializers.ones, shape, names)
    y = x.astype(jnp.float32)
    if kind == "layernorm":
      y = y - jnp.mean(y, axis=over, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + cfg.norm_eps)
    y = y * (1.0 + scale if cfg.norm_offset else scale)
    if kind == "layernorm" and cfg.norm_bias:
      y = y + param(self, "bias", nn.initializers.zeros, shape, names)
    return y.astype(x.dtype)


class Embed(nn.Module):
  """Token embeddings, and what is added to them: positions and token types.

  Their width may be another than the model's, to which they are then projected (Lan et al. 2019, arXiv 1909.11942).

  Attributes:
    cfg: the model's settings.
    table: holds the token embeddings, and perhaps other tables, where another part of the model reads them too; None
      means that this has its own.
  """
  cfg: ModelConfig
  table: nn.Module | None = None

  def setup(self):
    cfg = self.cfg
    self.embedding = token_table(self) if self.table is None else self.table.embedding
    others = self.table if isinstance(self.table, EmbeddingTables) else None
    if cfg.position == "learned":
      self.position = others.position if others else position_table(self)
    if cfg.token_types:
      self.token_type = others.token_type if others else type_table(self)
    if cfg.embedding_norm:
      self.norm = Norm(cfg)
    if cfg.embedding_dim != cfg.embed_dim:
      self.projection = Einsum(cfg, "BTE,ED->BTD", (cfg.embedding_dim, cfg.embed_dim), ("embedding", "embed"),
                               cfg.init_std, True)

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None,
               token_types_BT: jax.Array | None = None) -> jax.Array:
    """Returns x_BTD; `positions_BT` None means 0, 1, 2, ..., and `token_types_BT` None that all are of type 0."""
    cfg = self.cfg
    dtype = jnp.dtype(cfg.dtype)
    # Rows are looked up whole: a table split over its width as well would make the lookup's result change hands twice.
    # They are cast after it, so that the gradients of a frequent token add up in the parameters' own type.
    x = constrain(self.embedding, "vocab", "act_embed")[tokens_BT].astype(dtype)
    if cfg.scale_embeddings:
      x = x * jnp.asarray(parametrization.base_width(cfg) ** 0.5, dtype)
    if cfg.token_types:
      x = x + (self.token_type[0] if token_types_BT is None else self.token_type[token_types_BT]).astype(dtype)
    if cfg.position == "learned":
      table, first = constrain(self.position, "position", "act_embed"), cfg.position_offset
      at = slice(first, first + tokens_BT.shape[1]) if positions_BT is None else positions_BT + first
      x = _row_major(x + table[at].astype(dtype))
    if cfg.position == "sinusoidal":
      positions = jnp.arange(tokens_BT.shape[1]) if positions_BT is None else positions_BT
      x = x + sinusoids(positions, cfg.embedding_dim).astype(dtype)
    if cfg.embedding_norm:
      x = self.norm(x)
    if cfg.embedding_dim != cfg.embed_dim:
      x = self.projection(x)
    return constrain(x, "batch", "stream_length", "act_embed")


def token_table(module: nn.Module) -> jax.Array:
  """Declares the token embeddings of a module, [V, E]."""
  return _table(module, "embedding", module.cfg.vocab_size, "vocab")


def position_table(module: nn.Module) -> jax.Array:
  """Declares the position embeddings of a module, [rows, E]."""
  return _table(module, "position", module.cfg.max_positions + module.cfg.position_offset, "position")


def type_table(module: nn.Module) -> jax.Array:
  """Declares the token type embeddings of a module, [token types, E]."""
  return _table(module, "token_type", module.cfg.token_types, "token_type")


def _table(module: nn.Module, name: str, rows: int, axis: str) -> jax.Array:
  cfg = module.cfg
  width = "embed" if cfg.embedding_dim == cfg.embed_dim else "embedding"
  return param(module, name, nn.initializers.normal(cfg.init_std), (rows, cfg.embedding_dim), (axis, width))


class TokenTable(nn.Module):
  """Token embeddings that several parts of a model share."""
  cfg: ModelConfig

  def setup(self):
    self.embedding = token_table(self)


class EmbeddingTables(nn.Module):
  """Embeddings of tokens, positions and token types that several parts of a model share."""
  cfg: ModelConfig

  def setup(self):
    self.embedding = token_table(self)
    if self.cfg.position == "learned":
      self.position = position_table(self)
    if self.cfg.token_types:
      self.token_type = type_table(self)


def sinusoids(positions: jax.Array, dim: int) -> jax.Array:
  """Sines, then cosines, of wavelengths from 2 pi towards 10000 * 2 pi (Vaswani et al. 2017, arXiv 1706.03762, 3.5).

  The paper has them in turns, which is another order of the same features.

  Args:
    positions: [...] integers.
    dim: width, even.

  Returns:
    [..., dim] float32.
  """
  rates = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
  angles = positions[..., None].astype(jnp.float32) * rates.astype(np.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Mlp(nn.Module):
  """Two linear maps with an activation between, or its gated form (Shazeer 2020, arXiv 2002.05202)."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg = self.cfg
    shape, axes = (cfg.embed_dim, cfg.mlp_dim), ("embed", "mlp")
    act = ACTIVATIONS[cfg.activation]
    into = lambda name: Einsum(cfg, "BTD,DF->BTF", shape, axes, cfg.init_std, cfg.mlp_bias, name=name)(x_BTD)
    h_BTF = into("up")
    if cfg.gated_mlp:
      h_BTF = act(into("gate")) * h_BTF
    else:
      h_BTF = act(h_BTF)
    h_BTF = constrain(h_BTF, "batch", "length", "act_mlp")
    return Einsum(cfg, "BTF,FD->BTD", shape[::-1], axes[::-1], residual_std(cfg), cfg.mlp_bias, name="down")(h_BTF)


class Dropout(nn.Module):
  """Dropout (Srivastava et al. 2014) that is on exactly when `apply` is given a "dropout" key.

  Flax's own asks whether its rate is 0, and so cannot have one that is only known when the program runs (see stack.py).

  Attributes:
    rate: share of the elements that become 0, below 1; the others grow so that the mean stays.
  """
  rate: float | jax.Array

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if not self.has_rng("dropout"):
      return x
    kept = 1.0 - self.rate
    mask = jax.random.bernoulli(self.make_rng("dropout"), kept, x.shape)
    return jnp.where(mask, x / jnp.asarray(kept, x.dtype), 0)
