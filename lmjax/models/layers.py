"""The parts every Transformer here is made of: parameters with named axes, einsum maps, norms, embeddings, the MLP.

Shapes: B batch, T length, D model width, F MLP width, V vocabulary, N heads, H head width.
"""

from typing import Any, Callable

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from lmjax.config import ModelConfig
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
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(module.cfg.param_dtype))


def residual_std(cfg: ModelConfig) -> float:
  """Initial standard deviation of a projection into the residual stream; GPT-2 divides by the root of their number."""
  return cfg.init_std / (2 * cfg.num_layers) ** 0.5 if cfg.scale_residual_init else cfg.init_std


class Einsum(nn.Module):
  """A linear map whose equation is its documentation.

  Attributes:
    cfg: the model's settings.
    equation: such as "BTD,DNH->BTNH"; the second operand is the kernel.
    shape: of the kernel.
    axes: logical names of the kernel's dimensions.
    std: standard deviation of the initial kernel.
  """
  cfg: ModelConfig
  equation: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(self.cfg.dtype)
    kernel = param(self, "kernel", nn.initializers.normal(self.std), self.shape, self.axes)
    y = checkpoint_name(einsum(self.equation, x.astype(dtype), kernel.astype(dtype)), "product")
    if not self.cfg.use_bias:
      return y
    operands, output = self.equation.split("->")
    letters = operands.split(",")[1]
    kept = [i for i, letter in enumerate(letters) if letter in output]
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

  Works over the last axis, in float32 whatever the compute type.

  Attributes:
    cfg: the model's settings.
    kind: "layernorm" or "rmsnorm"; "" means cfg.norm.
  """
  cfg: ModelConfig
  kind: str = ""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg, kind = self.cfg, self.kind or self.cfg.norm
    shape = x.shape[-1:]
    scale = param(self, "scale", nn.initializers.ones, shape, ("norm",))
    y = x.astype(jnp.float32)
    if kind == "layernorm":
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + cfg.norm_eps) * scale
    if kind == "layernorm" and cfg.norm_bias:
      y = y + param(self, "bias", nn.initializers.zeros, shape, ("norm",))
    return y.astype(x.dtype)


class Embed(nn.Module):
  """Token embeddings, and position embeddings where they are added to the input."""
  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    init = nn.initializers.normal(cfg.init_std)
    self.embedding = param(self, "embedding", init, (cfg.vocab_size, cfg.embed_dim), ("vocab", "embed"))
    if cfg.position == "learned":
      self.position = param(self, "position", init, (cfg.max_positions, cfg.embed_dim), ("position", "embed"))

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """Returns x_BTD; `positions_BT` None means 0, 1, 2, ..."""
    cfg = self.cfg
    dtype = jnp.dtype(cfg.dtype)
    # Rows are looked up whole: a table split over its width as well would make the lookup's result change hands twice.
    # They are cast after it, so that the gradients of a frequent token add up in the parameters' own type.
    x_BTD = constrain(self.embedding, "vocab", "act_embed")[tokens_BT].astype(dtype)
    if cfg.scale_embeddings:
      x_BTD = x_BTD * jnp.asarray(cfg.embed_dim ** 0.5, dtype)
    if cfg.position == "learned":
      table = constrain(self.position, "position", "act_embed")
      x_BTD = x_BTD + (table[:tokens_BT.shape[1]] if positions_BT is None else table[positions_BT]).astype(dtype)
      x_BTD = _row_major(x_BTD)
    if cfg.position == "sinusoidal":
      positions = jnp.arange(tokens_BT.shape[1]) if positions_BT is None else positions_BT
      x_BTD = x_BTD + sinusoids(positions, cfg.embed_dim).astype(dtype)
    return constrain(x_BTD, "batch", "length", "act_embed")


def sinusoids(positions: jax.Array, dim: int) -> jax.Array:
  """Sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

  Args:
    positions: [...] integers.
    dim: width, even.

  Returns:
    [..., dim] float32.
  """
  rates = 10_000.0 ** (-jnp.arange(dim // 2) / max(dim // 2 - 1, 1))
  angles = positions[..., None].astype(jnp.float32) * rates
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Mlp(nn.Module):
  """Two linear maps with an activation between, or its gated form (Shazeer 2020, arXiv 2002.05202)."""
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    cfg = self.cfg
    shape, axes = (cfg.embed_dim, cfg.mlp_dim), ("embed", "mlp")
    act = ACTIVATIONS[cfg.activation]
    h_BTF = Einsum(cfg, "BTD,DF->BTF", shape, axes, cfg.init_std, name="up")(x_BTD)
    if cfg.gated_mlp:
      h_BTF = act(Einsum(cfg, "BTD,DF->BTF", shape, axes, cfg.init_std, name="gate")(x_BTD)) * h_BTF
    else:
      h_BTF = act(h_BTF)
    h_BTF = constrain(h_BTF, "batch", "length", "act_mlp")
    return Einsum(cfg, "BTF,FD->BTD", shape[::-1], axes[::-1], residual_std(cfg), name="down")(h_BTF)


class Dropout(nn.Module):
  """Dropout that is on exactly when `apply` is given a "dropout" key."""
  rate: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)
