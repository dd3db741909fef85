"""The training step and its loop: the same numbers on every mesh and split, and what bad numbers do.

T = 32 tokens, B = 8 sequences, eight virtual CPU devices (see conftest.py).
"""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import optax
import pytest

from lmjax import config as config_lib
from lmjax import metrics, partitioning, train
from lmjax.config import UserError

NUM_STEPS = 20
MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2})
name_of_mesh = lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items())


def resolved_config(*, mesh=None, grad_accum_steps=1, on_spike="ignore", batch_size=8, optim=(), **model):
  config = config_lib.base_config()
  config.model.update({"num_layers": 2, "embed_dim": 32, "num_heads": 4, "dtype": "float32", **model})
  config.data.seq_len = 32
  config.train.update(num_steps=NUM_STEPS, batch_size=batch_size, grad_accum_steps=grad_accum_steps, on_spike=on_spike)
  config.optim.update(dict(optim))
  config.mesh.update({"data": 1, **(mesh or {})})
  return config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), vocab_size=256), tokens_per_epoch=10**6)


def make_setup(**settings):
  config = resolved_config(**settings)
  num_devices = math.prod(size for size in dataclasses.asdict(config.mesh).values())
  return train.build(config, partitioning.make_mesh(config.mesh, jax.devices()[:num_devices]))


def batches(num_steps, rows=8):
  """Yields batches of tokens below 20 whose rows have from no to all of their weights."""
  random = np.random.default_rng(0)
  share = np.linspace(0, 1, rows)[:, None]
  for _ in range(num_steps):
    tokens = random.integers(0, 20, (rows, 33)).astype(np.int32)
    weights = (random.random((rows, 32)) < share).astype(np.float32)
    yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def hparams(learning_rate=3e-3):
  return {"learning_rate": np.float32(learning_rate), "weight_decay": np.float32(0.1), "seed": np.uint32(0)}


class Stepper:
  """A compiled step and a state that goes on."""

  def __init__(self, *, initial=None, **settings):
    """Args: `initial`: a state of numpy arrays to start from, which saves compiling the random numbers of another."""
    self.setup = make_setup(**settings)
    self.state = (jax.device_put(initial, self.setup.state_shardings) if initial else train.init_state(self.setup))
    self._step = None

  def __call__(self, batch):
    with partitioning.use_mesh(self.setup.mesh):
      args = self.state, partitioning.global_batch(self.setup.mesh, batch, len(batch["inputs"])), hparams()
      if not self._step:
        # Half the time that compiling takes goes into machine code that is fast, which 20 steps do not need.
        options = {"xla_backend_optimization_level": 0}
        self._step = train.make_train_step(self.setup).lower(*args).compile(options)
      self.state, out = self._step(*args)
    return {name: float(value) for name, value in out.items()}


@functools.cache
def initial_state():
  """The state before the first step, which is the same under every setting used here but `scan_layers`, `on_spike`."""
  return jax.device_get(train.init_state(make_setup()))


def losses(stepper):
  return [stepper(batch)["loss"] for batch in batches(NUM_STEPS)]


@functools.cache
def losses_on_one_device(dropout=0.0):
  return losses(Stepper(initial=initial_state(), dropout=dropout))


def test_the_loss_falls_from_that_of_a_uniform_guess():
  found = losses_on_one_device()
  assert found[0] == pytest.approx(math.log(256), abs=0.05)
  # The tokens are drawn from 20, which is all there is to learn.
  assert math.log(20) - 0.1 < found[-1] < found[0] - 1


@pytest.mark.parametrize("mesh", MESHES, ids=name_of_mesh)
def test_neither_initial_parameters_nor_losses_depend_on_the_mesh(mesh):
  step = Stepper(mesh=mesh, dropout=0.1)
  assert metrics.digest(step.state.params) == metrics.digest(initial_state().params)
  np.testing.assert_allclose(losses(step), losses_on_one_device(dropout=0.1), rtol=0, atol=1e-5)


def test_dropout_is_in_those_losses():
  assert abs(losses_on_one_device(dropout=0.1)[0] - losses_on_one_device()[0]) > 1e-4


@pytest.mark.parametrize("mesh, count", [({}, 2), ({}, 4), ({"data": 2, "tensor": 2}, 4)])
def test_losses_do_not_depend_on_the_microbatches(mesh, count):
  found = losses(Stepper(initial=initial_state(), mesh=mesh, grad_accum_steps=count))
  np.testing.assert_allclose(found, losses_on_one_device(), rtol=0, atol=1e-5)


def test_unrolled_layers_compute_what_scanned_ones_do():
  found = losses(Stepper(dropout=0.1, scan_layers=False))
  np.testing.assert_allclose(found, losses_on_one_device(dropout=0.1), rtol=0, atol=1e-5)


# Meshes of 1, 2 and 8 devices, and microbatches: a covering choice, and with --all every pair.
SPLITS = [({}, 2), ({}, 4), ({"data": 2}, 1), ({"fsdp": 2}, 2), ({"tensor": 2}, 4), ({"data": 8}, 4), ({"fsdp": 8}, 1),
          ({"tensor": 8}, 2), ({"data": 2, "fsdp": 2, "tensor": 2}, 4), ({"fsdp": 4, "tensor": 2}, 2),
          ({"data": 2, "tensor": 4}, 1)]
MESHES_OF_SPLITS = list({name_of_mesh(mesh): mesh for mesh, _ in SPLITS}.values())
ALL_SPLITS = [pytest.param(mesh, count, id=f"{name_of_mesh(mesh) or 'one'}-{count}",
                           marks=() if (mesh, count) in SPLITS else pytest.mark.slow)
              for mesh, count in itertools.product(MESHES_OF_SPLITS, (1, 2, 4)) if mesh or count > 1]
# The momentum of plain SGD is, after its first step, the gradient itself.
FOR_GRADIENTS = dict(num_heads=8, batch_size=32, optim=dict(name="sgd", clip_norm=None))


@functools.cache
def initial_state_for_gradients():
  return jax.device_get(train.init_state(make_setup(**FOR_GRADIENTS)))


def loss_and_gradients(**split):
  """Returns the loss of a batch of 32 ragged rows and {path: gradient}, in one step under a mesh and microbatches."""
  step = Stepper(initial=initial_state_for_gradients(), **FOR_GRADIENTS, **split)
  out = step(next(batches(1, rows=32)))
  grads = jax.device_get(optax.tree.get(step.state.opt_state, "trace"))
  return out["loss"], {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
                       for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}


loss_and_gradients_on_one_device = functools.cache(loss_and_gradients)


@pytest.mark.parametrize("mesh, count", ALL_SPLITS)
def test_gradients_depend_neither_on_the_mesh_nor_on_microbatches(mesh, count):
  expected_loss, expected = loss_and_gradients_on_one_device()
  loss, grads = loss_and_gradients(mesh=mesh, grad_accum_steps=count)
  assert loss == pytest.approx(expected_loss, rel=0, abs=1e-5)
  assert grads.keys() == expected.keys() and len(grads) > 10
  for name, leaf in expected.items():
    # Biases of keys change no score: their gradient is rounding alone, small beside that of the queries' biases.
    scale = np.abs(expected[name.replace("key/bias", "query/bias")]).max()
    assert scale > 0, name
    np.testing.assert_allclose(grads[name], leaf, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("mesh", [
    pytest.param(mesh, id=name_of_mesh(mesh), marks=() if "tensor" in mesh and "data" not in mesh else pytest.mark.slow)
    for mesh in MESHES_OF_SPLITS if mesh and mesh not in MESHES])
def test_initial_parameters_are_bit_equal_on_every_mesh(mesh):
  state = train.init_state(make_setup(mesh=mesh, **FOR_GRADIENTS))
  assert metrics.digest(state.params) == metrics.digest(initial_state_for_gradients().params)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free", "sophia"])
def test_a_step_keeps_every_shape_and_type_of_the_state(optimizer, param_dtype):
  """Else the second step would be compiled anew, and what it leaves would not fit the program that goes on from it."""
  schedule = "constant" if optimizer == "schedule_free" else "cosine"
  setup = make_setup(param_dtype=param_dtype, attention_impl="chunked", optim=dict(name=optimizer, schedule=schedule))
  after, _ = jax.eval_shape(train.make_train_step(setup), setup.state_shapes, next(batches(1)), hparams())
  described = lambda tree: {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
                            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  assert described(after) == described(setup.state_shapes)


def test_parameters_are_split_as_the_mesh_says():
  """By hand: D = 32, F = 128 and V = 256 on fsdp = 2 and tensor = 2."""
  shapes = make_setup(mesh={"data": 2, "fsdp": 2, "tensor": 2}).state_shapes
  of_device = lambda leaf: leaf.sharding.shard_shape(leaf.shape)
  layers = shapes.params["layers"]
  assert of_device(shapes.params["embed"]["embedding"]) == (128, 16)
  assert of_device(layers["mlp"]["up"]["kernel"]) == (2, 16, 64)
  moments = [leaf for leaf in jax.tree.leaves(shapes.opt_state) if leaf.shape == (2, 32, 128)]
  assert len(moments) == 2 and all(of_device(leaf) == (2, 16, 64) for leaf in moments)


def digest_of_learned(state):
  return metrics.digest((state.params, state.opt_state))


@pytest.fixture(scope="module")
def guarded():
  """A stepper that drops spikes, after one ordinary step."""
  step = Stepper(on_spike="skip", initial=dataclasses.replace(initial_state(), spike=np.zeros(3, np.float32)))
  assert step(next(batches(1)))["applied"] == 1
  return step


def test_an_update_that_is_not_finite_is_dropped(guarded):
  batch, before, step = next(batches(1)), digest_of_learned(guarded.state), int(guarded.state.step)
  out = guarded({**batch, "weights": batch["weights"] * np.float32(np.nan)})
  assert (out["applied"], out["nonfinite"], out["spike"]) == (0, 1, 0)
  assert digest_of_learned(guarded.state) == before
  assert int(guarded.state.step) == step + 1 and np.isfinite(guarded.state.spike).all()
  out = guarded(batch)
  assert (out["applied"], out["nonfinite"]) == (1, 0) and digest_of_learned(guarded.state) != before


@pytest.mark.parametrize("seen, mean, dropped", [(50, 1.0, True), (49, 1.0, False), (50, 5.0, False)])
def test_a_spike_is_dropped(guarded, seen, mean, dropped):
  """The loss is about 5.5: far above a mean of 1.0 with deviation 0.1, once 50 losses have been seen; near one of 5."""
  guarded.state = dataclasses.replace(guarded.state, spike=jax.device_put(
      np.array([mean, 0.01, seen], np.float32), guarded.setup.state_shardings.spike))
  before = digest_of_learned(guarded.state)
  out = guarded(next(batches(1)))
  assert (out["applied"], out["spike"], out["nonfinite"]) == ((0, 1, 0) if dropped else (1, 0, 0))
  assert (digest_of_learned(guarded.state) == before) == dropped


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="make batch_size a multiple of 16"):
    make_setup(mesh={"data": 8}, grad_accum_steps=2)


def test_no_array_holds_the_logits_of_all_positions():
  """T = 4096 and V = 131,072: they would take 2 GiB, the step's temporary arrays a fraction of that."""
  config = config_lib.base_config()
  config.model.update(num_layers=1, embed_dim=32, num_heads=2, dtype="float32")
  config.data.seq_len = 4096
  config.train.update(num_steps=1, batch_size=1)
  config.mesh.data = 1
  setup = train.build(config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), vocab_size=131_072), tokens_per_epoch=10**6),
                      partitioning.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1]))
  batch = {name: jax.ShapeDtypeStruct((1, 4096), dtype) for name, dtype in (
      ("inputs", np.int32), ("targets", np.int32), ("weights", np.float32))}
  with partitioning.use_mesh(setup.mesh):
    step = train.make_train_step(setup).lower(setup.state_shapes, batch, hparams())
    memory = step.compile({"xla_backend_optimization_level": 0}).memory_analysis()
  assert memory.temp_size_in_bytes < 4096 * 131_072 * 4 / 8
