"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Models name the axes of their parameters and activations (`embed`, `heads`, `batch`, ...); nothing else in lmjax knows
what a mesh axis is called. Changing how a model is split means changing `RULES` or the sizes in `config.mesh`.
"""

import contextlib
import contextvars
import math
import os
from typing import Any, Callable, Iterator, Sequence

from flax import linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from lmjax.config import Config, MeshConfig, UserError, electra_parts, eval_batch_size

# From the slowest network to the fastest: neighbours on the last axes talk most.
MESH_AXES = ("replica", "data", "fsdp", "stage", "expert", "context", "tensor")

# Where the model is not split over experts, or into stages, their devices split the batch.
_BATCH = ("replica", "data", "fsdp", "expert", "stage")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters.
    "layers": "stage",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "position": None,
    "token_type": None,
    "embedding": None,
    "pooled": None,
    "labels": None,
    "buckets": None,
    "norm": None,
    "norm_heads": "tensor",
    "expert": "expert",
    "router": None,
    "rank": None,
    # Activations.
    "stages": "stage",
    "batch": _BATCH,
    "expert_batch": ("replica", "data", "fsdp", "stage"),
    "length": "context",
    "batch_length": (*_BATCH, "context"),
    # Between the maps that are split over tensor, its devices split the length (Korthikanti et al. 2022, arXiv
    # 2205.05198): norms and residuals are neither held nor made twice.
    "stream_length": ("context", "tensor"),
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_vocab": "tensor",
}

# The kind of memory that a device reads from its host by itself.
HOST_MEMORY = "pinned_host"

# Mesh axes over which the members of a stack of runs are split (see stack.py).
MEMBERS = ("replica", "data")

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_in_member: contextvars.ContextVar[bool] = contextvars.ContextVar("in_member", default=False)
_in_stage: contextvars.ContextVar[bool] = contextvars.ContextVar("in_stage", default=False)

# Seconds after which a process that says nothing counts as lost, and the others end too, rather than wait for it.
_PATIENCE = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}


def join_processes() -> None:
  """Joins the processes of a run that spans hosts; does nothing where the environment asks for nothing.

  Either of two things in the environment asks:

  - JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID name the processes.
    This works anywhere, and wins over what follows.
  - LMJAX_DISTRIBUTED=auto leaves it to `jax.distributed.initialize()`, which knows Cloud TPU (also several slices and
    GKE), Slurm, Open MPI, and Kubernetes jobs where the `kubernetes` package is installed. It has to be asked for: a
    shell within a Slurm job, or one host of a TPU slice, would else wait for processes that nobody has started.

  Raises:
    UserError: where some of the three are missing or no numbers, where LMJAX_DISTRIBUTED is something else, and where
      JAX finds none of these clusters.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  missing = [name for name in names if name not in os.environ]
  if len(missing) == len(names):
    return _join_found_processes()
  if missing:
    raise UserError(f"The environment has some of {', '.join(names)} but not {' and '.join(missing)}; set all or none.")
  address, count, index = (os.environ[name] for name in names)
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise UserError(f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID is {index!r}, but they must be a number and "
                    "one of 0 to that number less 1.")
  jax.distributed.initialize(address, int(count), int(index), **_PATIENCE)


def _join_found_processes() -> None:
  wanted = os.environ.get("LMJAX_DISTRIBUTED", "")
  if wanted not in ("", "auto"):
    raise UserError(f"LMJAX_DISTRIBUTED is {wanted!r}, but it must be 'auto', or not set.")
  if not wanted:
    return
  try:
    jax.distributed.initialize(**_PATIENCE)
  except ValueError as e:  # It found nothing to fill its arguments from.
    raise UserError("LMJAX_DISTRIBUTED is 'auto', but JAX finds no cluster that it knows here; set "
                    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID instead.") from e


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with all axes of `MESH_AXES`, most of them of size 1.

  Args:
    config: sizes; an axis of -1 takes what the others leave.
    devices: in order; None means all devices of all processes.

  Raises:
    UserError: where the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [axis for axis, size in sizes.items() if size == -1]
  asked = " * ".join(f"{a}={s}" for a, s in sizes.items() if s != 1) or "all axes 1"
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise UserError(f"config.mesh asks for {asked}, which does not fit {len(devices)} device(s); the sizes must "
                    "multiply to that number, and one of them may be -1.")
  for axis in free:
    sizes[axis] = len(devices) // fixed
  shape = tuple(sizes.values())
  return Mesh(_topology_order(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _topology_order(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  from jax.experimental import mesh_utils  # Slow to import, and only needed here.
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if num_slices > 1:  # The replicas talk least, and so lie in different slices.
    if shape[0] % num_slices:
      raise UserError(f"config.mesh.replica is {shape[0]}, but the devices are of {num_slices} slices, between which "
                      f"only it may reach; make it a multiple of {num_slices}.")
    within = (shape[0] // num_slices, *shape[1:])
    between = (num_slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
  return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
  """Makes `constrain` and `platform` mean this mesh, for what is traced inside."""
  token = _platform.set(mesh.devices.flat[0].platform)
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _platform.reset(token)


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": what the mesh in use is made of, real or described; else where JAX runs."""
  return _platform.get() or jax.default_backend()


def num_stages() -> int:
  """Returns how many stages the mesh in use has for layers; within one, 1."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty or _in_stage.get() else mesh.shape["stage"]


def in_stage() -> bool:
  """Is this traced inside `each_stage`?"""
  return _in_stage.get()


@contextlib.contextmanager
def each_stage(inside: bool = True) -> Iterator[None]:
  """Makes logical axes leave out the mesh axis of stages, for what is traced inside: work that each does for itself.

  What is traced later, as a backward pass of one's own is, has to be put inside again.
  """
  token = _in_stage.set(inside)
  try:
    yield
  finally:
    _in_stage.reset(token)


@contextlib.contextmanager
def each_member() -> Iterator[None]:
  """Makes logical axes leave out the mesh axes of `MEMBERS`, for what is traced inside: one member of a stack."""
  token = _in_member.set(True)
  try:
    yield
  finally:
    _in_member.reset(token)


def members_sharding(of_one: NamedSharding) -> NamedSharding:
  """Returns the sharding of a stack of arrays that each have the given one: its members are split over `MEMBERS`."""
  return NamedSharding(of_one.mesh, PartitionSpec(MEMBERS, *of_one.spec))


def _axes(name: str | None) -> tuple[str, ...]:
  """Returns the mesh axes that split a logical axis."""
  axes = None if name is None else RULES[name]
  axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
  left_out = (("stage",) if _in_stage.get() and name != "stages" else ()) + (MEMBERS if _in_member.get() else ())
  return tuple(axis for axis in axes if axis not in left_out)


def spec(*names: str | None) -> PartitionSpec:
  """Returns the PartitionSpec of logical axis names; None and unsplit axes are replicated."""
  return PartitionSpec(*(_axes(name) or None for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Asks that an activation be split as its logical names say; without a mesh, or on one device, returns `x`."""
  if _whole():
    return x
  if "stream_length" in names and x.shape[names.index("stream_length")] % ways("stream_length"):
    names = tuple("length" if name == "stream_length" else name for name in names)
  return jax.lax.with_sharding_constraint(x, spec(*names))


def on_each_device(function: Callable[..., Any], inputs: Sequence[tuple], output: Any,
                   checked: bool = True) -> Callable[..., Any]:
  """Returns a function that runs on every device with that device's parts; without a mesh, `function` itself.

  Args:
    function: of arrays, which may call `gather_rows`, `sum_over`, `scatter_sum_rows`, `device_index` and `moved`.
    inputs: logical axis names of each argument; each must divide.
    output: those of the result, or a list of those of several.
    checked: whether JAX proves that results which are not split are the same on all devices; it cannot where a device
      takes a branch of its own, nor can it then differentiate the function.
  """
  if _whole():
    return function
  out_specs = tuple(spec(*names) for names in output) if isinstance(output, list) else spec(*output)
  return jax.shard_map(function, in_specs=tuple(spec(*names) for names in inputs), out_specs=out_specs,
                       check_vma=checked)


def gather_rows(x: jax.Array, name: str) -> jax.Array:
  """Inside `on_each_device`: joins the parts of x, along its first axis, of the devices that split a logical axis."""
  return x if _whole() else jax.lax.all_gather(x, _axes(name), tiled=True)


def sum_over(x: jax.Array, name: str) -> jax.Array:
  """Inside `on_each_device`: the sum of x over the devices that split a logical axis."""
  return x if _whole() else jax.lax.psum(x, _axes(name))


def scatter_sum_rows(x: jax.Array, name: str) -> jax.Array:
  """Inside `on_each_device`: the same sum, of which each device gets its part of the first axis."""
  return x if _whole() else jax.lax.psum_scatter(x, _axes(name), tiled=True)


def device_index(name: str) -> jax.Array | int:
  """Inside `on_each_device`: which part of a logical axis this device has."""
  return 0 if _whole() else jax.lax.axis_index(_axes(name))


def moved(x: Any, name: str, pairs: Sequence[tuple[int, int]]) -> Any:
  """Inside `on_each_device`: what device a has goes to device b, for (a, b) of those that split a logical axis."""
  stays = _whole() or all(start == end for start, end in pairs)
  return x if stays else jax.lax.ppermute(x, _axes(name), pairs)


def _whole() -> bool:
  """Is nothing split?"""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
  """Returns the NamedSharding of every parameter.

  Args:
    mesh: the mesh.
    boxed: parameters with logical axis names, as `jax.eval_shape(model.init, ...)["params"]` gives them.
  """
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(*x.names)), boxed,
                      is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def laid_out(shapes: Any, shardings: Any) -> Any:
  """Returns shapes and types as jax.ShapeDtypeStructs that carry their shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def logical_axes(boxed: Any) -> Any:
  """Returns the tree of logical axis names, a tuple for each parameter."""
  return jax.tree.map(lambda x: x.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def like_params(mesh: Mesh, tree: Any, params: Any, shardings: Any) -> Any:
  """Returns shardings for a tree that holds copies of the parameters, such as an optimizer's state.

  A leaf whose path ends in a parameter's path and has its shape is split like that parameter; all others are
  replicated.

  Args:
    mesh: the mesh.
    tree: abstract arrays.
    params: abstract parameters.
    shardings: the parameters' shardings.
  """
  known = {}
  for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings)):
    known[_names(path)] = (leaf.shape, sharding)
  longest = max(map(len, known), default=0)

  def sharding_of(path, leaf):
    names = _names(path)
    for start in range(max(0, len(names) - longest), len(names)):
      shape, sharding = known.get(names[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding_of, tree)


def _names(path: Sequence[Any]) -> tuple[str, ...]:
  return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch's arrays, split over their first axis."""
  return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Returns the rows of a batch that this process reads: those that its devices hold.

  They need not be neighbours: on a torus the devices of a host are not, in the order that suits the network. Processes
  that split a model between them, and not the batch, read the same rows.
  """
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for index in held for row in range(batch_size)[index[0]]})


def global_batch(mesh: Mesh, rows: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
  """Makes global arrays of the rows that each process has read.

  Args:
    mesh: the mesh.
    rows: arrays [rows, ...], the rows that `process_rows` names, in its order.
    batch_size: B, of the whole batch.

  Returns:
    Arrays [B, ...] split over their first axis.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(rows, sharding)
  at = {row: place for place, row in enumerate(process_rows(mesh, batch_size))}

  def assemble(x):
    part = lambda index: x[[at[row] for row in range(batch_size)[index[0]]]]
    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

  return {key: assemble(value) for key, value in rows.items()}


def ways(name: str) -> int:
  """Returns into how many parts the mesh in use splits a logical axis."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _axes(name))


def check_divisible(config: Config, mesh: Mesh) -> None:
  """Raises a UserError where a size of the model or the batch does not divide by the mesh."""
  size = lambda axes: math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))
  model, train = config.model, config.train
  wanted = [("model.embed_dim", model.embed_dim, "fsdp"), ("model.mlp_dim", model.mlp_dim, "tensor"),
            ("model.num_heads", model.num_heads, "tensor"), ("model.num_kv_heads", model.num_kv_heads, "tensor"),
            ("model.vocab_size", model.vocab_size, "tensor"), ("model.num_experts", model.num_experts, "expert"),
            ("model.expert_dim", model.expert_dim or 0, "tensor"),
            ("model.shared_expert_dim", model.shared_expert_dim, "tensor")]
  for name, value, axis in wanted:
    if value % size(axis):
      raise UserError(f"config.{name} is {value}, which config.mesh.{axis} = {size(axis)} does not divide.")
  if model.architecture == "electra":
    generator, whole = electra_parts(model)[0], f"config.model.generator_fraction = {model.generator_fraction:.3g}"
    for name, axis in (("embed_dim", "fsdp"), ("mlp_dim", "tensor"), ("num_heads", "tensor")):
      if getattr(generator, name) % size(axis):
        raise UserError(f"{whole} makes a generator with a {name} of {getattr(generator, name)}, which "
                        f"config.mesh.{axis} = {size(axis)} does not divide.")
  microbatch, ways = train.batch_size // train.grad_accum_steps, size(_BATCH)
  if microbatch % ways:
    raise UserError(
        f"config.train.batch_size = {train.batch_size} in {train.grad_accum_steps} microbatch(es) makes {microbatch} "
        f"sequences at a time, which do not split over the {ways} devices of mesh axes {' * '.join(_BATCH)}; "
        f"make batch_size a multiple of {ways * train.grad_accum_steps}.")
  _check_length(config, mesh.shape["context"])
  _check_stages(config, mesh.shape["stage"], microbatch // ways)
  if eval_batch_size(config) % ways:
    raise UserError(
        f"An evaluation takes {eval_batch_size(config)} sequences at a time (config.eval.batch_size), which do not "
        f"split over the {ways} devices of mesh axes replica * data * fsdp * expert; make it a multiple of {ways}.")


def _check_length(config: Config, context: int) -> None:
  if context == 1:
    return
  asked = f"config.mesh.context is {context}"
  if config.data.seq_len % (2 * context):
    raise UserError(f"{asked}, so config.data.seq_len = {config.data.seq_len} must be a multiple of {2 * context}.")
  if config.model.architecture == "xlnet":
    raise UserError(f"{asked}, but XLNet's attention is not split over the length; use other mesh axes.")
  if config.model.attention_impl not in ("auto", "chunked", "xla"):
    raise UserError(f"{asked}, over which config.model.attention_impl = {config.model.attention_impl} does not work; "
                    "use auto.")


def _check_stages(config: Config, stages: int, rows: int) -> None:
  """Raises a UserError where layers or microbatches do not divide by the stages; rows are those of a device."""
  if stages == 1:
    return
  model, asked = config.model, f"config.mesh.stage is {stages}"
  if model.architecture == "xlnet" or model.share_layers or model.num_future > 1:
    raise UserError(f"{asked}, but XLNet, shared layers and the blocks of num_future are not split into stages; use "
                    "other mesh axes.")
  for name in ("num_layers", *(["num_decoder_layers"] if model.architecture == "encoder_decoder" else [])):
    if getattr(model, name) % (stages * model.stage_repeats):
      raise UserError(f"{asked} and config.model.stage_repeats {model.stage_repeats}, whose product does not divide "
                      f"config.model.{name} = {getattr(model, name)}.")
  count = model.stage_microbatches
  if count and (count % stages or rows % (count // stages)):
    raise UserError(f"config.model.stage_microbatches is {count}, but it must be a multiple of config.mesh.stage = "
                    f"{stages} and divide the {rows * stages} sequences that {stages} devices have.")
