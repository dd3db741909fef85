"""Experts against a loop over them, routing with ties, slots that run out, and the same numbers on every mesh."""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import config as config_lib
from lmjax import partitioning, train
from lmjax.config import ModelConfig, ObjectiveConfig
from lmjax.models import moe
from lmjax.models.attention import Context, init_cache
from lmjax.models.layers import ACTIVATIONS
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import causal_lm

BASE = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, vocab_size=50,
                   max_positions=64, dtype="float32", init_std=0.2, position="rotary", norm="rmsnorm",
                   activation="silu", gated_mlp=True, use_bias=False, num_experts=4, experts_per_token=2, expert_dim=24,
                   attention_impl="xla")
VARIANTS = {
    "mixtral": {},
    "qwen": dict(shared_expert_dim=40, normalize_expert_weights=False, experts_per_token=3),
    "ungated": dict(gated_mlp=False, activation="gelu", experts_per_token=1),
    "capacity": dict(expert_capacity_factor=1.0),
    "shared_layers": dict(share_layers=True, num_experts=6),
}


def jitted(function):
  """Compiles with little optimisation, which takes most of the time and gains nothing here."""
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def make(**changes):
  model = make_model(dataclasses.replace(BASE, **changes))
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
  random = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: jnp.asarray(0.2 * random.normal(size=x.shape), x.dtype), shapes)


def tokens(rows=2, length=20, seed=1):
  return jax.random.randint(jax.random.key(seed), (rows, length), 0, 50)


def layer(cfg, x_BTD, params, context=Context()):
  """Applies one mixture: its output and what its router reported."""
  y, reported = moe.Moe(cfg).apply({"params": params}, x_BTD, context, mutable=[moe.ROUTER])
  return y, reported[moe.ROUTER]["stats"]


def run_layer(cfg, *args):
  return jitted(functools.partial(layer, cfg))(*args)


def one_layer(params, index=0):
  return jax.tree.map(lambda x: x[index], params["layers"]["mlp"])


def loop(cfg, x_BTD, params, keep=None):
  """The same by a loop over tokens' choices, each expert applied to every token."""
  act = ACTIVATIONS[cfg.activation]
  mlp = lambda x, p: (act(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"]) if cfg.gated_mlp
                      else act(x @ p["up"]["kernel"])) @ p["down"]["kernel"]
  probs = jax.nn.softmax(x_BTD @ params["router"]["kernel"])
  chosen = jnp.argsort(-probs, axis=-1, stable=True)[..., :cfg.experts_per_token]
  y = jnp.zeros_like(x_BTD)
  top = jnp.take_along_axis(probs, chosen, -1)
  gates = top / top.sum(-1, keepdims=True) if cfg.normalize_expert_weights else top
  for expert in range(cfg.num_experts):
    own = {name: {"kernel": params[name]["kernel"][expert]} for name in ("gate", "up", "down") if name in params}
    hit = chosen == expert
    if keep is not None:
      hit = hit & keep
    y += (jnp.where(hit, gates, 0).sum(-1))[..., None] * mlp(x_BTD, own)
  if cfg.shared_expert_dim:
    y += jax.nn.sigmoid(x_BTD @ params["shared_gate"]["kernel"])[..., None] * mlp(x_BTD, params["shared"])
  return y


def inputs(rows=3, length=21):
  return jax.random.normal(jax.random.key(3), (rows, length, BASE.embed_dim))


@pytest.mark.parametrize("name", ["mixtral", "qwen", "ungated"])
def test_dropless_is_a_loop_over_the_experts(name):
  model, params = make(**VARIANTS[name])
  params, x, cfg = one_layer(params), inputs(), model.cfg

  def output_and_gradients(function):
    def total(params, x):
      y = function(params, x)
      return jnp.sum(jnp.sin(y)), y
    grads, y = jitted(jax.grad(total, (0, 1), has_aux=True))(params, x)
    return y, grads
  ours = output_and_gradients(lambda params, x: layer(cfg, x, params)[0])
  theirs = output_and_gradients(lambda params, x: loop(cfg, x, params))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def test_of_experts_that_are_equal_the_first_are_chosen():
  model, params = make(num_experts=6)
  params, x = one_layer(params), inputs()
  router = params["router"]["kernel"]
  params["router"]["kernel"] = router.at[:, 4].set(router[:, 1]).at[:, 5].set(router[:, 1])
  np.testing.assert_allclose(run_layer(model.cfg, x, params)[0], loop(model.cfg, x, params), atol=1e-5)
  params["router"]["kernel"] = jnp.zeros_like(router)
  y, stats = run_layer(model.cfg, x, params)
  np.testing.assert_array_equal(stats["load"], [[1, 1, 0, 0, 0, 0]] * 3)
  np.testing.assert_allclose(y, loop(model.cfg, x, params), atol=1e-5)


def test_with_capacity_for_all_nothing_is_dropped():
  model, params = make(expert_capacity_factor=2.0)  # 2 of 4 experts a token: each may take all.
  params, x = one_layer(params), inputs()
  assert moe.capacity(model.cfg, 21) == 21
  y, stats = run_layer(model.cfg, x, params)
  np.testing.assert_allclose(y, loop(model.cfg, x, params), atol=1e-5)
  np.testing.assert_array_equal(stats["dropped"], 0)


def test_beyond_an_experts_capacity_later_tokens_are_dropped():
  model, params = make(expert_capacity_factor=0.5, experts_per_token=2)
  cfg, params, x = model.cfg, one_layer(params), inputs()
  probs = np.asarray(jax.nn.softmax(x @ params["router"]["kernel"]))
  chosen = np.argsort(-probs, axis=-1, kind="stable")[..., :2]
  keep, slots = np.zeros(chosen.shape, bool), moe.capacity(cfg, 21)
  assert slots == 6  # 2 * 21 / 4 / 2, rounded up.
  for row in range(3):
    used = [0] * 4
    for at in range(21):
      for choice in range(2):
        expert = chosen[row, at, choice]
        keep[row, at, choice] = used[expert] < slots
        used[expert] += 1
  y, stats = run_layer(cfg, x, params)
  np.testing.assert_allclose(y, loop(cfg, x, params, keep), atol=1e-5)
  np.testing.assert_allclose(stats["dropped"], 1 - keep.mean((1, 2)), atol=1e-6)
  assert 0.2 < keep.mean() < 0.8


@pytest.mark.parametrize("factor", [None, 0.5])
def test_padding_takes_no_slot_and_is_not_counted(factor):
  model, params = make(expert_capacity_factor=factor)
  params, x = one_layer(params), inputs(1, 12)
  segments = jnp.array([[0] * 5 + [1] * 4 + [2] * 3])
  y, stats = run_layer(model.cfg, x, params, Context(segment_ids_BT=segments))
  # As many slots as in the padded row, which is longer.
  same = dataclasses.replace(model.cfg, expert_capacity_factor=factor and 12 / 7 * factor)
  assert factor is None or moe.capacity(same, 7) == moe.capacity(model.cfg, 12)
  alone, expected = run_layer(same, x[:, 5:], params)
  np.testing.assert_allclose(y[:, 5:], alone, atol=1e-6)
  np.testing.assert_array_equal(y[:, :5], 0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats, expected)


@pytest.mark.parametrize("name", ["capacity", "shared_layers"])
def test_a_logit_depends_on_no_later_token(name):
  model, params = make(**VARIANTS[name])
  x = tokens()
  apply = jitted(lambda x: model.apply({"params": params}, x))
  logits = apply(x)
  changed = apply(x.at[:, 11:].set((x[:, 11:] + 1) % 50))
  np.testing.assert_allclose(logits[:, :11], changed[:, :11], atol=1e-5)
  assert float(jnp.abs(logits[:, 11:] - changed[:, 11:]).max()) > 1e-3


def test_decoding_with_a_cache_equals_the_whole_forward_pass():
  model, params = make(**VARIANTS["qwen"])
  x = tokens(length=12)
  whole = jitted(model.apply)({"params": params}, x)
  step = jitted(lambda toks, at, cache: model.apply({"params": params}, toks, at, cache, method="step"))
  logits, cache = step(x[:, :7], jnp.broadcast_to(jnp.arange(7), (2, 7)), init_cache(model.cfg, 2, 16))
  np.testing.assert_allclose(logits, whole[:, 6], atol=2e-5)
  for i in range(7, 12):
    logits, cache = step(x[:, i:i + 1], jnp.full((2, 1), i), cache)
    np.testing.assert_allclose(logits, whole[:, i], atol=2e-5)


def test_loops_and_rematerialisation_change_no_gradient():
  def grads(**changes):
    model, params = make(**VARIANTS["qwen"], **changes)
    batch = {"inputs": tokens(), "targets": tokens(seed=2), "weights": jnp.ones((2, 20))}
    loss = lambda p: causal_lm.loss(model, p, batch, ObjectiveConfig(router_balance=1.0, router_z_loss=1.0))[0]
    return jax.tree.leaves(jitted(jax.grad(loss))(params))
  for a, b in zip(grads(scan_layers=False), grads(remat_policy="none"), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


# The momentum of plain SGD is, after its first step, the gradient itself.
def loss_and_gradients(mesh=(), count=1, **changes):
  """Returns the metrics and the gradients of one step, under a mesh and a number of microbatches."""
  config = config_lib.base_config()
  config.model.update({**dataclasses.asdict(BASE), "vocab_size": 64, **changes})
  config.data.seq_len = 16
  config.objective.update(router_balance=0.3, router_z_loss=0.1)
  config.train.update(num_steps=1, batch_size=32, grad_accum_steps=count)
  config.optim.update(name="sgd", clip_norm=None)
  config.mesh.update({"data": 1, **dict(mesh)})
  config = config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), vocab_size=64), tokens_per_epoch=10**6)
  num_devices = math.prod(dataclasses.asdict(config.mesh).values())
  setup = train.build(config, partitioning.make_mesh(config.mesh, jax.devices()[:num_devices]))
  random = np.random.default_rng(0)
  x = random.integers(0, 50, (32, 17)).astype(np.int32)
  lengths = random.integers(1, 17, 32)[:, None]  # The rest is padding.
  real = np.arange(16) < lengths
  batch = {"inputs": x[:, :-1], "targets": x[:, 1:], "weights": real.astype(np.float32),
           "positions": np.tile(np.arange(16, dtype=np.int32), (32, 1)), "segment_ids": real.astype(np.int32)}
  params = jax.tree.map(lambda x: 0.2 * random.normal(size=x.shape).astype(x.dtype), setup.state_shapes.params)
  hparams = {"learning_rate": np.float32(0), "weight_decay": np.float32(0), "seed": np.uint32(0)}
  with partitioning.use_mesh(setup.mesh):
    state = jax.device_put(jax.jit(setup.start)(params, jax.random.key(0)), setup.state_shardings)
    args = state, partitioning.global_batch(setup.mesh, batch, 32), hparams
    step = train.make_train_step(setup).lower(*args).compile({"xla_backend_optimization_level": 0})
    state, out = step(*args)
  grads = jax.device_get(optax.tree.get(state.opt_state, "trace"))
  return jax.device_get(out), {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
                               for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}, step


QWEN = dict(shared_expert_dim=16, normalize_expert_weights=False)
on_one_device = functools.cache(lambda factor: loss_and_gradients(expert_capacity_factor=factor, **QWEN)[:2])


@pytest.mark.parametrize("factor, mesh, count", [
    (None, dict(expert=4, data=2), 2), (None, dict(expert=2, fsdp=2, tensor=2), 4),
    (None, dict(data=2, fsdp=2, tensor=2), 1), (0.8, dict(expert=4, data=2), 2),
    pytest.param(0.8, dict(expert=2, fsdp=2, tensor=2), 1, marks=pytest.mark.slow)])
def test_neither_mesh_nor_microbatches_change_loss_metrics_or_gradients(factor, mesh, count):
  expected, expected_grads = on_one_device(factor)
  found, grads, _ = loss_and_gradients(mesh, count, expert_capacity_factor=factor, **QWEN)
  assert found.keys() == expected.keys() and "router_balance" in found
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
  assert (expected["router_dropped"] > 0.05) == (factor is not None)
  assert grads.keys() == expected_grads.keys()
  for name, leaf in expected_grads.items():
    scale = np.abs(leaf).max()
    assert scale > 0, name
    np.testing.assert_allclose(grads[name], leaf, rtol=0, atol=1e-5 * scale, err_msg=name)
