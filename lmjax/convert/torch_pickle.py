"""The tensors of a file that torch.save wrote, without torch and without running anything that the file asks for.

Such a file is a pickle, and a pickle is a program: reading one with the standard library calls whatever it names. The
unpickler here knows the few names that a dict of tensors needs, and stands in for each with code of its own; any other
ends the reading before it is looked up. What the pickle holds is then a description; the numbers lie outside it, and
are memory-mapped.

Since torch 1.6 a file is a zip archive with the pickle and one member for each storage; before, it was several pickles
with the storages after them.
"""

import dataclasses
import math
import mmap
import pickle
import struct
from typing import Any, BinaryIO
import zipfile

from etils import epath
import ml_dtypes
import numpy as np

from lmjax.config_checks import UserError

# What torch calls an array of numbers of one type: the name that safetensors has for the type, and NumPy's type.
_STORAGES = {
    "DoubleStorage": ("F64", "<f8"), "FloatStorage": ("F32", "<f4"), "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", ml_dtypes.bfloat16), "LongStorage": ("I64", "<i8"), "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"), "CharStorage": ("I8", "i1"), "ByteStorage": ("U8", "u1"),
    "BoolStorage": ("BOOL", "?"),
}
_ARCHIVE_MAGIC = b"PK"
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950a86a20f9469cfc6c, 1001


@dataclasses.dataclass
class _Storage:
  """An array of numbers in the file; `offset` is where its bytes begin."""
  kind: str
  size: int
  offset: int = -1


@dataclasses.dataclass
class _Tensor:
  """A view of a storage, in numbers, not bytes. The methods are those of a slice of safetensors."""
  storage: _Storage
  start: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def get_shape(self) -> tuple[int, ...]:
    return self.shape

  def get_dtype(self) -> str:
    return _STORAGES[self.storage.kind][0]


class TorchFile:
  """The tensors of one file, with the methods of `safetensors.safe_open` that are used here."""

  def __init__(self, path: epath.Path):
    """Reads what the file describes, and no tensor.

    Args:
      path: of a file on this machine.

    Raises:
      UserError: if it is no whole file of tensors by name, or asks for anything that tensors do not need.
    """
    self._path = path
    with open(path, "rb") as file:
      try:
        self._tensors = _read_archive(file) if file.read(2) == _ARCHIVE_MAGIC else _read_legacy(file)
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._check()
      except _Refused as e:
        raise UserError(f"{path} {e}") from e
      except Exception as e:  # A damaged pickle may raise anything.
        raise UserError(f"{path} is not a whole file of torch ({type(e).__name__}: {e}); put back a good copy.") from e

  def keys(self) -> list[str]:
    """Returns the names of the tensors."""
    return list(self._tensors)

  def get_slice(self, name: str) -> _Tensor:
    """Returns what tells a tensor's shape and type."""
    return self._tensors[name]

  def get_tensor(self, name: str) -> np.ndarray:
    """Returns a tensor, memory-mapped."""
    tensor = self._tensors[name]
    dtype = np.dtype(_STORAGES[tensor.storage.kind][1])
    numbers = np.frombuffer(self._bytes, dtype, tensor.storage.size, tensor.storage.offset)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.start:], tensor.shape, strides, writeable=False)

  def _check(self) -> None:
    """Raises where a tensor would lie outside its storage, or a storage outside the file."""
    for name, tensor in self._tensors.items():
      storage = tensor.storage
      numbers = [tensor.start, storage.size, *tensor.shape, *tensor.strides]
      if any(type(number) is not int or number < 0 for number in numbers) or len(tensor.shape) != len(tensor.strides):
        raise ValueError(f"{name} has no sizes")
      last = tensor.start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
      if math.prod(tensor.shape) and last >= storage.size:
        raise ValueError(f"{name} is larger than its storage")
      if storage.offset < 0 or storage.offset + storage.size * _itemsize(storage) > len(self._bytes):
        raise ValueError(f"the numbers of {name} are not in the file")


class _Refused(Exception):
  """The rest of a sentence that begins with the file."""


class _Unpickler(pickle.Unpickler):
  """Reads a dict of tensors; every name that a pickle may use stands here."""

  def __init__(self, file: BinaryIO):
    super().__init__(file, encoding="utf-8")
    self.storages = {}

  def find_class(self, module: str, name: str) -> Any:
    """Returns what stands in for a name; the real one is never looked up."""
    if (module, name) == ("collections", "OrderedDict"):
      return _ordered_dict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return _rebuild_parameter
    if module == "torch" and name in _STORAGES:
      return name
    raise _Refused(f"is a pickle that asks for {module}.{name}, which tensors do not need, so that lmjax does not read "
                   "it; get the weights as safetensors.")

  def persistent_load(self, pid: Any) -> _Storage:
    """Returns a storage; the same for the same key."""
    what, kind, key, _, size, *view = pid
    if what != "storage" or kind not in _STORAGES or any(view):
      raise _Refused(f"has a storage {pid!r}, which lmjax does not read; get the weights as safetensors.")
    return self.storages.setdefault(key, _Storage(kind, size))


class _Dict(dict):
  """An OrderedDict of a pickle, which may give it attributes: torch keeps versions of modules there."""


def _ordered_dict(items: Any = ()) -> _Dict:
  return _Dict(items)


def _rebuild_tensor(storage: _Storage, start: int, shape: tuple, strides: tuple, *unused: Any) -> _Tensor:
  return _Tensor(storage, start, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *unused: Any) -> _Tensor:
  return tensor


def _read_archive(file: BinaryIO) -> dict[str, _Tensor]:
  archive = zipfile.ZipFile(file)
  members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
  if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
    raise _Refused("has its numbers in another byte order than this machine's; get the weights as safetensors.")
  with archive.open(members["data.pkl"]) as data:
    unpickler = _Unpickler(data)
    tensors = _named(unpickler.load())
  for key, storage in unpickler.storages.items():
    member = members[f"data/{key}"]
    if member.compress_type != zipfile.ZIP_STORED or member.file_size < storage.size * _itemsize(storage):
      raise ValueError(f"its member {member.filename} is compressed or too short")
    # The header of a member, whose two last numbers are the lengths of what stands between it and the bytes.
    file.seek(member.header_offset)
    storage.offset = member.header_offset + 30 + sum(struct.unpack("<26xHH", file.read(30)))
  return tensors


def _read_legacy(file: BinaryIO) -> dict[str, _Tensor]:
  file.seek(0)
  magic, version, machine = (_Unpickler(file).load() for _ in range(3))
  if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
    raise ValueError("it does not begin as one")
  if not machine["little_endian"]:
    raise _Refused("has its numbers in another byte order than this machine's; get the weights as safetensors.")
  unpickler = _Unpickler(file)
  tensors = _named(unpickler.load())
  for key in _Unpickler(file).load():
    storage = unpickler.storages[key]
    if struct.unpack("<q", file.read(8)) != (storage.size,):
      raise ValueError("a storage has another size than is said of it")
    storage.offset = file.tell()
    file.seek(storage.size * _itemsize(storage), 1)
  return tensors


def _named(value: Any) -> dict[str, _Tensor]:
  if not isinstance(value, dict) or not all(
      isinstance(key, str) and isinstance(item, _Tensor) for key, item in value.items()):
    raise _Refused("holds something else than tensors by their names; get the weights as safetensors.")
  return value


def _itemsize(storage: _Storage) -> int:
  return np.dtype(_STORAGES[storage.kind][1]).itemsize
