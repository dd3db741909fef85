"""Matrix products, with a backward pass in the form that XLA is fastest at on a CPU.

XLA on a CPU multiplies up to twice as fast where the first operand is contracted over its last axis. The gradient of a
kernel is contracted over batch and length, the first axes of both its operands, so one of them is moved in memory
first. On other platforms XLA's own choice is left alone.
"""

import functools

import jax
import jax.numpy as jnp

from lmjax.partitioning import platform


def transposed(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
  """Moves axes (the last two change places by default), on a CPU in memory and not only in name.

  Without the barrier XLA folds a transposition into the product that reads it.
  """
  x = x.swapaxes(-1, -2) if axes is None else x.transpose(axes)
  return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def vocabulary_logits(x_BTD: jax.Array, w_VD: jax.Array, bias_V: jax.Array | None = None,
                      softcap: float | None = None) -> jax.Array:
  """Projects features to logits_BTV in float32.

  Args:
    x_BTD: features, whose type the product is made in.
    w_VD: output projection.
    bias_V: added to the logits; None adds none.
    softcap: logits are squashed to +-this by tanh; None leaves them.
  """
  logits = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
  logits = logits if bias_V is None else logits + bias_V
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def einsum(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns `jnp.einsum` of activations and a kernel whose shared letters are all summed over."""
  return _cpu_einsum(equation, x, kernel) if platform() == "cpu" else jnp.einsum(equation, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu_einsum(equation, x, kernel):
  return jnp.einsum(equation, x, kernel)


def _forward(equation, x, kernel):
  return jnp.einsum(equation, x, kernel), (x, kernel)


def _backward(equation, saved, dy):
  x, kernel = saved
  operands, out = equation.split("->")
  letters, of_kernel = operands.split(",")
  dx = jnp.einsum(f"{out},{of_kernel}->{letters}", dy, kernel)
  # The narrower of x and dy is the one to move: what it shares with the other goes last.
  (moved, narrow), (kept, other) = sorted([(letters, x), (out, dy)], key=lambda pair: pair[1].size)
  order = sorted(moved, key=lambda letter: letter in kept)
  result = [c for c in order if c not in kept] + [c for c in kept if c not in moved]
  narrow = transposed(narrow, tuple(moved.index(c) for c in order))
  d_kernel = jnp.einsum(f"{''.join(order)},{kept}->{''.join(result)}", narrow, other)
  # Here the barrier keeps the transposition that follows from being folded into the product.
  return dx, jax.lax.optimization_barrier(d_kernel).transpose([result.index(c) for c in of_kernel])


_cpu_einsum.defvjp(_forward, _backward)
