"""Files of tensors in a folder: read memory-mapped and one tensor at a time, written as safetensors, in shards."""

import contextlib
import json
import shutil
from typing import Any, Iterator, Mapping

from etils import epath
import numpy as np
import safetensors
import safetensors.numpy

from lmjax.config_checks import Refused, UserError
from lmjax.convert.hf_config import read_json
from lmjax.convert.torch_pickle import TorchFile

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What torch wrote before there were safetensors, read where there are none.
_LEGACY_WHOLE, _LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_SHARD_BYTES = 5 * 10**9


class TensorFiles:
  """The tensors of a Hugging Face folder. Nothing is read before it is asked for."""

  def __init__(self, folder: epath.Path, stack: contextlib.ExitStack):
    """Opens the files.

    Args:
      folder: with model.safetensors or pytorch_model.bin, or shards of either and their index.
      stack: closes the files.

    Raises:
      UserError: if there are none, or one is missing or damaged.
    """
    self._folder = folder
    self._files = {}
    listed, whole = self._listing()
    index = {} if listed is None else self._read_index(listed)
    for name in sorted(set(index.values())) if index else [whole]:
      file = self._open(folder / name, stack)
      self._files.update({key: file for key in file.keys()})
    for key in index:
      if key not in self._files:
        raise UserError(f"{folder / index[key]} has no tensor {key}, which {listed} says it has; put back a good copy.")

  @property
  def names(self) -> list[str]:
    """Names of all tensors."""
    return list(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it."""
    return tuple(self._files[name].get_slice(name).get_shape())

  def check_dtype(self, name: str) -> None:
    """Raises a UserError where a tensor is not of a floating type, as in quantised files."""
    dtype = self._files[name].get_slice(name).get_dtype()
    if dtype not in _DTYPES:
      raise UserError(f"{self._folder} has {name} in {dtype}, but lmjax reads {', '.join(_DTYPES)}; give the folder of "
                      "the model before quantisation.")

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor."""
    return self._files[name].get_tensor(name)

  def _listing(self) -> tuple[str | None, str | None]:
    """Returns the name of the shards' index, or else of the one file."""
    for whole, index in ((_WHOLE, _INDEX), (_LEGACY_WHOLE, _LEGACY_INDEX)):
      if (self._folder / whole).exists():
        return None, whole
      if (self._folder / index).exists():
        return index, None
    raise UserError(f"{self._folder} has a config.json but no {_WHOLE} or {_INDEX}; give a folder with both.")

  def _read_index(self, name: str) -> dict[str, str]:
    """Returns {tensor: file}."""
    path = self._folder / name
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or any("/" in str(name) for name in index.values()):
      raise UserError(f"{path} has no weight_map from tensors to files beside it; put back a good copy.")
    return index

  def _open(self, path: epath.Path, stack: contextlib.ExitStack) -> Any:
    try:
      if path.suffix == ".bin":
        return TorchFile(path)
      return stack.enter_context(safetensors.safe_open(str(path), framework="numpy"))
    except FileNotFoundError as e:
      raise UserError(f"{path} is missing, although the index beside it names it; put it back.") from e
    except (OSError, safetensors.SafetensorError) as e:
      raise UserError(f"{path} is not a whole safetensors file ({e}); put back a good copy.") from e


def write_tensors(folder: epath.Path, sizes: Mapping[str, int], tensors: Iterator[tuple[str, np.ndarray]],
                  shard_bytes: int = _SHARD_BYTES) -> None:
  """Writes tensors to one file, or to shards and their index.

  Args:
    folder: to write to.
    sizes: bytes of every tensor, in the order in which they come.
    tensors: (name, contiguous array); no more than a shard of them is held at a time.
    shard_bytes: bytes of a file at most, unless a single tensor is larger.
  """
  shards, room = [], 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  if len(shards) == 1:
    return write_file(folder / _WHOLE, dict(tensors))
  files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}
  for file, names in files.items():
    write_file(folder / file, dict(next(tensors) for _ in names))
  index = {"metadata": {"total_size": sum(sizes.values())},
           "weight_map": {name: file for file, names in files.items() for name in names}}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: epath.Path, tensors: dict[str, np.ndarray], config: str = "config.json") -> None:
  """Writes tensors to one file, beside one of the name `config`.

  Raises:
    Refused: if it cannot be written.
  """
  try:
    safetensors.numpy.save_file(tensors, str(path), metadata={"format": "pt"})
  except safetensors.SafetensorError as e:
    raise Refused(f"{path} could not be written ({e}); make room or give another folder.") from e
  # The library makes files that only their owner may read; these are like any other file that the user makes.
  shutil.copymode(path.parent / config, path)
