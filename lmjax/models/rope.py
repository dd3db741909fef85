"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the ways to stretch it for longer texts.

Shapes: B batch, T length, N heads, H head width, R the part of H that is turned.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import ModelConfig


def rotary_angles(cfg: ModelConfig, positions_BT: jax.Array, local: bool = False) -> tuple[jax.Array, jax.Array]:
  """Returns sines and cosines of the angles by which queries and keys are turned.

  Args:
    cfg: of the model.
    positions_BT: integers.
    local: whether for a local layer; one with a base of its own is not stretched.

  Returns:
    Two arrays [B, T, 1, R / 2] in float32.
  """
  width = int(cfg.head_dim * cfg.rotary_fraction)
  own = local and cfg.local_rope_theta is not None
  theta, scaling = (cfg.local_rope_theta, "none") if own else (cfg.rope_theta, cfg.rope_scaling)
  # The length of a text is told by the furthest position of its row, which is also known when it is decoded one token
  # at a time, and does not depend on how a batch is split.
  length = jnp.max(positions_BT, axis=1, initial=0)[:, None, None, None] + 1
  rates, factor = _SCALINGS[scaling](cfg, width, theta, length)
  angles = positions_BT[..., None, None].astype(jnp.float32) * rates
  return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Turns the pairs (x[i], x[i + R/2]) of the first R of H by their angles, in float32; the rest stays."""
  half = sin.shape[-1]
  x = x_BTNH.astype(jnp.float32)
  first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
  turned = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(turned if rest.shape[-1] else turned[:2], axis=-1).astype(x_BTNH.dtype)


def rotary_periods(width: int, theta: float) -> np.ndarray:
  """Returns what a position is divided by to get an angle, theta^(0 / width), theta^(2 / width), ..., in float32."""
  # Rounded where Hugging Face rounds, for at far positions the last bit of a rate shows in the logits. NumPy's own
  # float32 powers differ between processors.
  exponents = (np.arange(0, width, 2, dtype=np.float32) / np.float32(width)).astype(np.float64)
  return (theta ** exponents).astype(np.float32)


def _none(cfg, width, theta, length):
  return np.float32(1.0) / rotary_periods(width, theta), 1.0


def _linear(cfg, width, theta, length):
  """Positions are divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""
  return np.float32(1.0) / rotary_periods(width, theta) / np.float32(cfg.rope_factor), 1.0


def _dynamic(cfg, width, theta, length):
  """The base grows with the length of the text once that is beyond the original ("NTK-aware", bloc97 2023)."""
  original = cfg.rope_original_positions
  stretch = cfg.rope_factor * jnp.maximum(length, original) / original - (cfg.rope_factor - 1)
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return 1.0 / (theta * stretch ** (width / (width - 2))) ** exponents, 1.0


def _llama3(cfg, width, theta, length):
  """Slow turns are stretched, fast ones are not, and those between in part (Llama 3.1, arXiv 2407.21783)."""
  rates = np.float32(1.0) / rotary_periods(width, theta)
  turns = cfg.rope_original_positions * rates / np.float32(2 * math.pi)
  low, high = cfg.rope_low_frequency, cfg.rope_high_frequency
  kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
  return (1 - kept) * rates / np.float32(cfg.rope_factor) + kept * rates, 1.0


def _yarn(cfg, width, theta, length):
  """The same with a ramp over dimensions, and sharper scores (Peng et al. 2023, arXiv 2309.00071)."""
  periods = rotary_periods(width, theta)
  place = lambda turns: width * math.log(cfg.rope_original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
  first = max(math.floor(place(cfg.rope_high_frequency)), 0)
  last = min(math.ceil(place(cfg.rope_low_frequency)), width - 1)
  ramp = np.clip((np.arange(width // 2, dtype=np.float32) - first) / np.float32(last - first or 0.001), 0, 1)
  kept = 1 - ramp
  rates = (1 / (np.float32(cfg.rope_factor) * periods)) * (1 - kept) + (1 / periods) * kept
  factor = cfg.rope_attention_factor or (0.1 * math.log(cfg.rope_factor) + 1 if cfg.rope_factor > 1 else 1.0)
  return rates.astype(np.float32), factor


# Each returns the radians a position turns each pair by, and a factor of sines and cosines.
_SCALINGS = {"none": _none, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
