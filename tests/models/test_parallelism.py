"""Every mesh axis alone, and products of them, give the loss and gradients of one device, for three kinds of model."""

import itertools

from flax import linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from lmjax import partitioning
from lmjax.config import MeshConfig, ModelConfig, ObjectiveConfig
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import causal_lm, span_corruption

SIZES = dict(num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, vocab_size=64,
             dtype="float32")
MODELS = {
    "dense": families.llama("3-8B"),
    "experts": dict(families.mixtral(), num_experts=4, experts_per_token=2, expert_dim=32),
    "encoder_decoder": dict(families.t5(), num_decoder_layers=4),
}
MESHES = {
    "replica8": dict(replica=8), "data8": dict(data=8), "fsdp8": dict(fsdp=8), "tensor4": dict(data=2, tensor=4),
    "expert4": dict(data=2, expert=4), "context8": dict(context=8), "stage4": dict(data=2, stage=4),
    "data2_fsdp2_tensor2": dict(data=2, fsdp=2, tensor=2), "replica2_fsdp2_tensor2": dict(replica=2, fsdp=2, tensor=2),
    "fsdp2_expert2_tensor2": dict(fsdp=2, expert=2, tensor=2),
    "data2_expert2_context2": dict(data=2, expert=2, context=2),
    "fsdp2_context2_tensor2": dict(fsdp=2, context=2, tensor=2), "fsdp2_context4": dict(fsdp=2, context=4),
    "stage2_fsdp4": dict(stage=2, fsdp=4), "stage2_tensor2_data2": dict(stage=2, tensor=2, data=2),
    "stage2_context2_data2": dict(stage=2, context=2, data=2),
    "stage2_context2_tensor2": dict(stage=2, context=2, tensor=2),
    "stage2_expert2_fsdp2": dict(stage=2, expert=2, fsdp=2), "stage4_fsdp2": dict(stage=4, fsdp=2),
    "replica2_stage2_fsdp2": dict(replica=2, stage=2, fsdp=2),
}
B, T = 16, 32


def made(kind, **changes):
  model = make_model(ModelConfig(**{**MODELS[kind], **SIZES, **changes}))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.2 * random.normal(size=x.shape).astype(x.dtype), nn.unbox(boxed))
  tokens = random.integers(0, 64, (B, T + 1)).astype(np.int32)
  # Two documents a row, and padding.
  cut, end = random.integers(4, 14, (B, 1)), random.integers(16, T + 1, (B, 1))
  at = np.arange(T)
  ids = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
  positions = np.where(at < cut, at, np.maximum(at - cut, 0)).astype(np.int32)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": (ids > 0).astype(np.float32)}
  if kind == "encoder_decoder":
    read = random.integers(0, 64, (B, T)).astype(np.int32)
    return model, boxed, params, {**batch, "segment_ids": ids, "encoder_inputs": read, "encoder_segment_ids": ids}
  return model, boxed, params, batch | {"segment_ids": ids, "positions": positions}


def loss_and_grads(model, params, batch):
  objective = ObjectiveConfig(router_balance=0.3 if model.cfg.num_experts else 0.0)
  module = span_corruption if "encoder_inputs" in batch else causal_lm

  def mean_loss(params, batch):
    total, sums = module.loss(model, params, batch, objective)
    return total / sums["weight"]

  options = {"xla_backend_optimization_level": 0}  # Compiling is most of the time.
  return jax.jit(jax.value_and_grad(mean_loss), compiler_options=options)(params, batch)


# The dense decoder on all meshes, and the others on these; the rest is slow.
OFTEN = ("tensor4", "expert4", "stage4", "data2_fsdp2_tensor2", "fsdp2_context2_tensor2", "stage2_expert2_fsdp2",
         "stage2_tensor2_data2")


@pytest.fixture(scope="module")
def case(request):
  model, boxed, params, batch = made(request.param)
  return request.param, boxed, params, batch, jax.device_get(loss_and_grads(model, params, batch))


def check(case, axes, **changes):
  kind, boxed, params, batch, (loss, grads) = case
  model = made(kind, **changes)[0]
  mesh = partitioning.make_mesh(MeshConfig(**{"data": 1, **axes}))
  with partitioning.use_mesh(mesh):
    split = jax.device_put(params, partitioning.param_shardings(mesh, boxed))
    got, got_grads = jax.device_get(loss_and_grads(model, split, partitioning.global_batch(mesh, batch, B)))
  assert got == pytest.approx(loss, rel=1e-5)
  grads, got_grads = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (grads, got_grads))
  for path, leaf in grads.items():
    scale = np.abs(leaf).max()
    assert scale > 1e-6, path
    np.testing.assert_allclose(got_grads[path], leaf, rtol=0, atol=1e-5 * scale, err_msg=path)


def combinations():
  """Yields every kind of model and mesh that it can be split over."""
  for kind, name in itertools.product(MODELS, MESHES):
    if kind == "experts" or "expert" not in name:
      slow = [] if kind == "dense" or name in OFTEN else [pytest.mark.slow]
      yield pytest.param(kind, name, marks=slow)


@pytest.mark.parametrize("case, name", list(combinations()), indirect=["case"])
def test_a_mesh_changes_neither_loss_nor_gradients(case, name):
  check(case, MESHES[name])


@pytest.mark.parametrize("case", [pytest.param(kind, marks=[] if kind == "dense" else [pytest.mark.slow])
                                  for kind in MODELS], indirect=True)
@pytest.mark.parametrize("axes, changes", [
    (dict(stage=2, data=4), dict(stage_repeats=2)), (dict(stage=2, tensor=2, data=2), dict(stage_repeats=2)),
    (dict(stage=4, data=2), dict(stage_microbatches=4)), (dict(stage=2, fsdp=4), dict(stage_microbatches=2)),
    (dict(stage=2, fsdp=4), dict(stage_repeats=2, stage_microbatches=2, remat_policy="none")),
    (dict(context=4, fsdp=2), dict(context_attention="gather"))])
def test_schedules_and_gathering(case, axes, changes):
  check(case, axes, **changes)
