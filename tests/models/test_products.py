"""Products with a backward pass of their own have the gradients of plain ones, and take the form a CPU is fast at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.products import einsum

# The narrower operand is moved: once it is x, once dy.
EQUATIONS = [("BTD,DNH->BTNH", (2, 3, 4), (4, 2, 5)), ("BTNH,NHD->BTD", (2, 3, 2, 5), (2, 5, 4)),
             ("BTD,DF->BTF", (2, 3, 4), (4, 9)), ("BTF,FD->BTD", (2, 3, 9), (9, 4))]


def grads(product, equation, x, kernel):
  return jax.grad(lambda x, kernel: jnp.sin(product(equation, x, kernel)).sum(), (0, 1))(x, kernel)


@pytest.mark.parametrize("equation, x_shape, kernel_shape", EQUATIONS)
def test_gradients_are_those_of_a_plain_einsum(equation, x_shape, kernel_shape):
  random = np.random.default_rng(0)
  x, kernel = (random.standard_normal(shape).astype(np.float32) for shape in (x_shape, kernel_shape))
  np.testing.assert_array_equal(einsum(equation, x, kernel), jnp.einsum(equation, x, kernel))
  for found, expected in zip(grads(einsum, equation, x, kernel), grads(jnp.einsum, equation, x, kernel)):
    np.testing.assert_allclose(found, expected, atol=1e-6)
