"""The TPU kernel against all scores at once, interpreted; and what the TPU's own compiler makes of it, where it is."""

import collections
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import partitioning, plan, train
from lmjax.config import MeshConfig, UserError, base_config, from_config_dict
from lmjax.models import families, splash
from lmjax.models.attention import AttentionSpec, dot_product_attention
from lmjax.plan.batches import abstract_batch
from lmjax.plan.topologies import described_devices, parse_topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
# Documents of 40, 88 and 42 tokens, then padding; and two of half a row.
SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [40, 88, 42, 86], axis=1).astype(np.int32)
# The attention, its length, whether there are documents.
CASES = {
    "causal": (AttentionSpec(), 256, False),
    "bidirectional": (AttentionSpec(causal=False), 256, False),
    "window": (AttentionSpec(window=37), 256, False),
    "bidirectional window": (AttentionSpec(causal=False, window=37), 256, False),
    "softcap": (AttentionSpec(softcap=1.5), 256, False),
    "scale": (AttentionSpec(scale=1.0), 256, False),
    "documents": (AttentionSpec(), 256, True),
    "bidirectional documents, window, softcap and scale": (
        AttentionSpec(causal=False, window=50, softcap=2.0, scale=0.5), 256, True),
    "a length that no block divides": (AttentionSpec(), 150, False),
    "both at once": (AttentionSpec(causal=False), 150, False),
}


def random_inputs(batch, length, num_heads=4, num_kv_heads=2, head_dim=8):
  """Returns q, k, v, and what the output's gradient is."""
  random = np.random.default_rng(0)
  return [random.normal(size=(batch, length, heads, head_dim)).astype(np.float32)
          for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]


def output_and_gradients(implementation, spec, q, k, v, dy, segments=None):
  @jax.jit
  def run(q, k, v, dy):
    y, pull = jax.vjp(lambda *x: dot_product_attention(
        *x, spec, segment_ids_BT=segments, implementation=implementation), q, k, v)
    return y, *pull(dy)
  return jax.device_get(run(q, k, v, dy))


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(splash, "_BLOCKS", ((0, 128),))


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_all_scores(name, small_blocks):
  spec, length, documents = CASES[name]
  inputs, segments = random_inputs(2, length), SEGMENTS if documents else None
  got, wanted = (output_and_gradients(implementation, spec, *inputs, segments) for implementation in ("splash", "xla"))
  for one, other in zip(got, wanted):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("head_dim", [8, 128])
def test_queries_gradients_by_a_kernel_of_their_own_are_the_same(head_dim, small_blocks, monkeypatch):
  monkeypatch.setattr(splash, "_FUSED_BLOCKS", 1)
  inputs = random_inputs(1, 256, num_kv_heads=1, head_dim=head_dim)
  got, wanted = (output_and_gradients(name, AttentionSpec(), *inputs) for name in ("splash", "xla"))
  for one, other in zip(got, wanted):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("rows", [4, 3])
def test_a_mesh_over_rows_and_heads_changes_nothing(rows, small_blocks):
  inputs, segments = random_inputs(rows, 128), np.tile(SEGMENTS[:1, :128], (rows, 1))
  alone = output_and_gradients("splash", AttentionSpec(), *inputs, segments)
  with partitioning.use_mesh(partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    split = output_and_gradients("splash", AttentionSpec(), *inputs, segments)
  for one, other in zip(split, alone):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("told,spec,given", [
    ("alibi positions", AttentionSpec(alibi=True), {}),
    ("prefixes", AttentionSpec(), dict(prefix_BS=jnp.ones((1, 4), bool))),
    ("a relative bias", AttentionSpec(), dict(bias_BNTS=jnp.zeros((1, 2, 4, 4)))),
    ("explicit positions or a key-value cache", AttentionSpec(), dict(query_positions_BT=jnp.zeros((1, 4), jnp.int32))),
    ("explicit positions or a key-value cache", AttentionSpec(), dict(key_positions_BS=jnp.zeros((1, 4), jnp.int32))),
])
def test_what_the_kernel_does_not_do_is_refused_by_name(told, spec, given):
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(UserError, match=f"attention_impl is splash, which does not do {told}; use auto"):
    dot_product_attention(x, x, x, spec, implementation="splash", **given)


def test_other_machines_are_refused(monkeypatch):
  monkeypatch.setattr(partitioning, "platform", lambda: "gpu")
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(UserError, match="does not do GPUs"):
    dot_product_attention(x, x, x, AttentionSpec(), implementation="splash")


@pytest.mark.parametrize("length,query_bytes,told", [
    (128, 256, {"block_q": 128, "use_fused_bwd_kernel": True}),
    (640, 256, {"block_q": 128, "use_fused_bwd_kernel": True}),
    (1024, 256, {"block_q": 512, "use_fused_bwd_kernel": True}),
    (8192, 256, {"block_q": 1024, "block_kv_dkv_compute": 512}),
    (8192, 1024, {"block_q": 512}),
    (32768, 256, {"block_q": 1024, "block_q_dq": 1024}),
])
def test_blocks_divide_the_length(length, query_bytes, told):
  sizes = splash._block_sizes(length, query_bytes)
  assert told.items() <= sizes.items()
  assert all(length % size == 0 for name, size in sizes.items() if name.startswith("block"))


def compiled_step(implementation, policy, seq_len=384):
  """Returns the text of a small model's training step for four TPUs."""
  config = base_config()
  config.model.update({**families.debug(families.preset("llama")), "attention_impl": implementation,
                       "num_layers": 2, "remat_policy": policy, "max_positions": None})
  config.objective.update(families.objective_of(config.model))
  config.data.update(tokenizer="bytes", seq_len=seq_len)
  config.train.update(num_steps=10, batch_size=8)
  config.mesh.update(data=1, fsdp=2, tensor=2)
  config = plan.resolved(from_config_dict(config))
  mesh = partitioning.make_mesh(config.mesh, described_devices(parse_topology("v5e-4")))
  setup = train.build(config, mesh)
  return plan.lower(setup, abstract_batch(config, mesh)).compile().as_text()


@needs_libtpu
@pytest.mark.parametrize("policy,kernels", [("products", {"fwd": 1, "dkv": 1}), ("full", {"fwd": 2, "dkv": 1})])
def test_on_tpus_a_step_has_the_kernels_and_no_array_of_all_scores(policy, kernels):
  """The loop over layers has each once, and the forward one again only where nothing of a block is saved."""
  text = compiled_step("auto", policy)
  calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
  assert collections.Counter(re.search(r"splash_mha_(fwd|dkv)", line)[1] for line in calls) == kernels
  assert not re.search(r"384,384\]", text)


@needs_libtpu
def test_on_tpus_all_scores_would_be_found():
  assert re.search(r"384,384\]", compiled_step("xla", "products"))
