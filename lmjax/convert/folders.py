"""Folders: a model from a Hugging Face folder or a run's workdir, and either made from the other."""

import contextlib
import dataclasses
import json
import os
import shutil
from typing import Any, Iterator

from etils import epath
from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from lmjax import checkpoint
from lmjax import config as config_lib
from lmjax.config import CheckpointConfig, Config, ModelConfig, OptimConfig, UserError
from lmjax.config_checks import Refused
from lmjax.convert.family import Family
from lmjax.convert.hf_config import differences, from_hf, read_json, to_hf
from lmjax.convert.hub import local_folder
from lmjax.convert.params import abstract_params, hf_tensors, read_params
from lmjax.convert.peft import peft_adapter
from lmjax.convert.sentence_modules import base_class, described, write_modules
from lmjax.convert.tensor_files import TensorFiles, write_file, write_tensors
from lmjax.models.electra import discriminator_of
from lmjax.models.transformer import Transformer, make_model
from lmjax.workdir import read_labels

_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# What transformers' tokenizers are made of besides, old ones and new.
_TOKENIZER_FILES = (
    _TOKENIZER, _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.jinja", "generation_config.json")
# What a workdir keeps of config.json for the folder that is made of it again: names of labels, and which tokens are
# special.
_NAMES = "hf_names.json"
_NAME_SETTINGS = (
    "id2label", "label2id", "problem_type", "finetuning_task", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def load(path: epath.PathLike) -> tuple[Transformer, dict]:
  """Loads a model to apply: `model.apply({"params": params}, tokens)` gives logits.

  Args:
    path: a Hugging Face folder, hf:OWNER/NAME on the hub, or the workdir of a run, of which the newest checkpoint is
      taken, and in it the average of the weights where the run kept one, with adapters merged.

  Returns:
    The Flax module, and its parameters on the default device in the type of its `param_dtype`, which is float32 for a
    Hugging Face folder.

  Raises:
    UserError: if the folder is neither, holds what is not supported, or is damaged.
  """
  path = local_folder(path)
  raw = _read_config(path)
  if "model_type" in raw:
    family, config = from_hf(raw, path / "config.json")
    model = make_model(config.model)
    return model, _read_folder(path, family, config, abstract_params(model))
  model = make_model(_workdir_config(path, raw).model)
  return model, checkpoint.restore_params(path, abstract_params(model))


def import_params(path: epath.PathLike, model: Transformer, abstract: Any) -> dict:
  """Reads the parameters of a Hugging Face folder straight onto their devices.

  Args:
    path: a Hugging Face folder, or hf:OWNER/NAME on the hub.
    model: which must compute what the folder's model does.
    abstract: the parameters as jax.ShapeDtypeStruct with shardings.

  Returns:
    The parameters, laid out as `abstract` says.

  Raises:
    UserError: if it is no such folder, its model differs from `model`, or a tensor is missing, unknown or wrong.
  """
  path = local_folder(path)
  raw = _read_config(path)
  if "model_type" not in raw:
    raise UserError(f"{path} is not a Hugging Face folder: its config.json has no model_type; for a run's workdir, set "
                    "config.checkpoint.restore_from instead of import_from.")
  family, config = from_hf(raw, path / "config.json")
  for name in differences(family, model.cfg, config.model):
    asked, has = getattr(model.cfg, name), getattr(config.model, name)
    raise UserError(f"config.model.{name} is {asked!r}, but the model in {path} has {has!r}; "
                    f"set config.model.{name} to {has!r}.")
  return _read_folder(path, family, config, abstract)


def read_model(path: epath.PathLike) -> ModelConfig:
  """Returns the settings of the model in a Hugging Face folder or a workdir.

  Raises:
    UserError: as `load` does.
  """
  path = local_folder(path)
  raw = _read_config(path)
  return (from_hf(raw, path / "config.json")[1] if "model_type" in raw else _workdir_config(path, raw)).model


def read_whole(path: epath.PathLike, abstract: Any) -> dict:
  """Returns the parameters of the model that `read_model` says, laid out as `abstract` says.

  Raises:
    UserError: as `load` does.
  """
  path = local_folder(path)
  raw = _read_config(path)
  if "model_type" in raw:
    return _read_folder(path, *from_hf(raw, path / "config.json"), abstract)
  return checkpoint.restore_params(path, abstract)


def save_hf(model: Transformer, params: dict, path: epath.PathLike, tokenizer: Any = None) -> None:
  """Writes a model as a Hugging Face folder, of the family that can express it; of an ELECTRA the discriminator.

  Args:
    model: as `load` returns it.
    params: its parameters; they keep their type.
    path: a folder that does not exist yet, or is empty.
    tokenizer: a `lmjax.data.tokenizer.Tokenizer` to save with it.

  Raises:
    UserError: if no family can express the model, or the folder is in use or cannot be written.
  """
  _save(model, params, path, tokenizer)


def _save(model: Transformer, params: dict, path: epath.PathLike, tokenizer: Any,
          source: epath.Path | None = None) -> Family:
  """Writes a folder as `save_hf` does, with the tokenizer's files and the names that `source` has kept of another."""
  params = nn.unbox(params)
  if model.cfg.architecture == "electra":
    _check_params(params, model)
    model, params = discriminator_of(model, params)
  family, settings = to_hf(model.cfg)
  _check_params(params, model)
  settings["torch_dtype"] = jnp.dtype(jax.tree.leaves(params)[0].dtype).name
  settings |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_id if tokenizer else None}
  settings |= _names_of(source, model.cfg) if source else {}
  if tokenizer and (model.cfg.architecture, model.cfg.head) == ("decoder", "sequence"):
    # It reads the last token that is not this one, which must not be the one that ends a text.
    pad = tokenizer.add_special(["pad"])["pad"]
    settings |= {"pad_token_id": pad} if pad < model.cfg.vocab_size else {}
  pooled = model.cfg.head == "pooled"
  if pooled:
    settings["architectures"] = [base_class(family)]
  with _new_folder(path) as folder:
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if pooled:
      write_modules(folder, model.cfg.embed_dim)
    write_tensors(folder, *hf_tensors(family, model.cfg, params))
    if tokenizer:
      _save_tokenizer(tokenizer, folder, model.cfg)
    if source:
      _copy_tokenizer(source, folder)
  return family


def save_peft(model: Transformer, params: dict, cfg: OptimConfig, path: epath.PathLike,
              base: str | None = None) -> None:
  """Writes adapters in the format of Hugging Face's PEFT, for the Hugging Face model of the family that can express it.

  Args:
    model: which the adapters are for.
    params: its parameters with their "lora", not merged.
    cfg: with the rank, alpha and targets that they were trained with.
    path: a folder that does not exist yet, or is empty.
    base: folder or name of that Hugging Face model, for PEFT to find it by.

  Raises:
    UserError: if there are no adapters, PEFT has no place for one, or the folder is in use or cannot be written.
  """
  family, _ = to_hf(model.cfg)
  settings, tensors = peft_adapter(family, model, params, cfg, base)
  with _new_folder(path) as folder:
    (folder / _ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    write_file(folder / "adapter_model.safetensors", tensors, _ADAPTER_CONFIG)


def load_tokenizer(path: epath.PathLike) -> Any:
  """Returns the tokenizer of a Hugging Face folder or a workdir, a `lmjax.data.tokenizer.Tokenizer`.

  Raises:
    UserError: if the folder has none.
  """
  from lmjax.data.tokenizer import Tokenizer
  return Tokenizer.from_file(tokenizer_file(path))


def tokenizer_file(path: epath.PathLike) -> epath.Path:
  """Returns the tokenizer.json of a Hugging Face folder or a workdir.

  Raises:
    UserError: if the folder has none.
  """
  path = local_folder(path)
  if not path.is_dir():
    raise UserError(f"There is no folder {path}; give a Hugging Face folder or the workdir of a run.")
  if not (path / _TOKENIZER).exists():
    raise UserError(f"{path} has no {_TOKENIZER}; copy the one that belongs to the model there.")
  return path / _TOKENIZER


def decoder_start_token_id(path: epath.PathLike) -> int | None:
  """Returns what the text of an encoder-decoder begins with, or None where a folder does not tell."""
  path = local_folder(path)
  files = [read_json(path / name) for name in ("generation_config.json", _NAMES, "config.json")
           if (path / name).exists()]
  told = [file.get("decoder_start_token_id", file.get("objective", {}).get("start_token")) for file in files]
  known = next((id for id in told if id is not None), None)
  if known is None and "model" in files[-1] and (path / _TOKENIZER).exists():
    return load_tokenizer(path).start_id  # What training has begun texts with.
  return known


def sees_both_sides(path: epath.PathLike) -> bool:
  """Returns whether a folder's model has learned to see a prompt from both sides; Hugging Face folders do not tell."""
  path = local_folder(path)
  raw = _read_config(path)
  return "model_type" not in raw and _workdir_config(path, raw).objective.name == "prefix_lm"


def convert(source: epath.PathLike, target: epath.PathLike, adapter: bool = False) -> str:
  """Turns a Hugging Face folder into a workdir, or a workdir into a Hugging Face folder.

  Args:
    source: either.
    target: a folder that does not exist yet, or is empty.
    adapter: whether to write the adapters of a run alone, in PEFT's format; else they are merged.

  Returns:
    One sentence on what was done.

  Raises:
    UserError: as `load` and `save_hf` do.
  """
  source, target = local_folder(source), epath.Path(target)
  raw = _read_config(source)
  _check_target(target)  # Before a large model is read.
  if adapter:
    return _to_adapter(source, target, raw)
  if "model_type" in raw:
    _to_workdir(source, target, raw)
    return (f"Wrote {target}, a workdir with the {raw['model_type']} model of {source} as its checkpoint of step 0; "
            "start a run from it with config.checkpoint.restore_from.")
  model, params = load(source)
  tokenizer = load_tokenizer(source) if (source / _TOKENIZER).exists() else None
  family = _save(model, params, target, tokenizer, source)
  return f"Wrote {target}, a Hugging Face folder of model_type {family.model_type} with the newest weights of {source}."


def _names_of(source: epath.Path, cfg: ModelConfig) -> dict[str, Any]:
  """Returns settings for a Hugging Face folder that a workdir tells beside its model: of labels and special tokens."""
  names, labels = {}, [*read_labels(source).values()]
  if cfg.head in ("sequence", "token") and len(labels) == 1:
    names = {"id2label": dict(enumerate(labels[0])), "label2id": {name: i for i, name in enumerate(labels[0])}}
  if cfg.architecture == "encoder_decoder" and (start := decoder_start_token_id(source)) is not None:
    names["decoder_start_token_id"] = start
  return names | (read_json(source / _NAMES) if (source / _NAMES).exists() else {})


def _to_adapter(source: epath.Path, target: epath.Path, raw: dict) -> str:
  config = None if "model_type" in raw else _workdir_config(source, raw)
  if config is None or not config.optim.lora_rank:
    raise UserError(f"{source} is no run with adapters; convert without --adapter, or train with "
                    "config.optim.lora_rank.")
  model, tuned = make_model(config.model), config.checkpoint.finetune_from
  base = config.checkpoint.import_from or (tuned if tuned and _is_hf(tuned) else None)
  params = checkpoint.restore_params(source, abstract_params(model, config.optim))
  save_peft(model, params, config.optim, target, base.removeprefix("hf:") if base else None)
  return f"Wrote {target}, the adapters of {source} in PEFT's format."


def _is_hf(path: str) -> bool:
  file = epath.Path(path) / "config.json"
  return path.startswith("hf:") or file.exists() and "model_type" in read_json(file)


def _to_workdir(source: epath.Path, target: epath.Path, raw: dict) -> None:
  family, config = from_hf(raw, source / "config.json")
  params = _read_folder(source, family, config, abstract_params(make_model(config.model)))
  with _new_folder(target) as folder:
    _copy_tokenizer(source, folder)
    if (folder / _TOKENIZER).exists():
      data = dataclasses.replace(config.data, tokenizer=os.path.abspath(target / _TOKENIZER))
      config = dataclasses.replace(config, data=data)
    (folder / "config.json").write_text(config_lib.to_json(config))
    names = {name: raw[name] for name in _NAME_SETTINGS if name in raw}
    (folder / _NAMES).write_text(json.dumps(names, indent=2) + "\n")
    with contextlib.closing(checkpoint.Checkpointer(folder, CheckpointConfig())) as checkpointer:
      checkpointer.save(0, {"params": params}, {"config": dataclasses.asdict(config)})


def _read_folder(path: epath.Path, family: Family, config: Config, abstract: Any) -> dict:
  with contextlib.ExitStack() as stack:
    return read_params(TensorFiles(path, stack), family, config.model, abstract, path)


def _check_params(params: dict, model: Transformer) -> None:
  shapes = lambda tree: {key: leaf.shape for key, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}
  has, needs = shapes(params), shapes(abstract_params(model))
  for name in sorted(has.keys() | needs.keys()):
    if has.get(name) != needs.get(name):
      raise UserError(f"The parameters have {name} of shape {has.get(name)}, but the model makes it {needs.get(name)}; "
                      "give the model that they belong to.")


def _read_config(path: epath.Path) -> dict:
  """Returns what the config.json of a folder holds."""
  if not path.is_dir():
    raise UserError(f"There is no folder {path}; give a Hugging Face folder or the workdir of a run.")
  if not (path / "config.json").exists():
    raise UserError(f"{path} has no config.json; give a Hugging Face folder or the workdir of a run.")
  raw = read_json(path / "config.json")
  if "model_type" not in raw and "model" not in raw:
    raise UserError(f"{path / 'config.json'} has neither model_type, as in a Hugging Face folder, nor model, as in a "
                    "run's workdir; give one of these.")
  return described(path, raw) if "model_type" in raw else raw


def _workdir_config(path: epath.Path, raw: dict) -> Config:
  try:
    return config_lib.from_config_dict(raw)
  except UserError as e:
    raise UserError(f"{path / 'config.json'} is not one that lmjax can read: {e}") from e


def _save_tokenizer(tokenizer: Any, folder: epath.Path, cfg: ModelConfig) -> None:
  tokenizer.save(folder / _TOKENIZER)
  names = tokenizer.names_of_special()
  # What pads is masked, so that the token that ends a text serves as well.
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "pad_token": names["eos_token"], **names}
  if cfg.token_types > 1:
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
  (folder / _TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _copy_tokenizer(source: epath.Path, folder: epath.Path) -> None:
  for name in _TOKENIZER_FILES:
    if (source / name).exists():
      (folder / name).write_bytes((source / name).read_bytes())


def _check_target(path: epath.Path) -> None:
  if "://" in str(path):
    raise UserError(f"{path} is not a local folder; write to one, and copy it from there.")
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} exists already and is not an empty folder; give another name, or remove it.")


@contextlib.contextmanager
def _new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
  """Gives a folder to fill, which takes its name when all is written, and is gone if that fails."""
  path = epath.Path(path)
  _check_target(path)
  unfinished = path.parent / f".{path.name}.unfinished-{os.getpid()}"
  try:
    unfinished.mkdir(parents=True)
    yield unfinished
    os.replace(unfinished, path)
  except OSError as e:
    raise Refused(f"{path} could not be written ({e.strerror or e}); make room or give another folder.") from e
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
