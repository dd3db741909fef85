"""Tensors of a Hugging Face folder <-> parameters, after the key map of a family.

Reading goes tensor by tensor: each is read once, and each process keeps of it what its own devices hold.
"""

import dataclasses
import math
import re
from typing import Any, Iterator, Mapping

from flax import linen as nn
import flax.traverse_util
import jax
import numpy as np

from lmjax.config import ModelConfig, OptimConfig, UserError
from lmjax.convert.family import Family, Key
from lmjax.convert.tensor_files import TensorFiles
from lmjax.models.transformer import Transformer, init_params
from lmjax.optim import lora


def boxed_shapes(model: Transformer, optim: OptimConfig) -> dict:
  """Returns the parameters' shapes and types with the names of their axes, adapters among them where there are some."""
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return {**boxed, **jax.eval_shape(lambda: lora.init(boxed, optim, jax.random.key(0)))}


def abstract_params(model: Transformer, optim: OptimConfig = OptimConfig()) -> dict:
  """Returns the parameters' shapes and types, each to lie on the default device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                      nn.unbox(boxed_shapes(model, optim)))


def read_params(files: TensorFiles, family: Family, cfg: ModelConfig, abstract: Any, where: str) -> dict:
  """Reads all parameters of a model.

  Args:
    files: the folder's tensors.
    family: of the folder.
    cfg: the folder's model.
    abstract: nested dict of jax.ShapeDtypeStruct with shardings; values are cast to its types.
    where: the folder, for messages.

  Returns:
    The parameters, laid out as `abstract` says.

  Raises:
    UserError: if a tensor is missing, unknown, or of another shape or type.
  """
  flat = flax.traverse_util.flatten_dict(abstract, sep="/")
  keys = [key for key in family.keys if key.exists(cfg, flat)]
  names = _checked_names(files, family, keys, cfg, where)
  params = {}
  for key in keys:
    params |= _read_key(files, names, key, cfg, {path: flat[path] for path in key.paths})
  assert params.keys() == flat.keys(), "The family's key map does not cover the model."
  return flax.traverse_util.unflatten_dict(params, sep="/")


def hf_tensors(family: Family, cfg: ModelConfig,
               params: dict) -> tuple[dict[str, int], Iterator[tuple[str, np.ndarray]]]:
  """Turns parameters into Hugging Face tensors.

  Returns:
    The bytes of every tensor by name, and an iterator over (name, contiguous array) in the same order, which makes one
    at a time.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  keys = hf_keys(family, cfg, flat)
  assert {path for key in keys for path in key.paths} == flat.keys(), "The family's key map does not cover the model."
  sizes = {name: math.prod(key.shape(cfg)) * flat[key.paths[0]].dtype.itemsize
           for key in keys for name in key.names(cfg).values()}
  return sizes, _make_tensors(keys, cfg, flat)


def hf_keys(family: Family, cfg: ModelConfig, flat: Mapping[str, Any]) -> list[Key]:
  """Returns the keys of the tensors that a model with these parameters, by path, is written as."""
  # In a file of a model without its head, names lack their prefix.
  prefix = family.prefix if cfg.head in ("none", "pooled") else ""
  return [dataclasses.replace(key, theirs=key.theirs.removeprefix(prefix)) for key in family.keys
          if key.exists(cfg, flat)]


def _make_tensors(keys: list[Key], cfg: ModelConfig, flat: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
  for key in keys:
    parts = [np.asarray(flat[path]) for path in key.paths]
    for place, name in key.names(cfg).items():
      yield name, key.join(tuple(part[place] for part in parts), cfg)


def _today(name: str) -> str:
  """Returns the name that a norm's parameters have by now; files made from TensorFlow's have an older one."""
  return re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm)\.beta$", r"\1.bias", name))


def _checked_names(files: TensorFiles, family: Family, keys: list[Key], cfg: ModelConfig, where: str) -> dict[str, str]:
  """Returns {name in the key map: name in the files}, after checking that the files hold what the model needs alone."""
  headless = not any(name.startswith(family.prefix) for name in files.names)
  outside = {key.theirs for key in family.keys if not key.theirs.startswith(family.prefix)}
  names = {_today(family.prefix + name if headless and name not in outside else name): name for name in files.names}
  wanted = {name: key.shape(cfg) for key in keys for name in key.names(cfg).values()}
  twins = dict(family.tied)
  for name, shape in wanted.items():
    if name not in names:
      raise UserError(f"{where} has no tensor {name}, which its config.json asks for; put back a good copy.")
    files.check_dtype(names[name])
    if files.shape(names[name]) != shape:
      raise UserError(f"{where} has {names[name]} of shape {files.shape(names[name])}, but its config.json makes it "
                      f"{shape}; use the config.json that belongs to the tensors.")
  for name in sorted(names.keys() - wanted.keys()):
    if any(re.fullmatch(pattern, name) for pattern in family.ignored_keys):
      continue
    if twins.get(name) not in names:
      raise UserError(f"{where} has a tensor {names[name]}, which a {family.model_type} model of its config.json does "
                      "not; remove it, or use the config.json that belongs to the tensors.")
    if not np.array_equal(files.read(names[name]), files.read(names[twins[name]])):
      raise UserError(f"{where} has {names[name]} that differs from {names[twins[name]]}, although "
                      "tie_word_embeddings is true; set it to false in config.json.")
  return names


def _read_key(files: TensorFiles, names: dict[str, str], key: Key, cfg: ModelConfig,
              abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Reads the tensors of one key, each once, into the parts of the parameters that this process's devices hold."""
  buffers = {path: _buffers(leaf) for path, leaf in abstract.items()}
  for place, name in key.names(cfg).items():
    for path, part in zip(key.paths, key.split(files.read(names[name]), cfg)):
      for bounds, buffer in buffers[path].items():
        leading, rest = bounds[:len(place)], bounds[len(place):]
        if all(start <= at < stop for at, (start, stop) in zip(place, leading)):
          buffer[tuple(at - start for at, (start, _) in zip(place, leading))] = part[_slices(rest)]
  return {path: jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: buffers[path][_bounds(index, leaf.shape)])  # noqa: B023
      for path, leaf in abstract.items()}


def _buffers(leaf: jax.ShapeDtypeStruct) -> dict[tuple[tuple[int, int], ...], np.ndarray]:
  """Returns an empty array for each part of a parameter that this process's devices hold, by its bounds."""
  indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
  bounds = {_bounds(index, leaf.shape) for index in indices}
  return {bound: np.empty([stop - start for start, stop in bound], leaf.dtype) for bound in bounds}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def _slices(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
  return tuple(slice(start, stop) for start, stop in bounds)
