"""An H100 as the compiler knows it, so that programs compile for one on a machine that has none.

The figures are the card's own (NVIDIA H100 SXM data sheet, and what its driver reports), in the text form of XLA's
`GpuTargetConfig`. The installed wheels give the compiler and the libraries; only the device is described.
"""

import os

# Set before JAX starts: no driver answers here, and the CPU is what the described devices stand beside.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
from jax.experimental import topologies
from jax.extend import backend

MEMORY_BYTES = 85_045_084_160

_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: %d
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
""" % MEMORY_BYTES


def h100s(count: int) -> list[jax.Device]:
  """Returns that many described H100s of one host."""
  backend.backends()  # Registers the CUDA plugin.
  shape = f"1x1x{count}"
  return list(topologies.get_topology_desc(platform="cuda", topology_name=shape, topology=shape,
                                           target_config=_H100).devices)
