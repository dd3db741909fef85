"""Fine-tuning from a folder: its model but for the head, its tokenizer, and its parameters as far as they serve."""

import dataclasses
from typing import Any, Mapping

from absl import logging
from flax import linen as nn
import flax.traverse_util
import jax

from lmjax import convert, partitioning
from lmjax.config import Config, electra_parts, fill_sizes
from lmjax.config_checks import UserError, check_combinations
from lmjax.models.electra import discriminator_of
from lmjax.models.transformer import init_params, make_model

# Settings that stay the experiment's own: what is trained on top of the model, and how it is computed.
_OWN = ("head", "task_heads", "num_labels", "dropout", "attention_impl", "context_attention", "dtype", "quantization",
        "param_dtype", "remat_policy", "remat_save", "remat_offload", "stage_microbatches", "stage_repeats",
        "scan_layers", "vocab_size", "num_future")

# Parameters with a row for each token, which may have become more.
_VOCABULARY = ("embed/embedding", "head/kernel", "head/bias")


def take_model(config: Config) -> Config:
  """Returns the config with the model and the tokenizer of `checkpoint.finetune_from`; without one, as it is.

  A vocabulary that is set stays, and must be at least as large as the folder's.

  Raises:
    UserError: where the folder is neither a run's nor Hugging Face's, or has no tokenizer.
  """
  path = config.checkpoint.finetune_from
  if path is None:
    return config
  theirs = convert.read_model(path)
  if theirs.architecture == "electra":
    theirs = electra_parts(theirs)[1]
  model = config.model
  own = {name: getattr(config.model, name) for name in _OWN}
  own["pooler"] = model.pooler if model.pooler != "none" else theirs.pooler
  own["vocab_size"] = model.vocab_size or theirs.vocab_size
  if own["vocab_size"] < theirs.vocab_size:
    raise UserError(f"config.model.vocab_size is {own['vocab_size']}, but the model in {path} has {theirs.vocab_size} "
                    "tokens; leave it None.")
  data = dataclasses.replace(config.data, tokenizer=str(convert.tokenizer_file(path)))
  start = config.objective.start_token
  start = convert.decoder_start_token_id(path) if start is None else start
  config = dataclasses.replace(
      config, model=dataclasses.replace(theirs, **own), data=data,
      objective=dataclasses.replace(config.objective, start_token=start))
  check_combinations(config)
  return config


def grow_vocabulary(config: Config, tokenizer_size: int) -> Config:
  """Returns the config whose model has a row for each token, where special ones were added to a folder's tokenizer."""
  size = config.model.vocab_size
  if not config.checkpoint.finetune_from or size >= tokenizer_size:
    return config
  model = dataclasses.replace(config.model, vocab_size=-(-tokenizer_size // 128) * 128)
  return dataclasses.replace(config, model=model)


def first_params(config: Config, mesh: jax.sharding.Mesh, fresh: Mapping[str, Any]) -> dict[str, Any]:
  """Returns parameters for a run to start from: the folder's where it has them, else fresh ones.

  What it lacks may only be of heads and of further tokens. A pooler serves whatever head it was trained in.

  Args:
    config: of the run, with `checkpoint.finetune_from`.
    mesh: the devices.
    fresh: initial parameters of the run's model, on the mesh.
  """
  path = config.checkpoint.finetune_from
  theirs = fill_sizes(convert.read_model(path))
  model = make_model(theirs, mesh.devices.flat[0].platform)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  shapes = nn.unbox(boxed)
  shardings = jax.tree.map(_divided, shapes, partitioning.param_shardings(mesh, boxed))
  loaded = convert.read_whole(path, partitioning.laid_out(shapes, shardings))
  if theirs.architecture == "electra":
    _, loaded = discriminator_of(model, loaded)
  loaded, made = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (loaded, fresh))
  poolers = {name.partition("/pooler/")[2]: value for name, value in loaded.items() if "_head/pooler/" in name}
  new = []
  for name, value in made.items():
    source = loaded.get(name)
    if source is None and "_head/pooler/" in name:
      source = poolers.get(name.partition("/pooler/")[2])
    if source is None or not _fits(name, source, value):
      new.append(name)
    else:
      made[name] = _placed(source, value)
  logging.info("Starts from %s; made anew: %s.", path, ", ".join(new) or "nothing")
  return flax.traverse_util.unflatten_dict(made, sep="/")


def _divided(x: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
  """Returns the sharding, or that of a whole array where the mesh divides only the run's larger vocabulary."""
  try:
    sharding.shard_shape(x.shape)
  except ValueError:
    return partitioning.replicated(sharding.mesh)
  return sharding


def _fits(name: str, source: jax.Array, value: jax.Array) -> bool:
  longer = name in _VOCABULARY and source.shape[0] <= value.shape[0]
  return source.shape == value.shape or longer and source.shape[1:] == value.shape[1:]


def _placed(source: jax.Array, value: jax.Array) -> jax.Array:
  """Returns a folder's parameter in the place of a fresh one, whose further rows stay."""
  if source.shape == value.shape:
    return jax.device_put(source.astype(value.dtype), value.sharding)
  joined = jax.jit(lambda old, new: new.at[:old.shape[0]].set(old.astype(new.dtype)), out_shardings=value.sharding)
  return joined(source, value)
