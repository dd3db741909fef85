"""Whether what a run must keep fits the devices and where it is to lie, told before they are asked for it."""

import math
import operator
import os
from typing import Any

import jax

from lmjax.config import Config
from lmjax.config_checks import TooLarge
from lmjax.partitioning import HOST_MEMORY


def in_host_memory(x: jax.ShapeDtypeStruct) -> bool:
  """Is an array's place the memory of its devices' hosts?"""
  return x.sharding.memory_kind == HOST_MEMORY


def check_host_memory(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises TooLarge where the config keeps something in the host's memory and the devices do not reach it."""
  asked = {"optim.offload": config.optim.offload, "model.remat_policy": config.model.remat_policy == "offload",
           "model.remat_offload": bool(config.model.remat_offload)}
  device = mesh.devices.flat[0]
  if any(asked.values()) and HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
    name = next(name for name, is_asked in asked.items() if is_asked)
    raise TooLarge(f"config.{name} is {operator.attrgetter(name)(config)!r}, but a {device.device_kind} does not "
                   "reach its host's memory by itself; set config.optim.offload to False, and "
                   "config.model.remat_policy to products.")


def check_fits(shapes: Any) -> None:
  """Compares the state with the memory of this process's devices; what a step needs besides is not counted.

  Without this, a CPU run that is too large is killed by the system without a word.

  Args:
    shapes: pytree of jax.ShapeDtypeStruct with shardings.

  Raises:
    TooLarge: where the state alone is larger.
  """
  devices, has = jax.local_devices(), _of_device()
  on_cpu = devices[0].platform == "cpu"
  if has is not None and (needed := _needed(shapes)) > has:
    shared = len(devices) if on_cpu else 1
    where = "this machine has" if on_cpu else f"a {devices[0].device_kind} has"
    raise TooLarge(f"The parameters and the optimizer's state take {needed * shared / 1e9:,.1f} GB, but {where} "
                   f"{has * shared / 1e9:,.1f} GB; make the model smaller (config.model), or split it over more "
                   "devices (config.mesh.fsdp).")


def num_that_fit(shapes: Any) -> int:
  """Returns how many such states fit a device, at least 1; what a step needs besides is not counted."""
  has = _of_device()
  return 2 ** 20 if has is None else max(1, int(has / max(_needed(shapes), 1)))


def program_fits(compiled: Any, besides: Any) -> bool:
  """Does what the compiler says that a program needs fit the devices, and other arrays besides?"""
  has, needs = _of_device(), compiled.memory_analysis()
  return has is None or needs is None or (
      needs.argument_size_in_bytes + needs.temp_size_in_bytes + _needed(besides) <= has)


def _needed(shapes: Any) -> int:
  """Returns the bytes that arrays take of a device."""
  # On a CPU the host's memory is the device's too.
  on_cpu = jax.local_devices()[0].platform == "cpu"
  leaves = [x for x in jax.tree.leaves(shapes) if on_cpu or not in_host_memory(x)]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _of_device() -> int | None:
  """Returns the bytes that a device of this process has, on a CPU its share of the machine's; None where unknown."""
  devices = jax.local_devices()
  if devices[0].platform == "cpu":
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
  return (devices[0].memory_stats() or {}).get("bytes_limit")
