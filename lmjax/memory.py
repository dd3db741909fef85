"""Whether what a run must keep fits the devices at all, told before they are asked for it."""

import math
import os
from typing import Any

import jax

from lmjax.config_checks import Refused


def check_fits(shapes: Any) -> None:
  """Compares the state with the memory of this process's devices; what a step needs besides is not counted.

  Without this, a CPU run that is too large is killed by the system without a word.

  Args:
    shapes: pytree of jax.ShapeDtypeStruct with shardings.

  Raises:
    Refused: where the state alone is larger.
  """
  devices = jax.local_devices()
  leaves = jax.tree.leaves(shapes)
  of_device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  if devices[0].platform == "cpu":  # All of them share the machine's.
    needed, has = of_device * len(devices), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  else:
    stats = devices[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
      return
    needed, has = of_device, stats["bytes_limit"]
  if needed > has:
    where = "this machine has" if devices[0].platform == "cpu" else f"a {devices[0].device_kind} has"
    raise Refused(f"The parameters and the optimizer's state take {needed / 1e9:,.1f} GB, but {where} {has / 1e9:,.1f} "
                  "GB; make the model smaller (config.model), or split it over more devices (config.mesh.fsdp).")
