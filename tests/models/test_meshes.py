"""Tests that a mesh over eight devices changes neither loss nor gradients of any decoder, each with its own options."""

from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import partitioning
from lmjax.config import MeshConfig, ModelConfig, ObjectiveConfig
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import causal_lm

SIZES = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=64,
             max_positions=32, dtype="float32", remat_policy="none")
ALL_HEADS = dict(num_kv_heads=4)
WINDOW = dict(attention_window=5)
EXPERTS = dict(num_experts=4, experts_per_token=2, expert_dim=24)
SPLIT, BY_EXPERT = dict(data=2, fsdp=2, tensor=2), dict(data=2, expert=4)
# The family, what must be small too, the mesh.
FAMILIES = {
    "gpt2": (families.gpt2(), ALL_HEADS, SPLIT),
    "gpt3": (families.gpt3(), {**ALL_HEADS, **WINDOW}, SPLIT),
    "llama": (families.llama("3-8B"), dict(rope_scaling="llama3", rope_factor=4.0, rope_original_positions=16), SPLIT),
    "smollm": (families.smollm(), {}, SPLIT),
    "mistral": (families.mistral(), WINDOW, SPLIT),
    "qwen2": (families.qwen2(), {}, SPLIT),
    "qwen3": (families.qwen3(), {}, SPLIT),
    "gemma": (families.gemma("2b"), {}, SPLIT),
    "gemma2": (families.gemma("2-2b"), WINDOW, SPLIT),
    "gemma3": (families.gemma("3-4b"), dict(WINDOW, attention_pattern=("local", "global")), SPLIT),
    "pythia": (families.pythia(), ALL_HEADS, SPLIT),
    "olmo2": (families.olmo2(), {}, SPLIT),
    "mixtral": (families.mixtral(), EXPERTS, BY_EXPERT),
    "qwen2_moe": (families.qwen2_moe(), dict(EXPERTS, shared_expert_dim=40), BY_EXPERT),
    "qwen3_moe": (families.qwen3_moe(), EXPERTS, SPLIT),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mesh_changes_neither_loss_nor_gradients(name):
  preset, small, axes = FAMILIES[name]
  model = make_model(ModelConfig(**{**preset, **SIZES, **small}))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.2 * random.normal(size=x.shape).astype(x.dtype), nn.unbox(boxed))
  tokens = random.integers(0, 64, (8, 17)).astype(np.int32)
  real = (np.arange(16) < random.integers(4, 17, (8, 1))).astype(np.float32)  # The rest is padding.
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": real, "segment_ids": real.astype(np.int32),
           "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1))}

  def mean_loss(params, batch):
    objective = ObjectiveConfig(router_balance=0.3 if model.cfg.num_experts else 0.0)
    total = causal_lm.loss(model, params, batch, objective)[0]
    return total / jnp.sum(batch["weights"])

  def loss_and_gradients(params, batch):
    options = {"xla_backend_optimization_level": 0}  # Compiling is most of the time.
    return jax.device_get(jax.jit(jax.value_and_grad(mean_loss), compiler_options=options)(params, batch))

  loss, grads = loss_and_gradients(params, batch)
  mesh = partitioning.make_mesh(MeshConfig(**{"data": 1, **axes}))
  with partitioning.use_mesh(mesh):
    split = jax.device_put(params, partitioning.param_shardings(mesh, boxed))
    split_loss, split_grads = loss_and_gradients(split, partitioning.global_batch(mesh, batch, 8))
  kernels = split["layers"]["mlp"]["up"]["kernel"]
  assert kernels.addressable_shards[0].data.size * 4 == kernels.size
  assert split_loss == pytest.approx(loss, rel=1e-5)
  grads, split_grads = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (grads, split_grads))
  assert grads.keys() == split_grads.keys()
  for path, leaf in grads.items():
    # Without rotation a key's bias adds the same to all scores of a query: its gradient is zero but for rounding.
    no_effect = path.endswith("key/bias") and model.cfg.position == "learned"
    scale = np.abs(grads[path.replace("key", "query")] if no_effect else leaf).max()
    assert scale > 1e-6, path
    np.testing.assert_allclose(split_grads[path], leaf, rtol=0, atol=1e-5 * scale, err_msg=path)
