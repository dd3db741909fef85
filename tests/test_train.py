"""The training step and its loop: the same numbers on every mesh and split, and what bad numbers do.

T = 32 tokens, B = 8 sequences, eight virtual CPU devices (see conftest.py).
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import metrics, partitioning, train
from lmjax.config import UserError

NUM_STEPS = 20
MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2})
name_of_mesh = lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items())


def resolved_config(*, mesh=None, grad_accum_steps=1, on_spike="ignore", **model):
  config = config_lib.base_config()
  config.model.update({"num_layers": 2, "embed_dim": 32, "num_heads": 4, "dtype": "float32", **model})
  config.data.seq_len = 32
  config.train.update(num_steps=NUM_STEPS, batch_size=8, grad_accum_steps=grad_accum_steps, on_spike=on_spike)
  config.mesh.update({"data": 1, **(mesh or {})})
  return config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), vocab_size=256), tokens_per_epoch=10**6)


def make_setup(**settings):
  config = resolved_config(**settings)
  num_devices = math.prod(size for size in dataclasses.asdict(config.mesh).values())
  return train.build(config, partitioning.make_mesh(config.mesh, jax.devices()[:num_devices]))


def batches(num_steps):
  """Yields batches of tokens below 20 whose rows have from no to all of their weights."""
  random = np.random.default_rng(0)
  share = np.linspace(0, 1, 8)[:, None]
  for _ in range(num_steps):
    tokens = random.integers(0, 20, (8, 33)).astype(np.int32)
    weights = (random.random((8, 32)) < share).astype(np.float32)
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
