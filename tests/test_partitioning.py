"""Meshes, and who holds what."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import partitioning, train
from lmjax.config import Config, MeshConfig, UserError


def test_an_axis_of_minus_one_takes_what_is_left():
  mesh = partitioning.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
  assert dict(mesh.shape) == dict(replica=1, data=2, fsdp=2, stage=1, expert=1, context=1, tensor=2)


@pytest.mark.parametrize("sizes, told", [
    (dict(data=3), "asks for data=3, which does not fit 8 device"),
    (dict(data=-1, tensor=3), "asks for data=-1 \\* tensor=3, which does not fit 8"),
    (dict(data=2, fsdp=2), "data=2 \\* fsdp=2, which does not fit 8"),
    (dict(data=1), "all axes 1, which does not fit 8"),
])
def test_sizes_that_do_not_fit_are_refused(sizes, told):
  with pytest.raises(UserError, match=told):
    partitioning.make_mesh(MeshConfig(**sizes))


def resolved(**groups) -> Config:
  config = config_lib.base_config()
  config.train.num_steps = 1
  config.model.update(num_layers=2, embed_dim=32, num_heads=4)
  for name, values in groups.items():
    config[name].update(values)
  config = config_lib.resolve_model(config_lib.from_config_dict(config), 256)
  return config_lib.resolve_durations(config, 10_000)


@pytest.mark.parametrize("groups, told", [
    (dict(model=dict(num_kv_heads=2), mesh=dict(data=1, tensor=4, fsdp=2)), "model.num_kv_heads is 2.*mesh.tensor = 4"),
    (dict(model=dict(embed_dim=36), mesh=dict(fsdp=8, data=1)), "model.embed_dim is 36.*mesh.fsdp = 8"),
    (dict(train=dict(batch_size=12)), "makes 12 sequences.*multiple of 8"),
    (dict(train=dict(batch_size=24, grad_accum_steps=2)), "2 microbatch.*makes 12.*multiple of 16"),
    (dict(data=dict(seq_len=36), mesh=dict(data=2, context=4)), "seq_len = 36 must be a multiple of 8"),
    (dict(model=dict(attention_impl="cudnn"), mesh=dict(data=4, context=2)), "attention_impl = cudnn does not work"),
    (dict(mesh=dict(data=2, stage=4)), "does not divide config.model.num_layers = 2"),
    (dict(model=dict(stage_repeats=2), mesh=dict(data=4, stage=2)), "stage_repeats 2.*num_layers = 2"),
    (dict(model=dict(share_layers=True), mesh=dict(data=4, stage=2)), "shared layers.*not split into stages"),
    (dict(model=dict(stage_microbatches=3), mesh=dict(data=4, stage=2)), "must be a multiple of config.mesh.stage = 2"),
])
def test_what_does_not_divide_is_refused_before_anything_is_made(groups, told):
  config = resolved(**groups)
  with pytest.raises(UserError, match=told):
    train.build(config, partitioning.make_mesh(config.mesh))


def test_parameters_and_optimizer_are_split_alike():
  config = resolved(mesh=dict(data=2, fsdp=2, tensor=2))
  setup = train.build(config, partitioning.make_mesh(config.mesh))
  spec_of = lambda tree: tree["layers"]["mlp"]["up"]["kernel"].sharding.spec
  params, adam = setup.state_shapes.params, setup.state_shapes.opt_state[0]
  assert spec_of(params) == spec_of(adam.mu) == spec_of(adam.nu) == P("stage", "fsdp", "tensor")
  assert params["layers"]["attention"]["out"]["kernel"].sharding.spec == P("stage", "tensor", None, "fsdp")
  assert params["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")
  assert setup.state_shapes.step.sharding.spec == P()


def test_a_batch_is_split_over_replica_data_and_fsdp():
  mesh = partitioning.make_mesh(MeshConfig(replica=2, data=2, fsdp=2))
  batch = partitioning.global_batch(mesh, {"inputs": np.arange(16).reshape(8, 2)}, 8)
  assert {shard.data.shape for shard in batch["inputs"].addressable_shards} == {(1, 2)}


def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch):
  # Two hosts of four devices, interleaved as a torus interleaves them; this process is the first.
  order = [0, 4, 5, 1, 2, 6, 7, 3]
  monkeypatch.setattr(partitioning, "_topology_order", lambda shape, devices: np.array(devices).reshape(shape))
  mesh = partitioning.make_mesh(MeshConfig(), [jax.devices()[i] for i in order])
  monkeypatch.setattr(
      jax.sharding.NamedSharding, "addressable_devices_indices_map",
      lambda self, shape: {d: i for d, i in self.devices_indices_map(shape).items() if d.id < 4})
  assert partitioning.process_rows(mesh, 16) == [0, 1, 6, 7, 8, 9, 14, 15]


def test_the_devices_of_several_processes_get_their_own_rows(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)  # Takes the way through `process_rows` with all devices here.
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  rows = np.arange(16).reshape(8, 2)
  batch = partitioning.global_batch(mesh, {"inputs": rows}, 8)["inputs"]
  np.testing.assert_array_equal(batch, rows)
  assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 2)}


def test_a_name_without_a_rule_is_an_error():
  with pytest.raises(KeyError):
    partitioning.spec("batch", "lenght")


def test_constrain_does_nothing_without_a_mesh():
  x = jax.numpy.ones(3)
  assert partitioning.constrain(x, "batch") is x


def test_every_mesh_axis_has_a_setting():
  assert {f.name for f in dataclasses.fields(MeshConfig)} == set(partitioning.MESH_AXES)


@pytest.fixture
def joined(monkeypatch):
  """Returns a function from environment variables to what jax.distributed.initialize was called with."""
  def joined(environment, fails=None):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "LMJAX_DISTRIBUTED"):
      monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    calls = []

    def initialize(*args, **patience):
      assert patience["heartbeat_timeout_seconds"] < 60
      calls.append(args)
      if fails:
        raise fails
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    partitioning.join_processes()
    return calls
  return joined


NAMED = dict(JAX_COORDINATOR_ADDRESS="host:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")


@pytest.mark.parametrize("environment, calls", [
    ({}, []), (dict(SLURM_JOB_ID="7", SLURM_NTASKS="2"), []), (dict(LMJAX_DISTRIBUTED=""), []),
    (dict(LMJAX_DISTRIBUTED="auto"), [()]), (NAMED, [("host:1", 2, 1)]),
    (dict(LMJAX_DISTRIBUTED="auto", **NAMED), [("host:1", 2, 1)])])
def test_processes_are_joined_only_where_the_environment_asks(joined, environment, calls):
  assert joined(environment) == calls


def test_what_cannot_join_processes_is_told(joined):
  with pytest.raises(UserError, match="LMJAX_DISTRIBUTED is 'yes', but it must be 'auto'"):
    joined(dict(LMJAX_DISTRIBUTED="yes"))
  with pytest.raises(UserError, match="JAX finds no cluster that it knows here; set JAX_COORDINATOR_ADDRESS"):
    joined(dict(LMJAX_DISTRIBUTED="auto"), fails=ValueError("coordinator_address should be defined."))
