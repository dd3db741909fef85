"""Linear maps in eight bits: errors within those of the formats, and a model that trains, is split and saved as before.

Bounds are made of what a format does to a number: int8 is off by half a step, the largest magnitude over 254; a float
by 2^-4 of itself (e4m3) or 2^-3 (e5m2), or below its normal range by half its smallest step.
"""

import dataclasses
import re

from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import partitioning
from lmjax.config import MeshConfig, ModelConfig, ObjectiveConfig, UserError, base_config, from_config_dict
from lmjax.models import families
from lmjax.models.quantized import einsum, quantize
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import causal_lm

SIZES = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, vocab_size=64,
             max_positions=32, dtype="float32", init_std=0.2)
FAST = {"xla_backend_optimization_level": 0}  # Each of many small programs runs once.
# Largest value, share of itself that a number is off by, and half the smallest step.
FORMATS = {"int8": (127, 0, 0.5), "e4m3": (448, 2 ** -4, 2 ** -10), "e5m2": (57344, 2 ** -3, 2 ** -17)}
TYPES = {"int8": ("int8", "int8"), "fp8": ("e4m3", "e5m2")}
EQUATIONS = [("BTD,DF->BTF", (2, 7, 40), (40, 24)), ("BTD,DNH->BTNH", (2, 7, 40), (40, 3, 8)),
             ("BTNH,NHD->BTD", (2, 7, 3, 8), (3, 8, 40))]


def scale_and_error(x, axes, name):
  """Returns the scale of what `axes` hold, and how far from x each number may come out."""
  limit, share, half = FORMATS[name]
  scale = np.abs(x).max(axes, keepdims=True) / limit
  return scale, share * np.abs(x) + half * scale


def drawn(*shapes):
  random = np.random.default_rng(0)
  # Magnitudes differ by row and by column, as they do where a scale matters.
  return [random.standard_normal(shape).astype(np.float32) * np.exp(random.standard_normal(shape[-1:]))
          .astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("equation, x_shape, kernel_shape", EQUATIONS)
def test_products_and_gradients_are_off_by_no_more_than_the_formats(name, equation, x_shape, kernel_shape):
  forward, backward = TYPES[name]
  operands, out = equation.split("->")
  letters, of_kernel = operands.split(",")
  summed = len(set(letters) & set(of_kernel))
  x, kernel, dy = drawn(x_shape, kernel_shape, (*x_shape[:-summed], *kernel_shape[summed:]))
  y, pullback = jax.vjp(lambda x, kernel: einsum(name, equation, x, kernel), x, kernel)
  dx, d_kernel = pullback(dy)

  x, kernel, dy = (value.astype(np.float64) for value in (x, kernel, dy))
  lead, last = tuple(range(x.ndim - summed)), tuple(range(x.ndim - summed, x.ndim))
  tail = tuple(range(len(lead), dy.ndim))
  x_scale, x_off = scale_and_error(x, last, forward)
  kernel_scale, kernel_off = scale_and_error(kernel, tuple(range(summed)), forward)
  within(y, np.einsum(equation, x, kernel),
         np.einsum(equation, np.abs(x), kernel_off) + np.einsum(equation, x_off, np.abs(kernel) + kernel_off))

  to_x, to_kernel = f"{out},{of_kernel}->{letters}", f"{letters},{out}->{of_kernel}"
  _, dy_off = scale_and_error(dy * kernel_scale.reshape(kernel_shape[summed:]), tail, backward)
  within(dx, np.einsum(to_x, dy, kernel), np.einsum(to_x, np.abs(dy), kernel_off)
         + np.einsum(to_x, dy_off, (np.abs(kernel) + kernel_off) / kernel_scale))

  exact = np.einsum(to_kernel, x, dy)
  if name == "int8":  # This product is not in eight bits.
    np.testing.assert_allclose(d_kernel, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    return
  rows = x_scale.reshape(*x_scale.shape[:len(lead)], *(1 for _ in tail))
  _, dy_off = scale_and_error(dy * rows, lead, backward)
  within(d_kernel, exact, np.einsum(to_kernel, x_off, np.abs(dy))
         + np.einsum(to_kernel, (np.abs(x) + x_off) / x_scale, dy_off))


def within(found, exact, bound):
  off = np.abs(found - exact)
  assert np.all(off <= bound * 1.0001)
  # Eight bits were used: the mean error is a fair part of the bound, and small all the same.
  assert np.mean(off) > 0.02 * np.mean(bound) and np.linalg.norm(off) < 0.12 * np.linalg.norm(exact)


def test_numbers_are_rounded_to_the_nearest_of_their_format():
  x = jnp.asarray([[127.0, 0.4, -0.6, 63.5], [0.0, 0.0, 0.0, 0.0]])
  q, scale = quantize(x, (1,), jnp.int8)
  np.testing.assert_array_equal(q, [[127, 0, -1, 64], [0, 0, 0, 0]])
  assert scale[0, 0] == 1 and np.all(np.isfinite(scale))
  # Between 256 and 448 e4m3 has steps of 32, between 1 and 2 of 1/8.
  q, _ = quantize(jnp.asarray([[448.0, 300.0, 1.2, -1.07]]), (1,), jnp.float8_e4m3fn)
  np.testing.assert_array_equal(q.astype(jnp.float32), [[448, 288, 1.25, -1.125]])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(name, bad):
  x, kernel = drawn((1, 3, 8), (8, 4))
  x[0, 1, 2] = bad
  y = einsum(name, "BTD,DF->BTF", x, kernel)
  assert not np.isfinite(y[0, 1]).any() and np.isfinite(y[0, [0, 2]]).all()


@pytest.mark.parametrize("name", TYPES)
def test_a_token_depends_on_no_other(name):
  x, kernel = drawn((2, 6, 32), (32, 8))
  together = einsum(name, "BTD,DF->BTF", x, kernel)
  x[:, 3:] *= 100
  np.testing.assert_array_equal(einsum(name, "BTD,DF->BTF", x, kernel)[:, :3], together[:, :3])


def model_of(family, quantization, **small):
  return make_model(ModelConfig(**{**families.preset(family), **SIZES, **small, "quantization": quantization}))


def params_of(model):
  return jax.jit(lambda: nn.unbox(init_params(model, jax.random.key(0))), compiler_options=FAST)()


def text(rows=8, length=17):
  """Counts upwards in steps that differ by row: something to learn."""
  return ((np.arange(rows)[:, None] % 5 + 1) * np.arange(length) % 64).astype(np.int32)


def batch_of(tokens):
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(tokens[:, 1:].shape, np.float32)}


def mean_loss(model, params, batch):
  return causal_lm.loss(model, params, batch, ObjectiveConfig())[0] / jnp.sum(batch["weights"])


@pytest.mark.parametrize("name, operands", [
    ("int8", {("i8", "i8"): 2 * 7}),
    ("fp8", {("f8E4M3FN", "f8E4M3FN"): 7, ("f8E5M2", "f8E4M3FN"): 7, ("f8E4M3FN", "f8E5M2"): 7})])
def test_the_maps_of_a_block_are_in_eight_bits_and_nothing_else_is(name, operands):
  model = model_of("llama", name, num_layers=1, remat_policy="none", scan_layers=False)
  grad = jax.jit(jax.grad(lambda params, batch: mean_loss(model, params, batch)))
  lowered = grad.lower(params_of(model), batch_of(text())).as_text()
  found = re.findall(r"dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", lowered)
  eight = [pair for pair in found if pair != ("f32", "f32")]
  assert {pair: eight.count(pair) for pair in set(eight)} == operands
  assert len(found) > len(eight)  # Attention and the output projection.


def test_the_compiler_multiplies_integers():
  x, kernel = drawn((2, 8, 32), (32, 16))
  program = jax.jit(lambda x, kernel: einsum("int8", "BTD,DF->BTF", x, kernel)).lower(x, kernel).compile().as_text()
  assert re.search(r"= s32\[16,16\]\S* dot\(", program) and not re.search(r"= f32\S* dot\(", program)


@pytest.mark.parametrize("name", TYPES)
def test_parameters_are_those_of_any_other_precision(name):
  plain, other = (params_of(model_of("llama", quantization)) for quantization in ("none", name))
  jax.tree.map(np.testing.assert_array_equal, plain, other)
  model = model_of("llama", name)
  assert set(jax.eval_shape(lambda: model.init(jax.random.key(0), text()[:, :-1]))) == {"params"}


def trained(quantization, steps=60):
  model, optimizer = model_of("llama", quantization, init_std=0.05), optax.adam(1e-2)
  # Each token is one to three more than the one before: what can be learnt ends at a loss of ln 3.
  tokens = np.cumsum(np.random.default_rng(0).integers(1, 4, (steps, 16, 33)), axis=-1) % 64
  params = params_of(model)

  def step(carry, tokens):
    params, state = carry
    loss, grads = jax.value_and_grad(lambda params: mean_loss(model, params, batch_of(tokens)))(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), loss

  run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), tokens.astype(np.int32))[1])
  return np.asarray(run(params))


def test_training_stays_close_to_float32():
  losses = {name: trained(name) for name in ("none", *TYPES)}
  assert 1.05 < losses["none"][-1] < 1.4 and losses["none"][0] > 4
  off = {name: np.abs(losses[name] / losses["none"] - 1) for name in TYPES}
  assert 0 < off["int8"].max() < 0.01 and 0 < off["fp8"].max() < 0.02


@pytest.mark.parametrize("name", TYPES)
def test_a_mesh_changes_what_rounding_changes(name):
  model = model_of("llama", name, remat_policy="full")
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  params, batch = params_of(model), batch_of(text())
  run = jax.jit(jax.value_and_grad(lambda params, batch: mean_loss(model, params, batch)), compiler_options=FAST)
  loss, grads = jax.device_get(run(params, batch))
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with partitioning.use_mesh(mesh):
    split = jax.device_put(params, partitioning.param_shardings(mesh, boxed))
    split_loss, split_grads = jax.device_get(run(split, partitioning.global_batch(mesh, batch, 8)))
  # A sum in another order can tip a number over to the next that the format has.
  assert split_loss == pytest.approx(loss, rel=1e-3)
  for path, leaf in flax.traverse_util.flatten_dict(grads).items():
    other = flax.traverse_util.flatten_dict(split_grads)[path]
    assert np.linalg.norm(other - leaf) < 0.02 * np.linalg.norm(leaf), path


@pytest.mark.parametrize("family, name", [("gpt2", "int8"), ("bert", "fp8"), ("t5", "int8"), ("t5", "fp8"),
                                          ("xlnet", "fp8")])
def test_other_families_come_close_to_float32(family, name):
  plain = model_of(family, "none", num_kv_heads=4, num_decoder_layers=2, embedding_dim=32)
  other = make_model(dataclasses.replace(plain.cfg, quantization=name))
  params, tokens = params_of(plain), text(4)
  inputs = (tokens, tokens[:, :9]) if family == "t5" else (tokens,)

  def loss(model, params):
    out = jax.tree.leaves(model.apply({"params": params}, *inputs))[0]
    return jnp.mean(jnp.square(out))

  (exact, exact_grads), (found, grads) = (
      jax.jit(jax.value_and_grad(lambda params, model=model: loss(model, params)), compiler_options=FAST)(params)
      for model in (plain, other))
  assert found != exact and found == pytest.approx(float(exact), rel=0.1)
  norm = lambda tree: float(optax.tree.norm(tree))
  assert 0 < norm(jax.tree.map(jnp.subtract, grads, exact_grads)) < 0.3 * norm(exact_grads)


@pytest.mark.parametrize("settings, told", [
    (dict(quantization="int4"), r"config\.model\.quantization is 'int4', which is not one of its values; did you mean"),
    (dict(quantization="fp8", num_experts=4, mlp_bias=False),
     r"config\.model\.quantization is fp8, which the products of experts .* set it to none")])
def test_what_is_not_served_is_told(settings, told):
  config = base_config()
  config.train.num_steps = 1
  config.model.update(settings)
  with pytest.raises(UserError, match=told):
    from_config_dict(config)
