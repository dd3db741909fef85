"""An optimizer's state in the host's memory: the same numbers, the same checkpoints, another place.

T = 16 tokens, B = 8 sequences, two of eight virtual CPU devices, which have the host's memory as a kind of its own.
"""

import jax
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import metrics, partitioning, train
from lmjax.checkpoint import Checkpointer
from lmjax.config import CheckpointConfig

CASES = {
    "adamw": {}, "lion": {}, "adafactor": {}, "muon": dict(adam_learning_rate_ratio=0.5),
    "sgd": dict(freeze_policy=(("layers/1/", 1), ("embed/", -1)), layer_decay=0.7),
}


def make_setup(offload, name="adamw", **optim):
  config = config_lib.base_config()
  config.model.update(num_layers=2, embed_dim=32, num_heads=4, dtype="float32", position="rotary")
  config.data.seq_len = 16
  config.train.update(num_steps=4, batch_size=8, grad_accum_steps=2, ema_decay=0.9)
  config.optim.update(name=name, offload=offload, **optim)
  config.mesh.update(data=1, fsdp=2)
  config = config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), vocab_size=256), tokens_per_epoch=10**6)
  return train.build(config, partitioning.make_mesh(config.mesh, jax.devices()[:2]))


def run(setup, state, steps):
  """Returns the state after some steps and their losses; the second step's is not finite."""
  step, losses = train.make_train_step(setup), []
  with partitioning.use_mesh(setup.mesh):
    for i in steps:
      tokens = np.random.default_rng(i).integers(0, 50, (8, 17)).astype(np.int32)
      weights = np.ones((8, 16), np.float32) * (np.nan if i == 1 else 1)
      batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
      hparams = {"learning_rate": np.float32(3e-3), "weight_decay": np.float32(0.1), "seed": np.uint32(0)}
      state, out = step(state, partitioning.global_batch(setup.mesh, batch, 8), hparams)
      losses.append((float(out["loss"]), float(out["applied"])))
  return state, losses


def places(tree):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


@pytest.mark.parametrize("name", [
    name if name in ("adamw", "schedule_free") else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_the_numbers_are_those_of_a_state_on_the_device(name):
  (there, losses), (here, expected) = (
      run(setup, train.init_state(setup), range(4))
      for setup in (make_setup(offload, name, **CASES[name]) for offload in (True, False)))
  assert [applied for _, applied in losses] == [1, 0, 1, 1]
  np.testing.assert_array_equal(losses, expected)
  assert metrics.digest(jax.device_get(there)) == metrics.digest(jax.device_get(here))
  assert places(there.opt_state) == {"pinned_host"} and places((there.params, there.ema)) == {"device"}
  assert places(here.opt_state) == {"device"}


@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_goes_on_with_the_state_in_the_other_place(tmp_path, before):
  first, second = make_setup(before), make_setup(not before)
  state, _ = run(first, train.init_state(first), range(2))
  kept = metrics.digest(jax.device_get(state))
  with_checkpoints = Checkpointer(tmp_path, CheckpointConfig(every_steps=1))
  with_checkpoints.save(2, state, {})
  whole, losses = run(first, state, range(2, 4))  # Which gives the memory of what is being written away.
  (same, _), (other, _) = (with_checkpoints.restore(setup.state_shapes) for setup in (first, second))
  with_checkpoints.close()
  assert metrics.digest(jax.device_get(same)) == metrics.digest(jax.device_get(other)) == kept
  assert places(same.opt_state) == {"pinned_host" if before else "device"} != places(other.opt_state)
  after, expected = run(second, other, range(2, 4))
  assert losses == expected and metrics.digest(jax.device_get(after)) == metrics.digest(jax.device_get(whole))
