"""Files of torch.save are read without torch, and without doing anything else that they ask for."""

import collections
import json
import os
import pickle
import shutil
import zipfile

from etils import epath
import numpy as np
import pytest
from safetensors.torch import load_file
import torch

import lmjax
from lmjax import metrics
from lmjax.config import UserError
from lmjax.convert.torch_pickle import TorchFile

FORMATS = (True, False)  # torch's zip archives since 1.6, and the pickles before.


def told(call, *args):
  with pytest.raises(UserError) as error:
    call(*args)
  assert "\n" not in str(error.value)
  return str(error.value)


def saved(value, path, new):
  torch.save(value, path, _use_new_zipfile_serialization=new)
  return epath.Path(path)


def kinds():
  base = torch.arange(24.0).reshape(4, 6)
  return {"plain": base, "transposed": base.T, "part": base[1:3, ::2], "again": base, "scalar": torch.tensor(2.5),
          "empty": torch.zeros(0, 3), "double": base.double(), "half": base.half(), "brain": base.bfloat16(),
          "long": base.long(), "byte": base.byte(), "bool": base > 3,
          "parameter": torch.nn.Parameter(base[0].clone())}


@pytest.mark.parametrize("new", FORMATS)
def test_tensors_of_every_kind_are_those_that_were_saved(tmp_path, new):
  path = saved(collections.OrderedDict(kinds()), tmp_path / "x.bin", new)
  file = TorchFile(path)
  assert file.keys() == list(kinds())
  for name, tensor in kinds().items():
    got = file.get_tensor(name)
    assert got.shape == tuple(tensor.shape) == file.get_slice(name).get_shape()
    assert got.dtype.name == str(tensor.dtype).removeprefix("torch.") and not got.flags.writeable
    np.testing.assert_array_equal(got.astype(np.float64), tensor.detach().double().numpy())
  assert [file.get_slice(name).get_dtype() for name in ("plain", "half", "brain", "long")] == [
      "F32", "F16", "BF16", "I64"]


def test_a_model_may_lie_in_several_such_files(folder_of, tmp_path):
  _, folder = folder_of("llama")
  shutil.copy(folder / "config.json", tmp_path)
  tensors = load_file(folder / "model.safetensors")
  shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": list(tensors)[i::2] for i in range(2)}
  for file, names in shards.items():
    torch.save({name: tensors[name] for name in names}, tmp_path / file)
  index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
  (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  (_, expected), (_, got) = lmjax.load(folder), lmjax.load(tmp_path)
  assert metrics.digest(got) == metrics.digest(expected)
  (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
  assert "pytorch_model-00002-of-00002.bin is missing" in told(lmjax.load, tmp_path)


class Calls:
  """What a pickle makes of this is a call of `function`."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("function, name", [
    (os.system, "posix.system"), (eval, "__builtin__.eval"), (getattr, "__builtin__.getattr"),
    (collections.Counter, "collections.Counter")])
def test_a_call_is_refused_and_not_made(tmp_path, new, function, name):
  mark = tmp_path / "mark"
  args = {os.system: (f"touch {mark}",), eval: (f"open({str(mark)!r}, 'w')",), getattr: (1, "real")}.get(function, ())
  path = saved({"w": torch.ones(2), "x": Calls(function, *args)}, tmp_path / "x.bin", new)
  message = told(TorchFile, path)
  assert str(path) in message and f"asks for {name}, which tensors do not need" in message
  assert not mark.exists()


def test_a_plain_pickle_is_no_file_of_torch(tmp_path):
  path = epath.Path(tmp_path / "x.bin")
  path.write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'mark'}"), protocol=2))
  assert "asks for posix.system" in told(TorchFile, path)
  path.write_bytes(pickle.dumps({"w": 1}, protocol=2))
  assert "is not a whole file of torch" in told(TorchFile, path)
  path.write_bytes(b"")
  assert "is not a whole file of torch" in told(TorchFile, path)
  assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("new", FORMATS)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path, new):
  for value in ([torch.ones(2)], {"w": 3}, {3: torch.ones(2)}, {"state": {"w": torch.ones(2)}}):
    assert "holds something else than tensors by their names" in told(
        TorchFile, saved(value, tmp_path / "x.bin", new))


@pytest.mark.parametrize("new", FORMATS)
def test_a_file_that_was_cut_is_refused(tmp_path, new):
  path = saved({"w": torch.ones(1000), "v": torch.ones(1000)}, tmp_path / "x.bin", new)
  whole = path.read_bytes()
  for size in (10, 200, len(whole) // 2, len(whole) - 8):
    path.write_bytes(whole[:size])
    assert "is not a whole file of torch" in told(TorchFile, path)


def test_a_tensor_cannot_reach_outside_its_storage(tmp_path):
  path = saved({"w": torch.ones(7)}, tmp_path / "x.bin", True)
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  for old, new in ((b"K\x07\x85", b"K\xf0\x85"), (b"QK\x00K\x07", b"QK\x03K\x07")):
    with zipfile.ZipFile(path, "w") as archive:
      for name, data in members.items():
        changed = data.replace(old, new) if name.endswith("data.pkl") else data
        assert changed != data or not name.endswith("data.pkl")
        archive.writestr(name, changed)
    assert "w is larger than its storage" in told(TorchFile, path)
