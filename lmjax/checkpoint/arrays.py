"""The arrays of a checkpoint: how a state is named, copied out of the way of training, and read back onto any mesh.

A state is saved as nested dicts whose names are those of the program; random keys are saved as the integers they are
made of. On disk each array is a Zarr array in an OCDBT database, as Orbax writes it.
"""

import concurrent.futures
import math
import os
from typing import Any, Iterable, Iterator

from etils import epath
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

# Bytes that a thread copies at a time.
_COPY_BYTES = 1 << 24
# Memory that a copy must start at a multiple of for `device_put` to take it over without another copy.
_ALIGNMENT = 64
_READERS = 4


# Names.


def flat(state: Any) -> dict[str, Any]:
  """Returns {"params/block/kernel": leaf, ...}; empty optimizer states and None hold no arrays and leave no trace."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  assert len(named) == len(leaves), "Two leaves of the state have the same name."
  return named


def to_tree(state: Any) -> dict:
  """Returns the state as nested dicts, with random keys as the integers they are made of."""
  stored = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in flat(state).items()}
  return flax.traverse_util.unflatten_dict(stored, sep="/")


def stored_form(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns what `to_tree` makes of an array described by `leaf`."""
  if not _is_key(leaf):
    return leaf
  data = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def from_stored(leaf: jax.Array, abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """Inverse of `stored_form`, on values."""
  if not _is_key(abstract):
    return leaf
  impls = []  # `key_impl` takes keys and tracers only, not a ShapeDtypeStruct.
  jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), abstract)
  return jax.random.wrap_key_data(leaf, impl=impls[0])


def _is_key(leaf: Any) -> bool:
  return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# Copying.


class Staging:
  """Memory that the arrays of a save are copied to, so that training may change them while they are written.

  Orbax copies from an accelerator before a save returns, but on the CPU it writes from the arrays' own memory, and the
  next training step, to which that memory is donated, would wait until it is written. The copy is what an async save
  costs on the CPU, and most of a first copy's time goes into pages that the system has yet to provide; so the memory is
  kept for the saves that follow.
  """

  def __init__(self):
    self._memory = np.empty(0, np.uint8)

  def copy(self, tree: Any) -> Any:
    """Returns a tree with copies of the arrays that live on the CPU, and all others as they are.

    The copies of the call before are overwritten.
    """
    leaves, structure = jax.tree.flatten(tree)
    sources = [_distinct_shards(leaf) if _on_cpu(leaf) else {} for leaf in leaves]
    parts = [part for shards in sources for part in shards.values()]
    copies = iter(self._places(parts))
    placed = [{index: next(copies) for index in shards} for shards in sources]
    _copy_all(parts, [copy for shards in placed for copy in shards.values()])
    return jax.tree.unflatten(structure, [
        _assemble(leaf, shards) if shards else leaf for leaf, shards in zip(leaves, placed)])

  def _places(self, parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields an array in this memory for each part."""
    sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts]
    if sum(sizes) + _ALIGNMENT > self._memory.nbytes:
      self._memory = np.empty(sum(sizes) + _ALIGNMENT, np.uint8)
    start = -self._memory.ctypes.data % _ALIGNMENT
    for part, size in zip(parts, sizes):
      yield self._memory[start:start + part.nbytes].view(part.dtype).reshape(part.shape)
      start += size


def _on_cpu(leaf: jax.Array) -> bool:
  return all(device.platform == "cpu" for device in leaf.sharding.device_set)


def _distinct_shards(leaf: jax.Array) -> dict[str, np.ndarray]:
  """Returns the parts of an array that this process holds, each once however many devices hold it."""
  return {str(shard.index): np.asarray(shard.data) for shard in leaf.addressable_shards}


def _assemble(leaf: jax.Array, shards: dict[str, np.ndarray]) -> jax.Array:
  parts = [jax.device_put(shards[str(shard.index)], shard.device) for shard in leaf.addressable_shards]
  # All of a CPU's kinds of memory are one, and a copy is best where it needs no further one.
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding.with_memory_kind("device"), parts)


def _copy_all(sources: list[np.ndarray], targets: list[np.ndarray]) -> None:
  """Copies arrays by as many threads as there are cores."""
  def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    np.copyto(*pair)
  pairs = [pair for source, target in zip(sources, targets) for pair in _pieces(target, source)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(copy, pairs))


def _pieces(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  if source.nbytes <= _COPY_BYTES or not source.flags.c_contiguous:
    yield target, source
    return
  target, source = target.reshape(-1), source.reshape(-1)
  count = _COPY_BYTES // source.itemsize
  for start in range(0, source.size, count):
    yield target[start:start + count], source[start:start + count]


# Reading.


def read(folder: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Reads arrays of a checkpoint onto any mesh, each byte once a process.

  Devices split an array otherwise than those that wrote it, and what one of them needs lies in many stored chunks,
  which are read whole. So a process reads what all its devices need of an array together, and hands out the parts.

  Args:
    folder: the state's folder in the checkpoint.
    wanted: by name, the shape, dtype and sharding of each; values are cast to the dtype.
  """
  import tensorstore
  context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 10 ** 8}})  # For the database's index.

  def read_one(name: str) -> jax.Array:
    array = tensorstore.open(_spec(folder, name), read=True, context=context).result()
    return _read_array(array, wanted[name])

  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    # The largest come first, so that the last to be read is soon done.
    names = sorted(wanted, key=lambda name: -math.prod(wanted[name].shape))
    return dict(zip(names, pool.map(read_one, names)))


def _spec(folder: epath.Path, name: str) -> dict:
  base = os.fspath(folder)
  base = f"{base}/" if "://" in base else {"driver": "file", "path": f"{base}/"}
  database = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/", "cache_pool": "cache_pool#ocdbt"}
  return {"driver": "zarr", "kvstore": database}


def _read_array(array: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  spans_of = lambda index: tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape))
  wanted = {spans_of(index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
  futures = {region: array[tuple(slice(*span) for span in region)].read() for region in regions(wanted)}
  values = {region: future.result().astype(leaf.dtype, copy=False) for region, future in futures.items()}

  def part(index: tuple[slice, ...]) -> np.ndarray:
    spans = spans_of(index)
    region, value = next((region, value) for region, value in values.items() if bounding_box([spans, region]) == region)
    return value[tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(spans, region))]

  return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


# A part of an array: (start, stop) along each axis.
Spans = tuple[tuple[int, int], ...]


def regions(parts: Iterable[Spans]) -> set[Spans]:
  """Returns what to read for some parts of an array: all in one, unless they leave gaps that would be read for nothing.

  Args:
    parts: distinct, and not overlapping, as the devices of a process hold them.
  """
  volume = lambda spans: math.prod(stop - start for start, stop in spans)
  parts = set(parts)
  box = bounding_box(parts)
  return {box} if volume(box) <= sum(map(volume, parts)) else parts


def bounding_box(parts: Iterable[Spans]) -> Spans:
  """Returns the smallest part of an array that holds all of `parts`."""
  return tuple((min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*parts))


def saved(folder: epath.Path) -> tuple[dict[str, Any], dict]:
  """Returns ({name: description with shape and dtype}, meta) of a checkpoint."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
  return flax.traverse_util.flatten_dict(metadata.tree, sep="/"), metadata.custom_metadata
