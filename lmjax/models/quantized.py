"""Matrix products in eight bits, for hardware that makes these faster than products in bfloat16.

Each operand is scaled to fill its type by its largest magnitude, found anew each time, in float32: nothing is learnt or
remembered, so that parameters and checkpoints are those of any other precision. A scale belongs to all that one sum
runs over. So a token's result depends on that token alone, in a decoder never on those after it, and neither on how a
batch is split. In a gradient some scales would stand inside the sum; they are multiplied into the other operand before
that is scaled in its turn.

- fp8: all three products of a linear map, forward in e4m3 and gradients in e5m2 (Micikevicius et al. 2022, arXiv
  2209.05433).
- int8: forward and the gradient of the input. The gradient of the kernel, a sum over all tokens, is where eight even
  steps are too coarse: it stays in the compute type (Wortsman et al. 2023, SwitchBack, arXiv 2304.13013).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Recipe(NamedTuple):
  """What of a linear map is in which type.

  Attributes:
    forward: type of the input and the kernel.
    backward: type of the output's gradient.
    accumulator: what products are added up in.
    all_three: whether the gradient of the kernel is in eight bits too.
  """
  forward: Any
  backward: Any
  accumulator: Any
  all_three: bool

  @property
  def share(self) -> float:
    """Of the multiplications of training, those in eight bits."""
    return 1.0 if self.all_three else 2 / 3


RECIPES = {
    # In int32 the largest magnitudes overflow beyond 130,000 terms.
    "int8": Recipe(jnp.int8, jnp.int8, jnp.int32, False),
    "fp8": Recipe(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32, True),
}
# Maps in the blocks have an axis of these; those to labels, experts or another width of embeddings have not.
SERVED_AXES = frozenset({"mlp", "heads", "kv_heads"})
# Of what is all zeros. Its inverse times the largest value of any type is finite.
_SMALLEST = 1e-30


def einsum(name: str, equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns `products.einsum` in eight bits, in the type of `x`.

  Args:
    name: key of `RECIPES`.
    equation: ends its first operand in the letters that the second begins with, which are summed over.
    x: activations.
    kernel: of the type of `x`.
  """
  letters, of_kernel = equation.split("->")[0].split(",")
  return _product(RECIPES[name], len(set(letters) & set(of_kernel)), x, kernel)


def quantize(x: jax.Array, axes: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
  """Returns (q, scale), q * scale being nearly x; not a number stays that, in the scale.

  Args:
    x: an array.
    axes: what shares a scale; the scale keeps them with size 1.
    dtype: of q.
  """
  integer = jnp.issubdtype(dtype, jnp.integer)
  limit = float((jnp.iinfo if integer else jnp.finfo)(dtype).max)
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), _SMALLEST) / limit
  q = x / scale
  return (jnp.round(q) if integer else q).astype(dtype), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(recipe, summed, x, kernel):
  return _forward(recipe, summed, x, kernel)[0]


def _forward(recipe, summed, x, kernel):
  """The last `summed` axes of x meet the first of the kernel."""
  first, last = tuple(range(summed)), tuple(range(x.ndim - summed, x.ndim))
  q, scale = quantize(x, last, recipe.forward)
  q_kernel, kernel_scale = quantize(kernel, first, recipe.forward)
  y = _dot(recipe, q, q_kernel, last, first)
  lead, tail = x.shape[:-summed], kernel.shape[summed:]
  y = y * scale.reshape(*lead, *(1 for _ in tail)) * kernel_scale.reshape(tail)
  saved = (q, scale) if recipe.all_three else (x, None)
  return y.astype(x.dtype), (saved, (q_kernel, kernel_scale))


def _backward(recipe, summed, saved, dy):
  (x, scale), (q_kernel, kernel_scale) = saved
  lead, tail = x.ndim - summed, q_kernel.ndim - summed
  tokens, outputs = tuple(range(lead)), tuple(range(lead, lead + tail))
  q, q_scale = quantize(dy * kernel_scale.reshape(q_kernel.shape[summed:]), outputs, recipe.backward)
  dx = _dot(recipe, q, q_kernel, outputs, tuple(range(summed, q_kernel.ndim)))
  dx = (dx * q_scale.reshape(*dy.shape[:lead], *(1 for _ in range(summed)))).astype(dy.dtype)
  if not recipe.all_three:
    return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())))
  q, q_scale = quantize(dy * scale.reshape(*dy.shape[:lead], *(1 for _ in outputs)), tokens, recipe.backward)
  d_kernel = _dot(recipe, x, q, tokens, tokens) * q_scale.reshape(dy.shape[lead:])
  return dx, d_kernel.astype(dy.dtype)


def _dot(recipe, x, y, axes_of_x, axes_of_y):
  total = jax.lax.dot_general(x, y, ((axes_of_x, axes_of_y), ((), ())), preferred_element_type=recipe.accumulator)
  return total.astype(jnp.float32)


_product.defvjp(_forward, _backward)
