"""What every decoder must keep: causality, document boundaries, and the same numbers however they are computed."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import ModelConfig
from lmjax.models import blockwise
from lmjax.models.attention import init_cache
from lmjax.models.transformer import init_params, make_model

BASE = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, vocab_size=50,
                   max_positions=64, dtype="float32", init_std=0.2)
VARIANTS = {
    "gpt2": {},
    "llama": dict(position="rotary", norm="rmsnorm", activation="silu", gated_mlp=True, use_bias=False, num_kv_heads=2,
                  tie_embeddings=False),
    "sinusoidal_post": dict(position="sinusoidal", block="post", activation="relu"),
    "alibi_parallel": dict(position="alibi", block="parallel"),
    "none_window": dict(position="none", attention_window=5, activation="gelu"),
    "local_and_global": dict(position="rotary", attention_window=5, attention_pattern=("local", "global", "local"),
                             local_rope_theta=100.0, block="sandwich", norm="rmsnorm", norm_offset=True, num_layers=4,
                             attention_scale=0.3),
    "stretched_inner": dict(position="rotary", rope_scaling="llama3", rope_factor=4.0, rope_original_positions=16,
                            rotary_fraction=0.5, block="inner", qk_norm="all", num_kv_heads=2, qkv_bias=False),
    "parallel_two_shared": dict(block="parallel_two", share_layers=True, embedding_dim=12, embedding_norm=True,
                                token_types=2, position_offset=2, head_transform=True, head_bias=True),
    "qk_norm_softcaps": dict(position="rotary", qk_norm="head", attention_softcap=5.0, logit_softcap=3.0,
                             scale_embeddings=True, norm_bias=False),
}


def make(**changes):
  cfg = dataclasses.replace(BASE, **changes)
  model = make_model(cfg)
  # Most of an initialisation goes into compiling random numbers that are drawn once.
  init = jax.jit(lambda key: nn.unbox(init_params(model, key)), compiler_options={"xla_backend_optimization_level": 0})
  return model, init(jax.random.key(0))


def tokens(rows=2, length=20, seed=1):
  return jax.random.randint(jax.random.key(seed), (rows, length), 0, 50)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_logit_depends_on_no_later_token(name):
  model, params = make(**VARIANTS[name])
  x = tokens()
  logits = model.apply({"params": params}, x)
  changed = model.apply({"params": params}, x.at[:, 11:].set((x[:, 11:] + 1) % 50))
  np.testing.assert_allclose(logits[:, :11], changed[:, :11], atol=1e-5)
  assert float(jnp.abs(logits[:, 11:] - changed[:, 11:]).max()) > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_causality_by_gradient(name):
  model, params = make(**VARIANTS[name])

  # Twenty different tokens: the gradient of row i of the embedding is that of position i.
  def output(table):
    own = dict(params, embed=dict(params["embed"], embedding=table))
    x_BTD = model.apply({"params": own}, jnp.arange(20)[None], method="features")[0]
    return jnp.sum(jnp.sin(x_BTD[0, 9]))

  grads = jax.grad(output)(params["embed"]["embedding"])[:20]
  norms = np.abs(np.asarray(grads)).max(-1)
  assert (norms[10:] == 0).all()
  window = VARIANTS[name].get("attention_window")
  # Two layers of a window see twice as far; one that has none sees all.
  first = 0 if window is None or "attention_pattern" in VARIANTS[name] else 9 - 2 * (window - 1)
  assert (norms[first:10] > 0).all() and (norms[:first] == 0).all()


# Which input tokens the logits of a position depend on, in one layer: a row a position, a character an input.
DEPENDENCES = {
    "causal": ({}, None, ["100000", "110000", "111000", "111100", "111110", "111111"]),
    "window": (dict(attention_window=3), None, ["100000", "110000", "111000", "011100", "001110", "000111"]),
    "documents": ({}, [1, 1, 1, 2, 2, 0], ["100000", "110000", "111000", "000100", "000110", "000001"]),
    "documents and a window": (dict(attention_window=2), [1, 1, 1, 2, 2, 2],
                               ["100000", "110000", "011000", "000100", "000110", "000011"]),
}
SCORES = {"plain": {}, "softcap": dict(attention_softcap=2.0), "alibi": dict(position="alibi"),
          "rotary": dict(position="rotary", num_kv_heads=2)}


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("mask", DEPENDENCES)
def test_gradients_of_logits_are_zero_exactly_where_nothing_may_be_seen(mask, scores, implementation, monkeypatch):
  monkeypatch.setattr(blockwise, "_BLOCK", 4)
  changes, segments, table = DEPENDENCES[mask]
  model, params = make(num_layers=1, tie_embeddings=False, attention_impl=implementation, **changes, **SCORES[scores])
  segments = None if segments is None else jnp.array([segments])
  positions = None if segments is None else jnp.array([[0, 1, 2, 0, 1, 2]])
  mix = jax.random.normal(jax.random.key(1), (50,))

  # Six different tokens: the gradient of row s of the embedding is that of input s.
  def outputs(table):
    own = dict(params, embed=dict(params["embed"], embedding=table))
    return model.apply({"params": own}, jnp.arange(6)[None], positions, segments)[0] @ mix

  jacobian = jax.jit(jax.jacrev(outputs), compiler_options={"xla_backend_optimization_level": 0})
  grads_TSD = np.asarray(jacobian(params["embed"]["embedding"]))[:, :6]
  found = ["".join("1" if part.any() else "0" for part in row) for row in grads_TSD]
  assert found == table


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_equal_the_same_documents_alone(name):
  model, params = make(**VARIANTS[name])
  a, b = tokens(1, 8, seed=2), tokens(1, 12, seed=3)
  packed = model.apply({"params": params}, jnp.concatenate([a, b], 1),
                       jnp.concatenate([jnp.arange(8), jnp.arange(12)])[None], jnp.array([[1] * 8 + [2] * 12]))
  np.testing.assert_allclose(packed[:, :8], model.apply({"params": params}, a), atol=2e-5)
  np.testing.assert_allclose(packed[:, 8:], model.apply({"params": params}, b), atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_with_a_cache_equals_the_whole_forward_pass(name):
  model, params = make(**VARIANTS[name])
  x = tokens()
  whole = model.apply({"params": params}, x)
  cache = init_cache(model.cfg, 2, 24)
  step = jax.jit(lambda toks, at, cache: model.apply({"params": params}, toks, at, cache, method="step"))
  logits, cache = step(x[:, :7], jnp.broadcast_to(jnp.arange(7), (2, 7)), cache)
  np.testing.assert_allclose(logits, whole[:, 6], atol=2e-5)
  for i in range(7, 20):
    logits, cache = step(x[:, i:i + 1], jnp.full((2, 1), i), cache)
    np.testing.assert_allclose(logits, whole[:, i], atol=2e-5)


@pytest.mark.parametrize("changes", [dict(scan_layers=False), dict(remat_policy="full"), dict(remat_policy="none"),
                                     dict(remat_policy="full", scan_layers=False)])
@pytest.mark.parametrize("name", ["llama", "local_and_global", "parallel_two_shared"])
def test_loops_and_rematerialisation_change_no_gradient(name, changes):
  def grads(**changes):
    model, params = make(**VARIANTS[name], **changes)
    return jax.grad(lambda p: jnp.square(model.apply({"params": p}, tokens())).mean())(params)
  for a, b in zip(jax.tree.leaves(grads()), jax.tree.leaves(grads(**changes)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_dropout_is_on_exactly_when_a_key_is_given():
  model, params = make(dropout=0.5)
  run = lambda **kw: model.apply({"params": params}, tokens(), **kw)
  np.testing.assert_array_equal(run(), run())
  first, second = (run(rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
  assert float(jnp.abs(first - second).max()) > 1e-3


def test_the_type_follows_the_platform_unless_it_is_named():
  auto = dataclasses.replace(BASE, dtype="auto")
  assert make_model(auto, "cpu").cfg.dtype == "float32"
  assert make_model(auto, "tpu").cfg.dtype == make_model(auto, "gpu").cfg.dtype == "bfloat16"
  assert make_model(BASE, "tpu").cfg.dtype == "float32"
  model, params = make(dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  assert model.apply({"params": params}, tokens(), method="features")[0].dtype == jnp.bfloat16


def test_residual_projections_start_smaller():
  _, params = make(num_layers=8)
  assert float(jnp.std(params["layers"]["mlp"]["down"]["kernel"])) == pytest.approx(0.2 / 4, rel=0.05)
  assert float(jnp.std(params["layers"]["mlp"]["up"]["kernel"])) == pytest.approx(0.2, rel=0.05)


def test_gradients_of_a_frequent_token_add_up_in_float32():
  """In bfloat16 a sum of thousands of ones would stand still at 256."""
  model, params = make(dtype="bfloat16", position="none")
  def total(table):
    own = dict(params, embed=dict(params["embed"], embedding=table))
    embed = lambda module: module.embed(jnp.zeros((8, 512), jnp.int32), None)
    return model.apply({"params": own}, method=embed).astype(jnp.float32).sum()
  grads = jax.grad(total)(params["embed"]["embedding"])
  np.testing.assert_allclose(grads[0], 8 * 512.0)
