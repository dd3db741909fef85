"""The schedules of a pipeline: what runs when, how long it takes, and what a compiled step sends."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import partitioning
from lmjax.config import MeshConfig, ModelConfig, ObjectiveConfig
from lmjax.models import families, pipeline
from lmjax.models.attention import Context
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import causal_lm
from lmjax.plan.collectives import collectives

B, T, D = 32, 4, 8


def add_layers(params, x, numbers, context, key):
  """Layer n takes x to 2 x + n, and adds what its row reads."""
  for layer in range(len(numbers)):
    x = 2 * x + numbers[layer] + params[layer] * context.segment_ids_BT[..., None]
  return x, jnp.broadcast_to(numbers[:, None], (len(numbers), x.shape[0]))


@pytest.mark.parametrize("stages, microbatches, repeats", [
    (2, 2, 1), (2, 8, 1), (4, 4, 1), (4, 8, 1), (4, 16, 1), (8, 8, 1), (2, 2, 2), (2, 8, 4), (4, 4, 2), (4, 8, 2),
    (4, 16, 2), (8, 8, 1), (8, 32, 1)])
def test_every_row_goes_through_every_layer_once_and_in_order(stages, microbatches, repeats):
  x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
  ids = np.arange(B * T, dtype=np.int32).reshape(B, T)
  params = np.arange(8, dtype=np.float32) / 8
  expected = x.copy()
  for layer in range(8):
    expected = 2 * expected + layer + params[layer] * ids[..., None]
  mesh = partitioning.make_mesh(MeshConfig(data=1, stage=stages), jax.devices()[:stages])

  def run(params, x, ids):
    return pipeline.run(add_layers, params, x, Context(segment_ids_BT=ids), None, microbatches, repeats, lambda f: f)

  with partitioning.use_mesh(mesh):
    y, reported = jax.jit(run)(params, x, ids)
    text = str(jax.make_jaxpr(run)(params, x, ids))
  np.testing.assert_allclose(y, expected, rtol=1e-6)
  np.testing.assert_array_equal(reported, np.tile(np.arange(8)[:, None], (1, B)))
  # M R + S - 1 ticks: S - 1 of them are the bubble.
  assert f"length={microbatches * repeats + stages - 1}\n" in text


def program(axes, **changes):
  """Returns the collectives of a step's gradients, by kind and axes, and the shapes of the parameters."""
  model = make_model(ModelConfig(**{
      **families.llama("3-8B"), **dict(num_layers=8, embed_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64,
                                       vocab_size=64, dtype="float32", remat_policy="full"), **changes}))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  mesh = partitioning.make_mesh(MeshConfig(**{"data": 1, **axes}))
  shardings = partitioning.param_shardings(mesh, boxed)
  params = partitioning.laid_out(jax.tree.map(lambda x: x, nn.unbox(boxed)), shardings)
  tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=partitioning.batch_sharding(mesh))
  weights = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=partitioning.batch_sharding(mesh))
  loss = lambda params, batch: causal_lm.loss(model, params, batch, ObjectiveConfig())[0]
  with partitioning.use_mesh(mesh):
    batch = {"inputs": tokens, "targets": tokens, "weights": weights}
    compiled = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, batch).compile()
  return compiled.as_text(), collectives(compiled.as_text(), dict(mesh.shape), 8)


def test_stages_hand_on_microbatches_and_keep_their_parameters():
  text, found = program(dict(stage=4, data=2), stage_microbatches=8)
  handed = 16 // 8 // 2 * 64 * 32 * 4  # A device's part of a microbatch, in bytes.
  ticks = 8 + 4 - 1
  permutes = [one for one in found if one.kind == "collective-permute"]
  # Forward the belt, what is made, and what lies down on the belt; backward their gradients. Both places of the belt
  # are then turned once, forward and backward.
  sends = 6 * ticks + 4
  assert sum(one.count for one in permutes) == sends and sum(one.sent for one in permutes) == sends * handed
  # The largest parameter of a stage is [2, 32, 64]; nothing of that size is gathered over the stages.
  gathered = [one for one in found if one.kind in ("all-gather", "all-to-all") and "stage" in one.axes]
  assert all(one.sent / one.count < 2 * 32 * 64 * 4 for one in gathered), gathered
  assert "f32[8,32,64]" not in text  # Nobody holds all layers of a kernel.


def test_stages_split_layers_and_the_optimizer_with_them():
  mesh = partitioning.make_mesh(MeshConfig(data=2, stage=4))
  kernel = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 32, 64), jnp.float32), ("layers", "embed", "mlp"))
  split = partitioning.param_shardings(mesh, {"kernel": kernel})["kernel"]
  assert split.shard_shape((8, 32, 64)) == (2, 32, 64)


def test_a_split_length_is_never_whole():
  text, found = program(dict(context=8))
  assert "f32[16,64,32]" not in text and "f32[16,64,64]" not in text  # The residual stream, the MLP.
  permutes = sum(one.count for one in found if one.kind == "collective-permute")
  # Of k and v: seven steps forward, as many when blocks are made again and backward, where their gradients take eight.
  # The rest deals two chunks of q, k, v, the result and its sums, and takes them back.
  ring, dealing = (7 + 7 + 7 + 8) * 2, 2 * 10 + 18
  assert 8 * ring <= permutes <= 8 * (ring + dealing)
