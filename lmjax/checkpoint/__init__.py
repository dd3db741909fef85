"""Checkpoints of a run, over Orbax: saved without stopping training, restored onto any mesh, checked before use.

A run keeps them in `workdir/checkpoints/<step>/state/`: the state as nested dicts of arrays named as in the program
(`params`, `opt_state`, ...), and beside the arrays a JSON `meta` that the caller chooses. Orbax commits a folder by
renaming it, so a process killed at any moment leaves the whole checkpoint or none.

Orbax does not notice every flipped byte in the arrays it reads, and a flipped byte in its descriptions can pass for
another shape. So the files are compared with a record (see record.py) before a restore: a checkpoint that differs in
any file is damaged, and so is one without that record. Once it has passed, a difference from what the program expects
is a changed config, which is an error and never a reason to fall back.
"""

import contextlib
import functools
import json
import logging as std_logging
import sys
from typing import Any, Callable

from absl import logging
from etils import epath
import flax.traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from lmjax.checkpoint import arrays, best, record
from lmjax.config import CheckpointConfig, UserError
from lmjax.config_checks import Refused
from lmjax.optim import lora

_ITEM = "state"
_REFUSALS = ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied",
             "Read-only file system")


def _is_shown(record: std_logging.LogRecord) -> bool:
  """Keeps Orbax's messages for those who debug: what matters in them is raised or warned of here."""
  # asyncio tells of the other files when the disk refuses several of those that Orbax writes at once.
  said = record.getMessage()
  echo = "exception was never retrieved" in said and ("/orbax/" in said or said.startswith("_GatheringFuture"))
  return not (echo or "/orbax/" in record.pathname) or logging.get_verbosity() >= logging.DEBUG


for _logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
  _logger.addFilter(_is_shown)


def _without_closed_loops(shown: Callable[[Any], None], unraisable: Any) -> None:
  """Keeps back what TensorStore prints of each file that is still open when the disk has refused another."""
  closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
  if not closed or logging.get_verbosity() >= logging.DEBUG:
    shown(unraisable)


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
    self._staging = arrays.Staging()
    # Trained weights shrink by a tenth at most, and compressing them takes longer than writing them.
    handler = record.RecordingHandler(use_compression=False)
    registry = ocp.DefaultCheckpointHandlerRegistry()
    registry.add(_ITEM, ocp.args.PyTreeSave, handler)
    self._best = best.KeepStep()
    kept = [ocp.checkpoint_managers.LatestN(config.keep_last), self._best]
    if config.keep_every_steps is not None:
      kept.append(ocp.checkpoint_managers.EveryNSteps(config.keep_every_steps))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
        enable_async_checkpointing=True,  # A synchronous save is one that is waited for.
        cleanup_tmp_directories=False,  # `_clear_unfinished` does it.
        lightweight_initialize=True, save_root_metadata=False)
    try:
      _clear_unfinished(self._directory)
      self._manager = ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)
    except OSError as e:
      raise UserError(f"The folder {self._directory} cannot be written ({e.strerror or e}); "
                      "give a workdir that can.") from e
    self._shown = sys.unraisablehook
    sys.unraisablehook = functools.partial(_without_closed_loops, self._shown)

  def should_save(self, step: int) -> bool:
    """Whether `checkpoint.every_steps` asks for a checkpoint after `step`."""
    return self._config.every_steps is not None and step > 0 and step % self._config.every_steps == 0

  def keep(self, step: int | None) -> None:
    """Keeps the checkpoint of a step for good, in place of the one that was kept so before."""
    self._best.step = step

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
    tree = arrays.to_tree(state)
    if self._config.async_save:
      tree = self._staging.copy(tree)
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
    saved, meta = arrays.saved(self._directory / str(step) / _ITEM)
    state = _read_part(self._directory, step, saved, lambda name: name, abstract_state, cast=False)
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
    try:
      with _write_errors(self._directory):
        self._manager.close()
    finally:
      sys.unraisablehook = self._shown


def latest_step(workdir: epath.PathLike) -> int | None:
  """Returns the step of the newest committed checkpoint of a run, or None if it has none."""
  return max(_steps(_checkpoints_folder(workdir)), default=None)


def restore_params(workdir: epath.PathLike, abstract_params: Any, step: int | None = None, *,
                   prefer_ema: bool = True) -> Any:
  """Reads the parameters of a run, and nothing else of its checkpoint, onto any mesh.

  Where the run trains adapters that `abstract_params` lack, they are merged.

  The run may be training meanwhile: where it has replaced the newest checkpoint before that was read, the one that is
  there now is taken.

  Args:
    workdir: the folder of the run.
    abstract_params: pytree of jax.ShapeDtypeStruct with shardings. Values are cast to its dtypes.
    step: which checkpoint; None takes the best where the run keeps one, else the newest undamaged one.
    prefer_ema: whether to take the moving average of those parameters of which the run kept one.

  Returns:
    The parameters, laid out as `abstract_params` says.

  Raises:
    UserError: if there is no such workdir, checkpoint or step, if it is damaged, or if its shapes differ.
  """
  directory = _checkpoints_folder(workdir)
  chosen = _choose_step(workdir, directory, step)
  try:
    return _read_params(directory, chosen, abstract_params, prefer_ema)
  except Exception:
    # Of several processes only some may have met this, and they can not agree on another step.
    if step is not None or jax.process_count() > 1 or not (newer := _newer_steps(directory, chosen)):
      raise
  return _read_params(directory, _newest_undamaged(directory, newer), abstract_params, prefer_ema)


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
    raise Refused(f"A checkpoint could not be written to {directory} ({reason}); make room or give another "
                  "workdir, and start again: the run goes on from its last checkpoint.") from e


# Reading.


def _read_params(directory: epath.Path, step: int, abstract_params: Any, prefer_ema: bool) -> Any:
  saved, meta = arrays.saved(directory / str(step) / _ITEM)
  # A run that keeps averages has none of what is frozen.
  at = lambda key: f"ema/{key}" if prefer_ema and f"ema/{key}" in saved else f"params/{key}"
  held = [name.removeprefix("params/") for name in saved if name.startswith("params/")]
  adapters = {key: saved[at(key)] for key in held if key.startswith(f"{lora.ADAPTERS}/")}
  merges = bool(adapters) and lora.ADAPTERS not in abstract_params
  if merges:
    abstract_params = {**abstract_params, **_abstract_adapters(adapters, jax.tree.leaves(abstract_params)[0].sharding)}
  params = _read_part(directory, step, {at(key): saved[at(key)] for key in held}, at, abstract_params, cast=True)
  if not merges:
    return params
  optim = meta["config"]["optim"]
  return lora.merge_scaled(params, optim["lora_alpha"] / optim["lora_rank"])


def _abstract_adapters(saved: dict[str, Any], near: jax.sharding.Sharding) -> dict:
  """Describes adapters as they are saved, each to lie whole on the devices of a parameter's sharding."""
  whole = near if isinstance(near, jax.sharding.SingleDeviceSharding) else jax.sharding.NamedSharding(
      near.mesh, jax.sharding.PartitionSpec())
  return flax.traverse_util.unflatten_dict(
      {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for key, leaf in saved.items()}, sep="/")


def _read_part(directory: epath.Path, step: int, saved: dict[str, Any], at: Callable[[str], str], abstract: Any, *,
               cast: bool) -> Any:
  """Reads a part of a checkpoint into the structure and shardings of `abstract`.

  Args:
    directory, step: which checkpoint.
    saved: what it holds of that part.
    at: name in `abstract` -> name in the checkpoint.
    abstract: pytree of jax.ShapeDtypeStruct.
    cast: whether another type than the one that was saved is meant.
  """
  wanted = {at(key): leaf for key, leaf in arrays.flat(abstract).items()}
  stored = {key: arrays.stored_form(leaf) for key, leaf in wanted.items()}
  _check_fits(f"The checkpoint of step {step} in {directory}", stored, saved, cast)
  values = arrays.read(directory / str(step) / _ITEM, stored)
  leaves = [arrays.from_stored(values[key], leaf) for key, leaf in wanted.items()]
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


# Which checkpoint.


def _checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
  path = epath.Path(workdir)
  # Orbax wants absolute paths; `absolute` would turn an object-store URL into a local path.
  return (path if path.is_absolute() else path.absolute()) / "checkpoints"


def _steps(directory: epath.Path) -> list[int]:
  """Returns the steps of the committed checkpoints, newest first."""
  return sorted(ocp.utils.checkpoint_steps(directory), reverse=True)


def _choose_step(workdir: epath.PathLike, directory: epath.Path, step: int | None) -> int:
  """Returns `step` after checking it, or for None the best where the run names one, else the newest undamaged one."""
  if not epath.Path(workdir).is_dir():
    raise UserError(f"There is no folder {workdir}; give the workdir of a run.")
  steps = _steps(directory)
  if not steps:
    raise UserError(f"{workdir} has no checkpoints; give the workdir of a run that has saved one.")
  if step is None and (step := best.read_step(workdir)) not in steps:
    return _newest_undamaged(directory, steps)
  if step not in steps:
    known = ", ".join(map(str, sorted(steps)))
    raise UserError(f"{workdir} has no checkpoint of step {step}; it has those of {known}.")
  reason = record.agreed_damage(directory / str(step) / _ITEM)
  if reason:
    raise UserError(f"The checkpoint of step {step} in {directory} is damaged: {reason}; choose another step.")
  return step


def _newest_undamaged(directory: epath.Path, steps: list[int]) -> int:
  """Returns the first of `steps` whose files are what was written, with a warning for each before it.

  A run that is training may save a newer one meanwhile and remove one of these; then it is the newer that counts.
  """
  reasons = []
  for step in steps:
    reason = record.agreed_damage(directory / str(step) / _ITEM)
    if reason and not reasons and (newer := _newer_steps(directory, steps[0])):
      return _newest_undamaged(directory, newer)
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


def _newer_steps(directory: epath.Path, newest: int) -> list[int]:
  """Returns the steps of the checkpoints there are now, newest first, if one is newer than `newest`; else nothing."""
  steps = _steps(directory)
  if jax.process_count() > 1:  # Each process may see another moment: that of the first counts.
    last = int(multihost_utils.broadcast_one_to_all(np.array(steps[0] if steps else newest)))
    steps = [last, *(step for step in steps if step < last)]
  return steps if steps and steps[0] > newest else []


def _clear_unfinished(directory: epath.Path) -> None:
  """Removes what an interrupted save left; Orbax's own cleaning overlooks it when the save had only just begun."""
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
