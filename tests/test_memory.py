"""A state that is larger than the memory is refused with both sizes, and one that is to lie where nothing can."""

import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import memory, partitioning
from lmjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from lmjax.config_checks import Refused


def shape(size, *names):
  mesh = partitioning.make_mesh(MeshConfig(data=1, fsdp=8))
  sharding = jax.sharding.NamedSharding(mesh, partitioning.spec(*names))
  return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)


def test_what_is_split_counts_once_and_what_is_copied_eight_times():
  has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  half = has // 8 // 8 * 8  # Elements of 4 bytes that make half the memory.
  memory.check_fits({"a": shape(half, "embed")})
  with pytest.raises(Refused, match=rf"take {has * 8 / 2 / 1e9:,.1f} GB, but this machine has {has / 1e9:,.1f} GB; "):
    memory.check_fits({"a": shape(half, None)})
  with pytest.raises(Refused, match="config.mesh.fsdp"):
    memory.check_fits({"a": shape(half, "embed"), "b": shape(half, "embed"), "c": shape(half, "embed")})


@pytest.mark.parametrize("config, told", [
    (Config(optim=OptimConfig(offload=True)), "config.optim.offload is True, but a Toy does not reach"),
    (Config(model=ModelConfig(remat_policy="offload")), "config.model.remat_policy is 'offload', but a Toy"),
    (Config(model=ModelConfig(remat_policy="names", remat_offload=("up",))), "remat_offload is \\('up',\\), but a Toy"),
])
def test_devices_that_do_not_reach_their_hosts_memory_are_told(config, told):
  device = lambda *kinds: types.SimpleNamespace(
      device_kind="Toy", addressable_memories=lambda: [types.SimpleNamespace(kind=kind) for kind in kinds])
  mesh_of = lambda device: types.SimpleNamespace(devices=np.array([device], object))
  with pytest.raises(Refused, match=told):
    memory.check_host_memory(config, mesh_of(device("device", "unpinned_host")))
  memory.check_host_memory(config, mesh_of(device("device", "pinned_host")))
  memory.check_host_memory(Config(), mesh_of(device("device")))
