"""One rule for every optimizer: direction, decay, policies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.config import OptimConfig, UserError
from lmjax.optim.optimizer import make_optimizer, mean_and_clip, policy_factors

AXES = {"embed": {"embedding": ("vocab", "embed")},
        "layers": {"mlp": {"up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}},
                   "attention": {"out": {"kernel": ("layers", "heads", "head_dim", "embed")}}}}


def params():
  keys = iter(jax.random.split(jax.random.key(0), 4))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  return {"embed": {"embedding": normal(10, 8)},
          "layers": {"mlp": {"up": {"kernel": normal(2, 8, 16), "bias": normal(2, 16)}},
                     "attention": {"out": {"kernel": normal(2, 2, 4, 8)}}}}


def hparams(lr=0.1, decay=0.0):
  return {"learning_rate": jnp.float32(lr), "weight_decay": jnp.float32(decay)}


def one_step(cfg, grads, lr=0.1, decay=0.0):
  p = params()
  optimizer = make_optimizer(cfg, AXES)
  loss = lambda q: sum(jnp.sum(x ** 2) for x in jax.tree.leaves(q))
  return p, optimizer.update(grads, optimizer.init(p), p, hparams(lr, decay), loss)[0]


def test_adamw_is_optax_adamw_over_several_steps():
  cfg = OptimConfig(weight_decay_policy=())
  ours, theirs = make_optimizer(cfg, AXES), optax.adamw(0.1, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=0.3)
  p = q = params()
  state, other = ours.init(p), theirs.init(p)
  for seed in range(3):
    key = jax.random.key(seed)
    grads = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), p)
    p, state = ours.update(grads, state, p, hparams(decay=0.3), None)
    changes, other = theirs.update(grads, other, q)
    q = optax.apply_updates(q, changes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), p, q)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free", "sophia"])
def test_every_optimizer_lowers_a_quadratic(name):
  cfg = OptimConfig(name=name)
  optimizer = make_optimizer(cfg, AXES)
  loss = lambda p: sum(jnp.sum(x ** 2) for x in jax.tree.leaves(p))
  p = params()
  state, start = optimizer.init(p), loss(p)
  for _ in range(30):
    p, state = optimizer.update(jax.grad(loss)(p), state, p, hparams(0.02), loss)
  assert loss(optimizer.eval_params(state, p)) < 0.9 * start


def test_decay_spares_biases_and_scales_with_the_learning_rate():
  zero = jax.tree.map(jnp.zeros_like, params())
  before, after = one_step(OptimConfig(), zero, lr=0.1, decay=0.5)
  np.testing.assert_allclose(after["layers"]["mlp"]["up"]["kernel"], 0.95 * before["layers"]["mlp"]["up"]["kernel"],
                             rtol=1e-6)
  np.testing.assert_array_equal(after["layers"]["mlp"]["up"]["bias"], before["layers"]["mlp"]["up"]["bias"])


def test_the_first_pattern_that_matches_counts():
  policy = ((r"mlp/up", 0.0), (r"kernel$", 3.0))
  factors = policy_factors("learning_rate_policy", policy, AXES)
  assert factors["layers"]["mlp"]["up"] == {"kernel": 0.0, "bias": 0.0}
  assert factors["layers"]["attention"]["out"]["kernel"] == 3.0
  assert factors["embed"]["embedding"] == 1.0
  ones = jax.tree.map(jnp.ones_like, params())
  before, after = one_step(OptimConfig(name="sgd", learning_rate_policy=policy), ones, lr=0.1)
  change = jax.tree.map(lambda a, b: np.asarray(a - b), after, before)
  np.testing.assert_allclose(change["layers"]["attention"]["out"]["kernel"], -0.3, atol=1e-6)
  np.testing.assert_allclose(change["layers"]["mlp"]["up"]["kernel"], 0.0)
  np.testing.assert_allclose(change["embed"]["embedding"], -0.1, atol=1e-6)


def test_a_pattern_that_matches_nothing_is_an_error():
  with pytest.raises(UserError, match="learning_rate_policy has the pattern 'mpl'.*layers/mlp/up/kernel"):
    make_optimizer(OptimConfig(learning_rate_policy=(("mpl", 0.5),)), AXES)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam():
  grads = params()
  before, after = one_step(OptimConfig(name="muon", adam_learning_rate_ratio=0.5), grads, lr=1.0)
  change = jax.tree.map(lambda a, b: np.asarray(b - a), after, before)
  for update in change["layers"]["mlp"]["up"]["kernel"]:
    singular = np.linalg.svd(update, compute_uv=False) / (0.2 * 16 ** 0.5)
    assert (singular > 0.6).all() and (singular < 1.3).all()
  for update in change["layers"]["attention"]["out"]["kernel"].reshape(2, 8, 8):
    singular = np.linalg.svd(update, compute_uv=False) / (0.2 * 8 ** 0.5)
    assert singular.max() < 1.3 and np.median(singular) > 0.6
  # Adam with Nesterov's look-ahead: its first step is (1 + beta1 (1 - beta1) / (1 - beta1^2)) times the sign.
  np.testing.assert_allclose(np.abs(change["embed"]["embedding"]), 0.5 * (1 + 0.9 * 0.1 / 0.19), rtol=1e-3)


def test_muon_orthogonalises_each_experts_matrix():
  cfg = OptimConfig(name="muon", weight_decay_policy=())
  axes = {"layers": {"up": ("layers", "expert", "embed", "mlp"), "down": ("layers", "expert", "mlp", "embed")}}
  random = np.random.default_rng(0)
  grads = {"layers": {"up": jnp.asarray(random.normal(size=(2, 3, 8, 16)), jnp.float32),
                      "down": jnp.asarray(random.normal(size=(2, 3, 16, 8)), jnp.float32)}}
  optimizer = make_optimizer(cfg, axes)
  params = jax.tree.map(jnp.zeros_like, grads)
  after, _ = optimizer.update(grads, optimizer.init(params), params, hparams(1.0), jnp.zeros(()))
  for update in jax.tree.leaves(after):
    singular = np.linalg.svd(np.asarray(update), compute_uv=False) / (0.2 * 16 ** 0.5)
    assert singular.shape == (2, 3, 8) and (singular > 0.6).all() and (singular < 1.3).all()


def test_clipping_keeps_direction_and_reports_the_norm_before():
  sums, weight = {"a": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])}, jnp.asarray(2.0)
  clipped, norm = mean_and_clip(sums, weight, 1.0)
  assert float(norm) == 5.0
  np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
  for max_norm in (10.0, None):
    np.testing.assert_array_equal(mean_and_clip(sums, weight, max_norm)[0]["b"], [4.0])


def test_schedule_free_averages():
  cfg = dataclasses.replace(OptimConfig(name="schedule_free"), beta1=0.9)
  optimizer = make_optimizer(cfg, AXES)
  p = params()
  state = optimizer.init(p)
  for _ in range(3):
    p, state = optimizer.update(params(), state, p, hparams(0.1), None)
  averaged = optimizer.eval_params(state, p)
  assert float(jnp.abs(averaged["embed"]["embedding"] - p["embed"]["embedding"]).max()) > 1e-3
