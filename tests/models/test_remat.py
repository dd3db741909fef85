"""What the backward pass finds saved of a block under each policy, and that no gradient depends on it.

L = 2 layers, B = 2 rows, T = 20 tokens, D = 32, N = 4 heads of H = 8, K = 2 key-value heads, F = 64.
"""

import collections
import dataclasses

from flax import linen as nn
import jax
import numpy as np
import pytest

from lmjax.config import ModelConfig
from lmjax.models.transformer import init_params, make_model

BASE = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, vocab_size=50,
                   max_positions=64, dtype="float32", init_std=0.2, use_bias=False, gated_mlp=True, activation="silu",
                   norm="rmsnorm", position="rotary", tie_embeddings=False)
MODELS = {
    "llama": {}, "unrolled": dict(scan_layers=False), "mixture": dict(num_experts=4, expert_dim=24),
    "mixture_with_capacity": dict(num_experts=4, expert_dim=24, expert_capacity_factor=1.0),
    "encoder_decoder": dict(architecture="encoder_decoder", num_kv_heads=4, position="sinusoidal"),
    "t5": dict(architecture="encoder_decoder", num_kv_heads=4, position="relative")}
NAMED = dict(remat_policy="names", remat_save=("query", "up"), remat_offload=("attention", "gate"))
POLICIES = {**{policy: dict(remat_policy=policy) for policy in ("products", "offload", "attention", "full")},
            "names": NAMED}

# Of a Llama's layers: what is saved beside what "full" saves. Of "down" nothing is, for what is added to the residual
# stream is not needed again; of attention there are the result and the logarithms of its softmax sums.
QUERY, KEY_OR_VALUE, OUT, UP_OR_GATE = (2, 2, 20, 4, 8), (2, 2, 20, 2, 8), (2, 2, 20, 32), (2, 2, 20, 64)
ATTENTION = {(2, 2, 4, 20, 8): 1, (2, 2, 4, 20): 1}
PRODUCTS = {QUERY: 1, KEY_OR_VALUE: 2, OUT: 1, UP_OR_GATE: 2, **ATTENTION}
SAVED = {"products": {"Device": PRODUCTS}, "offload": {"Host": PRODUCTS}, "attention": {"Device": ATTENTION},
         "names": {"Device": {QUERY: 1, UP_OR_GATE: 1}, "Host": {UP_OR_GATE: 1, **ATTENTION}}}


def loss_of(name, policy):
  cfg = dataclasses.replace(BASE, **{**MODELS[name], **policy})
  model = make_model(cfg)
  x = jax.random.randint(jax.random.key(1), (2, 20), 0, 50)
  args = (x, x[:, :12]) if cfg.architecture == "encoder_decoder" else (x,)
  return model, lambda params: model.apply({"params": params}, *args).astype("float32").std()


def gradients(name, policy):
  model, loss = loss_of(name, policy)
  options = {"xla_backend_optimization_level": 0}
  params = jax.jit(lambda: nn.unbox(init_params(model, jax.random.key(0))), compiler_options=options)()
  return jax.tree.leaves(jax.jit(jax.grad(loss), compiler_options=options)(params))


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_depends_on_the_policy(name):
  expected = gradients(name, dict(remat_policy="none"))
  assert max(float(abs(x).max()) for x in expected) > 1e-3
  for policy in POLICIES.values():
    for a, b in zip(gradients(name, policy), expected, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)


def residuals(name, policy):
  """Returns how many arrays of each shape and place the backward pass finds."""
  model, loss = loss_of(name, policy)
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
  found = jax.make_jaxpr(lambda params: jax.tree.leaves(jax.vjp(loss, params)[1]))(shapes)
  return collections.Counter((x.memory_space.name, x.shape) for x in found.out_avals)


@pytest.mark.parametrize("policy", SAVED)
def test_what_is_saved_is_what_the_policy_names(policy):
  saved, least = residuals("llama", POLICIES[policy]), residuals("llama", POLICIES["full"])
  assert not least - saved and all(place == "Device" for place, _ in least)
  assert saved - least == {(place, shape): count for place, shapes in SAVED[policy].items()
                           for shape, count in shapes.items()}


def test_the_experts_products_have_the_names_of_an_mlps():
  policy = dict(remat_policy="names", remat_save=("up",), remat_offload=("gate",))
  extra = residuals("mixture", policy) - residuals("mixture", POLICIES["full"])
  assert extra == {("Device", (2, 80, 24)): 1, ("Host", (2, 80, 24)): 1}  # Of two experts for each of 40 tokens.
