"""A state that is larger than the memory is refused with both sizes."""

import os

import jax
import jax.numpy as jnp
import pytest

from lmjax import memory, partitioning
from lmjax.config import MeshConfig
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
