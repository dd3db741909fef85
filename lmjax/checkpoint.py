"""Checkpoints of a run, over Orbax: saved without stopping training, restored onto any mesh, checked before use.

A run keeps them in `workdir/checkpoints/<step>/state/`: the state as nested dicts of arrays named as in the program
(`params`, `opt_state`, ...), and beside the arrays a JSON `meta` that the caller chooses. Orbax commits a folder by
renaming it, so a process killed at any moment leaves the whole checkpoint or none.

Orbax does not notice every flipped byte in the arrays it reads, and a flipped byte in its descriptions can pass for
another shape. So before the commit the size and CRC-32 of every file go into `checksums.json` (each process reads back
what it wrote, in the thread that finishes the save), and they are compared before a restore: a checkpoint that differs
in any file is damaged, and so is one without that record. Once it has passed, a difference from what the program
expects is a changed config, which is an error and never a reason to fall back.
"""

import concurrent.futures
import contextlib
import json
import logging as std_logging
from typing import Any
import zlib

from absl import logging
from etils import epath
import flax.traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from lmjax.config import CheckpointConfig, UserError

_ITEM = "state"
_RECORD = "checksums.json"
_READ_BYTES = 1 << 22
_REFUSALS = ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied",
             "Read-only file system")


def _is_shown(record: std_logging.LogRecord) -> bool:
  """Keeps Orbax's messages for those who debug: what matters in them is raised or warned of here."""
  return "/orbax/" not in record.pathname or logging.get_verbosity() >= logging.DEBUG


logging.get_absl_logger().addFilter(_is_shown)


class Checkpointer:
  """Saves and restores the state of one run. Every process of the run makes one and calls the same methods."""

  def __init__(self, workdir: epath.PathLike, config: CheckpointConfig):
    """Opens, and where needed makes, `workdir/checkpoints`, and clears what an interrupted save left there.

    Args:
      workdir: the run's folder, a local path or an object-store URL.
      config: how often to save and what to keep, with durations in steps.

    Raises:
      UserError: if the folder cannot be written.
    """
    self.workdir = epath.Path(workdir)
    self._directory = _checkpoints_folder(workdir)
    self._config = config
    # Trained weights shrink by a tenth at most, and compressing them takes longer than writing them.
    handler = _RecordingHandler(use_compression=False)
    registry = ocp.DefaultCheckpointHandlerRegistry()
    registry.add(_ITEM, ocp.args.PyTreeSave, handler)
    kept = [ocp.checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_every_steps is not None:
      kept.append(ocp.checkpoint_managers.EveryNSteps(config.keep_every_steps))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
        enable_async_checkpointing=True,  # A synchronous save is one that is waited for.
        cleanup_tmp_directories=True, lightweight_initialize=True, save_root_metadata=False)
    try:
      _clear_unfinished(self._directory)
      self._manager = ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)
    except OSError as e:
      raise UserError(f"The folder {self._directory} cannot be written ({e.strerror or e}); "
                      "give a workdir that can.") from e

  def should_save(self, step: int) -> bool:
    """Whether `checkpoint.every_steps` asks for a checkpoint after `step`."""
    return self._config.every_steps is not None and step > 0 and step % self._config.every_steps == 0

  def save(self, step: int, state: Any, meta: dict) -> None:
    """Saves a checkpoint, or does nothing if that step's is there already.

    The arrays of `state` may be donated as soon as this returns. With `checkpoint.async_save` the writing goes on
    behind the training; an error in it is raised by the next call of this object.

    Args:
      step: number of finished training steps.
      state: pytree of jax.Array.
      meta: JSON values saved beside the arrays.

    Raises:
      UserError: if this checkpoint, or the one still being written, cannot be written.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    tree = _to_tree(state)
    if self._config.async_save:
      tree = jax.tree.map(_detached, tree)
    args = ocp.args.PyTreeSave(tree, custom_metadata=json.loads(json.dumps(meta)))
    with _write_errors(self._directory):
      self._manager.save(step, args=ocp.args.Composite(**{_ITEM: args}), force=True)
    if not self._config.async_save:
      self.wait()

  def restore(self, abstract_state: Any) -> tuple[Any, dict] | None:
    """Returns the newest undamaged checkpoint, or None if the run has none.

    Damaged checkpoints that are newer are reported, and renamed to `damaged-<step>` so that their steps can be saved
    again.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any mesh.

    Returns:
      (state, meta), the state's arrays laid out as `abstract_state` says.

    Raises:
      UserError: if all checkpoints are damaged, or the newest good one does not fit `abstract_state`; nothing is
        renamed then.
    """
    self.wait()
    steps = _steps(self._directory)
    if not steps:
      return None
    step = _newest_undamaged(self._directory, steps)
    state, meta = _read(self._directory, step, abstract_state)
    damaged = [other for other in steps if other > step]
    if damaged:
      if jax.process_index() == 0:
        for other in damaged:
          _set_aside(self._directory, other)
      _barrier("damaged checkpoints set aside")
      self._manager.reload()
    return state, meta

  def wait(self) -> None:
    """Returns when the checkpoint being written is committed.

    Raises:
      UserError: if it could not be written.
    """
    with _write_errors(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the checkpoint being written and frees the threads.

    Raises:
      UserError: if it could not be written.
    """
    with _write_errors(self._directory):
      self._manager.close()


def latest_step(workdir: epath.PathLike) -> int | None:
  """Returns the step of the newest committed checkpoint of a run, or None if it has none."""
  return max(_steps(_checkpoints_folder(workdir)), default=None)


def restore_params(workdir: epath.PathLike, abstract_params: Any, step: int | None = None, *,
                   prefer_ema: bool = True) -> Any:
  """Reads the parameters of a run, and nothing else of its checkpoint, onto any mesh.

  Args:
    workdir: the folder of the run.
    abstract_params: pytree of jax.ShapeDtypeStruct with shardings. Values are cast to its dtypes.
    step: which checkpoint; None takes the newest undamaged one.
    prefer_ema: whether to take the moving average of the parameters where the run kept one.

  Returns:
    The parameters, laid out as `abstract_params` says.

  Raises:
    UserError: if there is no such workdir, checkpoint or step, if it is damaged, or if its shapes differ.
  """
  directory = _checkpoints_folder(workdir)
  step = _choose_step(workdir, directory, step)
  saved = _saved(directory, step)[0]
  return _read_part(directory, step, saved, _params_name(saved, prefer_ema), abstract_params, cast=True)


def load_params(workdir: epath.PathLike, step: int | None = None, *, prefer_ema: bool = True) -> dict:
  """Reads the parameters of a run as it saved them, as nested dicts of arrays on the default device.

  Args and errors are those of `restore_params`.
  """
  directory = _checkpoints_folder(workdir)
  step = _choose_step(workdir, directory, step)
  saved = _saved(directory, step)[0]
  name = _params_name(saved, prefer_ema)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {key.removeprefix(f"{name}/"): jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device)
              for key, value in saved.items() if key.startswith(f"{name}/")}
  abstract = flax.traverse_util.unflatten_dict(abstract, sep="/")
  return _read_part(directory, step, saved, name, abstract, cast=False)


@contextlib.contextmanager
def _write_errors(directory: epath.Path):
  """Clears what a failed save has left, and turns what the file system refuses into a UserError."""
  try:
    yield
  except Exception as e:
    if jax.process_index() == 0:
      for path in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        path.rmtree()
    # Orbax and TensorStore wrap the system's errors in types of their own; the text is what they share.
    reason = next((words for words in _REFUSALS if words.lower() in f"{e!r} {e.__cause__!r}".lower()), None)
    if reason is None:
      raise
    raise UserError(f"A checkpoint could not be written to {directory} ({reason}); make room or give another "
                    "workdir, and start again: the run goes on from its last checkpoint.") from e


# The tree that is saved.


def _flat(state: Any) -> dict[str, Any]:
  """Returns {"params/block/kernel": leaf, ...}; empty optimizer states and None hold no arrays and leave no trace."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  assert len(flat) == len(leaves), "Two leaves of the state have the same name."
  return flat


def _is_key(leaf: Any) -> bool:
  return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_tree(state: Any) -> dict:
  """Returns the state as nested dicts, with random keys as the integers they are made of."""
  flat = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in _flat(state).items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _detached(leaf: jax.Array) -> jax.Array:
  """Returns a copy of an array that lives on the CPU, and any other array as it is.

  Orbax copies from an accelerator before a save returns, but on the CPU it writes from the array's own memory, and the
  next training step, to which that memory is donated, would wait until it is written.
  """
  if any(device.platform != "cpu" for device in leaf.sharding.device_set):
    return leaf
  shards = [jax.device_put(_aligned_copy(np.asarray(shard.data)), shard.device) for shard in leaf.addressable_shards]
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _aligned_copy(array: np.ndarray) -> np.ndarray:
  """Returns a copy that starts at a multiple of 64 bytes, which `device_put` takes over without copying it again."""
  memory = np.empty(array.nbytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
  np.copyto(copy, array)
  return copy


def _stored_form(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns what `_to_tree` makes of an array described by `leaf`."""
  if not _is_key(leaf):
    return leaf
  data = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _from_stored(leaf: jax.Array, abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """Inverse of `_stored_form`, on values."""
  if not _is_key(abstract):
    return leaf
  impls = []  # `key_impl` takes keys and tracers only, not a ShapeDtypeStruct.
  jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), abstract)
  return jax.random.wrap_key_data(leaf, impl=impls[0])


# Reading.


def _saved(directory: epath.Path, step: int) -> tuple[dict[str, Any], dict]:
  """Returns ({name: description with shape and dtype}, meta) of a checkpoint."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / _ITEM)
  return flax.traverse_util.flatten_dict(metadata.tree, sep="/"), metadata.custom_metadata


def _read(directory: epath.Path, step: int, abstract_state: Any) -> tuple[Any, dict]:
  saved, meta = _saved(directory, step)
  return _read_part(directory, step, saved, "", abstract_state, cast=False), meta


def _read_part(directory: epath.Path, step: int, saved: dict[str, Any], name: str, abstract: Any, *, cast: bool) -> Any:
  """Reads the subtree `name` ("" for all) of a checkpoint into the structure and shardings of `abstract`."""
  prefix = f"{name}/" if name else ""
  wanted = {prefix + key: leaf for key, leaf in _flat(abstract).items()}
  stored = {key: _stored_form(leaf) for key, leaf in wanted.items()}
  _check_fits(f"The checkpoint of step {step} in {directory}", stored,
              {key: leaf for key, leaf in saved.items() if key.startswith(prefix)}, cast)
  tree = flax.traverse_util.unflatten_dict(stored, sep="/")
  args = ocp.args.PyTreeRestore(
      tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    values = flax.traverse_util.flatten_dict(reader.restore(directory / str(step) / _ITEM, args=args), sep="/")
  leaves = [_from_stored(values[key], leaf) for key, leaf in wanted.items()]
  return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), leaves)


def _check_fits(where: str, wanted: dict[str, Any], saved: dict[str, Any], cast: bool) -> None:
  """Raises a UserError that names the first array in which what is saved differs from what is wanted."""
  advice = "use the config it was saved with, or another workdir."
  for name, leaf in wanted.items():
    if name in saved and tuple(saved[name].shape) != tuple(leaf.shape):
      raise UserError(f"{where} has {name} of shape {tuple(saved[name].shape)}, but the config makes it "
                      f"{tuple(leaf.shape)}; {advice}")
  for name in wanted:
    if name not in saved:
      raise UserError(f"{where} has no {name}, which the config asks for; {advice}")
  for name in saved:
    if name not in wanted:
      raise UserError(f"{where} has {name}, which the config does not; {advice}")
  for name, leaf in wanted.items():
    if not cast and saved[name].dtype != leaf.dtype:
      raise UserError(f"{where} has {name} in {saved[name].dtype}, but the config makes it {leaf.dtype}; {advice}")


def _params_name(saved: dict[str, Any], prefer_ema: bool) -> str:
  return "ema" if prefer_ema and any(name.startswith("ema/") for name in saved) else "params"


# Which checkpoint.


def _checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
  path = epath.Path(workdir)
  # Orbax wants absolute paths; `absolute` would turn an object-store URL into a local path.
  return (path if path.is_absolute() else path.absolute()) / "checkpoints"


def _steps(directory: epath.Path) -> list[int]:
  """Returns the steps of the committed checkpoints, newest first."""
  return sorted(ocp.utils.checkpoint_steps(directory), reverse=True)


def _choose_step(workdir: epath.PathLike, directory: epath.Path, step: int | None) -> int:
  """Returns `step` after checking it, or the newest undamaged one for None."""
  if not epath.Path(workdir).is_dir():
    raise UserError(f"There is no folder {workdir}; give the workdir of a run.")
  steps = _steps(directory)
  if not steps:
    raise UserError(f"{workdir} has no checkpoints; give the workdir of a run that has saved one.")
  if step is None:
    return _newest_undamaged(directory, steps)
  if step not in steps:
    known = ", ".join(map(str, sorted(steps)))
    raise UserError(f"{workdir} has no checkpoint of step {step}; it has those of {known}.")
  reason = _agreed_damage(directory / str(step) / _ITEM)
  if reason:
    raise UserError(f"The checkpoint of step {step} in {directory} is damaged: {reason}; choose another step.")
  return step


def _newest_undamaged(directory: epath.Path, steps: list[int]) -> int:
  """Returns the first of `steps` whose files are what was written, with a warning for each before it."""
  reasons = []
  for step in steps:
    reason = _agreed_damage(directory / str(step) / _ITEM)
    if not reason:
      for damaged, why in reasons:
        if jax.process_index() == 0:
          logging.warning("The checkpoint of step %d in %s is damaged: %s; that of step %d is used instead.",
                          damaged, directory, why, step)
      return step
    reasons.append((step, reason))
  found = "; ".join(f"step {step}: {why}" for step, why in reasons)
  raise UserError(f"All checkpoints in {directory} are damaged ({found}); put back a copy, or move the folder away to "
                  "start afresh.")


def _clear_unfinished(directory: epath.Path) -> None:
  """Removes what an interrupted save left; Orbax overlooks it when the save had only just begun."""
  if jax.process_index() or not directory.exists():
    return
  for path in directory.iterdir():
    if ".orbax-checkpoint-tmp" in path.name:
      path.rmtree(missing_ok=True)


def _set_aside(directory: epath.Path, step: int) -> None:
  target, count = directory / f"damaged-{step}", 1
  while target.exists():
    count += 1
    target = directory / f"damaged-{step}-{count}"
  (directory / str(step)).rename(target)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


# The record of sizes and checksums.


class _RecordingHandler(ocp.PyTreeCheckpointHandler):
  """Writes the record of every file before Orbax commits the checkpoint."""

  async def async_save(self, directory: epath.Path, item: Any = None, save_args: Any = None, args: Any = None) -> list:
    """Starts the save; its future ends when this process has recorded the files it wrote."""
    written = await super().async_save(directory, item, save_args, args)
    return [ocp.future.ChainedFuture(written, lambda: _record_own_files(directory))]

  def finalize(self, directory: epath.Path) -> None:
    """Joins the records of all processes; Orbax calls this in process 0 when all have written."""
    super().finalize(directory)
    record = {}
    for part in list(directory.glob(f"*.{_RECORD}")):
      record.update(json.loads(part.read_text()))
      part.unlink()
    record.update({name: _size_and_crc(path) for name, path in _files(directory) if name not in record})
    text = json.dumps(record, indent=0)
    (directory / _RECORD).write_text(f"{zlib.crc32(text.encode())}\n{text}")


def _record_own_files(directory: epath.Path) -> None:
  """Records the folder that only this process writes to."""
  process = jax.process_index()
  record = {name: _size_and_crc(path) for name, path in _files(directory, f"ocdbt.process_{process}")}
  (directory / f"{process}.{_RECORD}").write_text(json.dumps(record))


def _files(directory: epath.Path, part: str = "") -> list[tuple[str, epath.Path]]:
  """Returns (name relative to `directory`, path) of all files below `directory / part`."""
  found, folders = [], [directory / part] if part else [directory]
  while folders:
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      else:
        found.append((str(path.relative_to(directory)), path))
  return found


def _size_and_crc(path: epath.Path) -> list[int]:
  size, crc = 0, 0
  with path.open("rb") as file:
    while block := file.read(_READ_BYTES):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]


def _agreed_damage(folder: epath.Path) -> str | None:
  """Returns why a checkpoint is damaged, or None, the same verdict in all processes, which share the reading."""
  reason = _damage(folder, jax.process_index(), jax.process_count())
  if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.array(reason is not None))):
    return reason or "another process found a file that is not what was written"
  return reason


def _damage(folder: epath.Path, process: int, num_processes: int) -> str | None:
  """Returns what is wrong with the files in this process's share of a checkpoint, or None."""
  try:
    crc, _, text = (folder / _RECORD).read_text().partition("\n")
  except (OSError, UnicodeDecodeError):
    return f"{_RECORD} is missing or cannot be read"
  if crc != str(zlib.crc32(text.encode())):
    return f"{_RECORD} does not have the checksum it was written with"
  files = sorted((name, size, crc) for name, (size, crc) in json.loads(text).items())
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return next(filter(None, pool.map(lambda entry: _file_damage(folder, *entry), files[process::num_processes])), None)


def _file_damage(folder: epath.Path, name: str, size: int, crc: int) -> str | None:
  try:
    found_size, found_crc = _size_and_crc(folder / name)
  except OSError:
    return f"{name} is missing or cannot be read"
  if found_size != size:
    return f"{name} has {found_size} bytes instead of {size}"
  return None if found_crc == crc else f"{name} does not have the checksum it was written with"
