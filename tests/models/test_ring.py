"""Attention over a split length gives what one device gives, and sends what theory says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import partitioning
from lmjax.config import MeshConfig
from lmjax.models import ring
from lmjax.models.attention import dot_product_attention
from lmjax.models.masks import AttentionSpec

B, T, N, K, H = 2, 32, 4, 2, 8
SPECS = {
    "causal": AttentionSpec(), "full": AttentionSpec(causal=False), "window": AttentionSpec(window=6),
    "wide_window": AttentionSpec(window=19), "full_window": AttentionSpec(causal=False, window=6),
    "softcap": AttentionSpec(softcap=2.0), "alibi": AttentionSpec(alibi=True), "scale": AttentionSpec(scale=0.7)}
MESHES = {"8": dict(data=1, context=8), "4x2": dict(data=1, context=4, tensor=2),
          "2x2x2": dict(data=2, context=2, tensor=2)}


def arrays(kv_heads=K):
  random = np.random.default_rng(0)
  make = lambda heads: random.normal(size=(B, T, heads, H)).astype(np.float32)
  return make(N), make(kv_heads), make(kv_heads), make(N)


def loss_and_grads(qkv, out, spec, **options):
  def loss(q, k, v):
    return jnp.sum(out * dot_product_attention(q, k, v, spec, **options))
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*qkv)


def check(spec, mesh, how, **sides):
  *qkv, out = arrays()
  expected = loss_and_grads(qkv, out, spec, implementation="xla", **sides)
  with partitioning.use_mesh(partitioning.make_mesh(MeshConfig(**mesh))):
    assert ring.is_served(*qkv[:2])
    got = loss_and_grads(qkv, out, spec, context_attention=how, **sides)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("how", ["ring", "gather"])
@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_same_attention(name, how):
  check(SPECS[name], MESHES["4x2"], how)


@pytest.mark.parametrize("how", ["ring", "gather"])
@pytest.mark.parametrize("mesh", ["8", "2x2x2"])
def test_on_other_meshes(mesh, how):
  check(AttentionSpec(), MESHES[mesh], how)


@pytest.mark.parametrize("how", ["ring", "gather"])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_and_prefixes(causal, how):
  ids = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [5, 9, 11, 7], axis=1).astype(np.int32)
  check(AttentionSpec(causal), MESHES["4x2"], how, segment_ids_BT=ids)
  if causal:
    prefix = np.arange(T) < np.array([[11], [20]])
    check(AttentionSpec(), MESHES["4x2"], how, segment_ids_BT=ids, prefix_BS=prefix)


def program(how):
  *qkv, _ = arrays()
  with partitioning.use_mesh(partitioning.make_mesh(MeshConfig(**MESHES["8"]))) as mesh:
    split = jax.NamedSharding(mesh, partitioning.spec("batch", "length"))
    loss = lambda q, k, v: jnp.sum(dot_product_attention(q, k, v, AttentionSpec(), context_attention=how))
    grads = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=(split,) * 3, out_shardings=(split,) * 3)
    return grads.lower(*qkv).compile().as_text()


def test_nothing_is_gathered_in_a_ring_and_no_row_of_scores_is_whole():
  text = program("ring")
  assert "all-gather" not in text and "all-reduce" not in text
  assert not re.search(rf"\[[\d,]*\b{T},{T}\]", text) and "collective-permute" in text


def test_gathering_gathers():
  text = program("gather")
  assert "all-gather" in text and "reduce-scatter" in text


def test_chunks_are_dealt_evenly():
  """Chunks 0..7 on four devices: each has a low and a high one that together see nine of the 36 pairs."""
  with partitioning.use_mesh(partitioning.make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
    to = [dict(ring._routes(half)) for half in range(2)]
  held = {device: [] for device in range(4)}
  for half in range(2):
    for device in range(4):
      held[to[half][device]].append(2 * device + half)
  assert {device: sorted(chunks) for device, chunks in held.items()} == {0: [0, 7], 1: [1, 6], 2: [2, 5], 3: [3, 4]}
