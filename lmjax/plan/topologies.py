"""What an experiment can be planned for: described TPU slices and GPU hosts, and what is published of their chips."""

import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import jax

from lmjax.config_checks import Refused, UserError, nearest
from lmjax.metrics import PEAK_FLOPS


class Chip(NamedTuple):
  """The figures of a chip, each for one device of JAX; of a TPU7x, whose halves are devices, those of half a chip.

  Attributes:
    kind: `device_kind` of JAX.
    memory: bytes.
    memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s that it can send to the others of its slice or host, over all of its links together.
    network_bandwidth: bytes/s that it can send beyond, its share of its host's.
    host_bandwidth: bytes/s to its host's memory, and as many at the same time from there (PCIe).
    eight_bit_flops: dense operations/s by `model.quantization`; one that is missing is no faster than bfloat16.
    source: where the figures are from.
  """
  kind: str
  memory: float
  memory_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  host_bandwidth: float
  eight_bit_flops: dict[str, float]
  source: str

  @property
  def peak_flops(self) -> float:
    """Dense FLOP/s in bfloat16."""
    return PEAK_FLOPS[self.kind]


_GIB, _GB = 2 ** 30, 1e9
_TPU_DOCS = "docs.cloud.google.com/tpu/docs/"
_SCALING_BOOK = "Austin et al. 2025, How to Scale Your Model, TPUs"
_HOPPER = {"int8": 1979e12, "fp8": 1979e12}
CHIPS = {
    "v4": Chip("TPU v4", 32 * _GIB, 1200 * _GB, 6 * 45 * _GB, 6.25 * _GB, 16 * _GB, {},
               f"{_TPU_DOCS}v4; {_SCALING_BOOK}"),
    "v5e": Chip("TPU v5 lite", 16 * _GIB, 819 * _GB, 200 * _GB, 3.125 * _GB, 16 * _GB, {"int8": 393e12},
                f"{_TPU_DOCS}v5e; {_SCALING_BOOK}"),
    "v5p": Chip("TPU v5", 95 * _GIB, 2765 * _GB, 600 * _GB, 6.25 * _GB, 16 * _GB, {"int8": 918e12},
                f"{_TPU_DOCS}v5p; {_SCALING_BOOK}"),
    "v6e": Chip("TPU v6 lite", 32 * _GIB, 1638 * _GB, 400 * _GB, 12.5 * _GB, 32 * _GB, {"int8": 1836e12},
                f"{_TPU_DOCS}v6e; {_SCALING_BOOK}"),
    "tpu7x": Chip("TPU7x", 96 * _GIB, 3690 * _GB, 600 * _GB, 6.25 * _GB, 16 * _GB, {"fp8": 2307e12},
                  f"{_TPU_DOCS}tpu7x; network and host taken to be no faster than a v5p's"),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80e9, 3350 * _GB, 450 * _GB, 50 * _GB, 64 * _GB, _HOPPER,
                 "NVIDIA H100 SXM and DGX H100"),
    "h200": Chip("NVIDIA H200", 141e9, 4800 * _GB, 450 * _GB, 50 * _GB, 64 * _GB, _HOPPER,
                 "NVIDIA H200 SXM and DGX H200"),
    "b200": Chip("NVIDIA B200", 180e9, 7700 * _GB, 900 * _GB, 50 * _GB, 64 * _GB, {"int8": 4500e12, "fp8": 4500e12},
                 "NVIDIA HGX and DGX B200"),
}

# How libtpu calls them, and what it wants to know besides.
_TPU_NAMES = {"v4": ("v4", dict(chip_config_name="megacore")), "v5p": ("v5", dict(chip_config_name="megacore")),
              "v5e": ("v5e", dict(chips_per_host_bounds=(2, 2, 1))),
              "v6e": ("v6e", dict(chips_per_host_bounds=(2, 2, 1))),
              "tpu7x": ("tpu7x", dict(chips_per_host_bounds=(2, 2, 1)))}
# Cloud TPU counts the cores of these, two a chip.
_CORES = ("v4", "v5p", "tpu7x")
_DEVICES_A_CHIP = {"tpu7x": 2}  # Where the cores of a chip are no longer fused into one.
_LARGEST = {"v4": 4096, "v5p": 6144, "v5e": 256, "v6e": 256, "tpu7x": 9216}
_GPUS_A_HOST = 8

# What tells GPUs apart for the compiler.
GPU_TARGETS = {
    "h100": dict(major=9, minor=0, cores=132, memory=85_045_084_160, bandwidth=3_352_320_000_000, cache=52_428_800),
    "h200": dict(major=9, minor=0, cores=132, memory=150_754_820_096, bandwidth=4_800_000_000_000, cache=62_914_560),
    "b200": dict(major=10, minor=0, cores=148, memory=191_414_272_000, bandwidth=7_700_000_000_000, cache=132_120_576)}
_GPU_TARGET = """
platform_name: "CUDA"
device_description_str: "%(kind)s"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: %(major)d minor: %(minor)d }
  core_count: %(cores)d
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: %(memory)d
  memory_bandwidth: %(bandwidth)d
  l2_cache_size: %(cache)d
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
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A described machine.

  Attributes:
    name: as it was asked for.
    generation: key of `CHIPS`.
    shape: chips along each axis of a slice's torus; of GPUs, how many hosts and how many on each.
    num_slices: slices, or 1.
  """
  name: str
  generation: str
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def is_tpu(self) -> bool:
    return self.generation in _TPU_NAMES

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape) * self.num_slices

  @property
  def num_devices(self) -> int:
    """How many devices JAX sees."""
    return self.num_chips * _DEVICES_A_CHIP.get(self.generation, 1)

  @property
  def devices_a_fast_network(self) -> int:
    """Devices that are joined by links: those of a slice, or of a GPU host."""
    return self.num_devices // self.num_slices if self.is_tpu else self.shape[1]


def parse_topology(name: str) -> Topology:
  """Returns the topology of a name: v5p-128, v5e:4x4, 2xv5e-256 (two slices), h100-8, h100-64 (eight hosts).

  As Cloud TPU has it, the number counts cores for v4, v5p and tpu7x, two a chip, and chips for v5e and v6e.

  Raises:
    UserError: for one that does not exist.
  """
  match = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d+[a-z]*)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
  if not match or match[2].replace("v5litepod", "v5e") not in CHIPS:
    family = match[2] if match else re.split(r"[-:]", name)[0]
    raise UserError(f"--topology has {name!r}, which is no machine that lmjax knows; give a generation and a size, "
                    f"such as v5p-128, v5e:4x4, 2xv5e-256 or h100-8{nearest(family, CHIPS)}")
  slices, generation, size, grid = match.groups()
  generation, slices = generation.replace("v5litepod", "v5e"), int(slices or 1)
  if generation not in _TPU_NAMES:
    if grid or slices > 1 or not int(size) or (int(size) > _GPUS_A_HOST and int(size) % _GPUS_A_HOST):
      raise UserError(f"--topology has {name!r}, but GPUs are counted, up to {_GPUS_A_HOST} of a host or whole hosts, "
                      f"such as {generation}-8 or {generation}-64.")
    hosts = max(1, int(size) // _GPUS_A_HOST)
    return Topology(name, generation, (hosts, int(size) // hosts))
  shape = tuple(map(int, grid.split("x"))) if grid else _grid(name, generation, int(size))
  if len(shape) != (3 if generation in _CORES else 2) or math.prod(shape) > _LARGEST[generation]:
    raise UserError(f"--topology has {name!r}, but a slice of {generation} is a grid of "
                    f"{3 if generation in _CORES else 2} axes with at most {_LARGEST[generation]} chips.")
  return Topology(name, generation, shape, slices)


def _grid(name: str, generation: str, size: int) -> tuple[int, ...]:
  """Returns the grid of a slice of so many cores or chips, as square as powers of two can be."""
  chips, axes = (size // 2, 3) if generation in _CORES else (size, 2)
  smallest = 4 if axes == 3 else 1
  if chips < smallest or chips & (chips - 1) or (axes == 3 and size % 2):
    raise UserError(f"--topology has {name!r}, but slices of {generation} come in powers of two from "
                    f"{generation}-{smallest * (2 if axes == 3 else 1)} on; others are named by their grid, such as "
                    f"{generation}:{'4x4x12' if axes == 3 else '4x4'}.")
  bits = chips.bit_length() - 1
  parts = [bits // axes + (axis >= axes - bits % axes) for axis in range(axes)]
  return (2, 2, 1) if chips == 4 and axes == 3 else tuple(2 ** part for part in parts)


def described_devices(topology: Topology) -> list[jax.Device]:
  """Returns devices to compile for; there are none to run on.

  Raises:
    Refused: where the compiler of that machine is not installed.
  """
  from jax.experimental import topologies
  if not topology.is_tpu:
    return _described_gpus(topology)
  # Else libtpu asks what machine it runs on, complains at length, and lets one process at a time have the chips.
  for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_WORKER_ID", "0"),
                          ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
    os.environ.setdefault(variable, value)
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise Refused(f"Planning for {topology.name} needs libtpu, Google's compiler for TPUs, which is not installed; pip "
                  "install 'lmjax[plan]'.") from e
  name, options = _TPU_NAMES[topology.generation]
  shape = (*topology.shape, 1, 1)[:3]
  bounds = options.get("chips_per_host_bounds")
  if bounds:  # A host has at most four of these chips, in a square.
    options = {**options, "chips_per_host_bounds": tuple(min(*pair) for pair in zip(bounds, shape))}
  return list(topologies.get_topology_desc(
      platform="tpu", topology_name=f"{name}:{'x'.join(map(str, topology.shape))}", num_slices=topology.num_slices,
      **options).devices)


def _described_gpus(topology: Topology) -> list[jax.Device]:
  from jax.experimental import topologies
  from jax.extend import backend
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  backend.backends()  # Registers the CUDA plugin.
  hosts, count = topology.shape
  target = _GPU_TARGET % {**GPU_TARGETS[topology.generation], "kind": topology.chip.kind}
  shape = f"1x{hosts}x{count}"
  try:
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name=shape, topology=shape, target_config=target).devices)
  except Exception as e:  # The plugin raises several kinds.
    raise Refused(f"Planning for {topology.name} needs JAX's CUDA plugin and its compiler, which are not installed "
                  f"({str(e).splitlines()[0]}); pip install 'jax[cuda13]'.") from e


def facts(topology: Topology) -> dict[str, Any]:
  """Returns the figures that a plan is made with."""
  return {**topology.chip._asdict(), "peak_flops": topology.chip.peak_flops, "num_chips": topology.num_chips}
