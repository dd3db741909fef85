"""The norms that the loop records of gradients: against gradients made one by one, and on a mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import partitioning, train

ROWS, COUNT = 8, 4


def make_setup(mesh=None, gradient_noise=True, count=COUNT):
  config = config_lib.base_config()
  config.model.update(num_layers=1, embed_dim=16, num_heads=2, dtype="float32")
  config.data.seq_len = 16
  config.train.update(num_steps=4, batch_size=ROWS, grad_accum_steps=count, gradient_noise=gradient_noise)
  config.mesh.update({"data": 1, **(mesh or {})})
  config = config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), vocab_size=128), tokens_per_epoch=10 ** 6)
  size = math.prod(dataclasses.asdict(config.mesh).values())
  return train.build(config, partitioning.make_mesh(config.mesh, jax.devices()[:size]))


def make_batch():
  random = np.random.default_rng(0)
  tokens = random.integers(0, 100, (ROWS, 17)).astype(np.int32)
  weights = (random.random((ROWS, 16)) < 0.8).astype(np.float32)
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@functools.cache
def initial_state():
  return jax.device_get(train.init_state(make_setup()))


def step(setup):
  state = jax.device_put(initial_state(), setup.state_shardings)
  hparams = {"learning_rate": np.float32(1e-2), "weight_decay": np.float32(0.1), "seed": np.uint32(0)}
  with partitioning.use_mesh(setup.mesh):
    args = state, partitioning.global_batch(setup.mesh, make_batch(), ROWS), hparams
    compiled = train.make_train_step(setup).lower(*args).compile({"xla_backend_optimization_level": 0})
    state, out = compiled(*args)
  return jax.device_get(state.params), {name: float(value) for name, value in out.items()}


@functools.cache
def recorded():
  return step(make_setup())


@functools.cache
def square_by_hand():
  """Returns a function of rows' weights: the squared norm of their mean loss's gradient, by plain JAX."""
  model, params, batch = make_setup(count=1, gradient_noise=False).model, initial_state().params, make_batch()

  def mean_loss(params, weights):
    logits = model.apply({"params": params}, batch["inputs"]).astype(jnp.float32)
    of_target = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    return -(of_target * weights).sum() / weights.sum()

  def square(params, weights):
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(jax.grad(mean_loss)(params, weights)))

  compiled = jax.jit(square).lower(params, batch["weights"]).compile({"xla_backend_optimization_level": 0})
  return lambda weights: float(compiled(params, weights))


def test_the_norms_are_those_of_gradients_made_one_by_one():
  _, out = recorded()
  by_hand, weights = square_by_hand(), make_batch()["weights"]
  of_part = lambda first: np.where((np.arange(ROWS) % COUNT == first)[:, None], weights, 0)
  parts = [by_hand(of_part(first)) for first in range(COUNT)]
  assert out["square_small"] == pytest.approx(np.mean(parts), rel=1e-4)
  assert out["square_big"] == pytest.approx(by_hand(weights), rel=1e-4)
  assert out["square_big"] == pytest.approx(out["grad_norm"] ** 2, rel=1e-4)
  assert out["square_small"] > 1.5 * out["square_big"]  # There is noise to see.


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}], ids=str)
def test_they_do_not_depend_on_the_mesh(mesh):
  _, out = step(make_setup(mesh))
  for name in ("square_small", "square_big"):
    assert out[name] == pytest.approx(recorded()[1][name], rel=1e-5)


def test_training_is_the_same_with_and_without_but_for_rounding():
  params, out = step(make_setup(gradient_noise=False))
  assert "square_small" not in out and out["loss"] == recorded()[1]["loss"]
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
  jax.tree.map(same, params, recorded()[0])
