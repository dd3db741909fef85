"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [rank, inputs] and B as [outputs, rank], under the name of the module that they belong to. Where a
family fuses several of our kernels in one tensor, as GPT-2 does queries, keys and values, the adapters of its parts are
one of their ranks together: A has theirs one below the other, B has theirs on its diagonal.
"""

from typing import Any, Mapping

from flax import linen as nn
import flax.traverse_util
import numpy as np

from lmjax import partitioning
from lmjax.config import ModelConfig, OptimConfig, UserError
from lmjax.convert.family import Family, Key
from lmjax.convert.params import boxed_shapes, hf_keys
from lmjax.models.transformer import Transformer
from lmjax.optim import lora
from lmjax.optim.gates import make_gates

_PREFIX = "base_model.model."
_TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}


def peft_adapter(family: Family, model: Transformer, params: Mapping[str, Any], cfg: OptimConfig,
                 base: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns what adapter_config.json says, and the tensors.

  Args:
    family: of the model.
    model: the model.
    params: its parameters, with "lora" among them.
    cfg: what the adapters were trained with.
    base: folder or name of the model that they are for, where it is known.

  Raises:
    UserError: where there are no adapters, or PEFT has no place for one.
  """
  if lora.ADAPTERS not in params:
    raise UserError("The parameters have no adapters; train with config.optim.lora_rank, or write a whole model.")
  flat = flax.traverse_util.flatten_dict(nn.unbox(params), sep="/")
  adapters = {path.removeprefix(f"{lora.ADAPTERS}/"): np.asarray(leaf, np.float32) for path, leaf in flat.items()
              if path.startswith(f"{lora.ADAPTERS}/")}
  keys = hf_keys(family, model.cfg, flat)
  tensors, ranks, transposed = {}, {}, False
  for key in keys:
    parts = [part for part, path in enumerate(key.paths) if f"{path}/a" in adapters]
    if not parts:
      continue
    _check_place(key, key.paths[parts[0]])
    into = _input_letters(key, key.paths[parts[0]], adapters)
    transposed |= set(key.layout.split(",")[0]) == set(into)
    for place, name in key.names(model.cfg).items():
      module = name.removesuffix(".weight")
      a, b = _pair(key, parts, place, into, adapters)
      tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"] = a, b
      ranks[module] = len(a)
  learned, whole = _besides(keys, model, cfg)
  for key in whole:
    _check_place(key, key.paths[0])
    for place, name in key.names(model.cfg).items():
      tensors[_PREFIX + name] = key.join(tuple(np.asarray(flat[path])[place] for path in key.paths), model.cfg)
  return _settings(model.cfg, cfg, keys, ranks, transposed, learned, base), tensors


def _check_place(key: Key, path: str) -> None:
  # Linear maps are modules, with a weight; experts, what chooses them and XLNet's attention are bare tensors.
  if "{expert}" in key.theirs or "X" in key.layout or not key.theirs.endswith((".weight", ".bias")):
    raise UserError(f"What {path} has learned has no place in PEFT's format, for {key.theirs} is no module of its own; "
                    "convert without --adapter, which merges.")


def _input_letters(key: Key, path: str, adapters: Mapping[str, np.ndarray]) -> str:
  """Returns the letters of those axes that a map leads from."""
  count = adapters[f"{path}/a"].ndim - 1 - key.theirs.count("{")
  return key.axes[-count:] if lora.outputs_first(path) else key.axes[:count]


def _pair(key: Key, parts: list[int], place: tuple[int, ...], into: str,
          adapters: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Returns A [rank, inputs] and B [outputs, rank] of one tensor."""
  groups = {("in" if set(group) & set(into) else "out"): group for group in key.layout.split(",")}
  out = "".join(letter for letter in key.axes if letter not in into)
  one = lambda part, side: adapters[f"{key.paths[part]}/{side}"][place]
  a = np.concatenate([one(part, "a") for part in parts], axis=-1)
  a = a.transpose([into.index(letter) for letter in groups["in"]] + [len(into)])
  rank, total = one(parts[0], "a").shape[-1], a.shape[-1]
  # Every part's outputs, by all ranks; those of another part are zero.
  b = np.zeros((len(key.paths), total, *one(parts[0], "b").shape[1:]), np.float32)
  for i, part in enumerate(parts):
    b[part, i * rank:(i + 1) * rank] = one(part, "b")
  letters = "CR" + out
  fused = "C" in key.layout
  b = (b if fused else b[0]).transpose([(letters if fused else letters[1:]).index(x) for x in groups["out"] + "R"])
  return np.ascontiguousarray(a.reshape(-1, total).T), np.ascontiguousarray(b.reshape(-1, total))


def _besides(keys: list[Key], model: Transformer, cfg: OptimConfig) -> tuple[list[str], list[Key]]:
  """Returns the modules that learn as a whole beside the adapters, and all keys of their tensors."""
  boxed = boxed_shapes(model, cfg)
  gates = make_gates(cfg, partitioning.logical_axes(boxed), nn.unbox(boxed))
  frozen = flax.traverse_util.flatten_dict(lora.without(gates.frozen), sep="/")
  module = lambda key: key.theirs.rpartition(".")[0]
  modules = {module(key) for key in keys if not all(frozen[path] for path in key.paths)}
  whole = [key for key in keys if module(key) in modules]
  return sorted({name.rpartition(".")[0] for key in whole for name in key.names(model.cfg).values()}), whole


def _settings(model: ModelConfig, cfg: OptimConfig, keys: list[Key], ranks: dict[str, int], transposed: bool,
              learned: list[str], base: str | None) -> dict[str, Any]:
  alpha = int(cfg.lora_alpha) if cfg.lora_alpha == int(cfg.lora_alpha) else cfg.lora_alpha
  fused = {module: rank for module, rank in ranks.items() if rank != cfg.lora_rank}
  modules = {name.removesuffix(".weight") for key in keys for name in key.names(model).values()}
  ends = {module.rpartition(".")[2] for module in ranks}
  # The short names that users know, where they mean these modules and no others.
  short = {module for module in modules if module.rpartition(".")[2] in ends} == set(ranks)
  return {
      "peft_type": "LORA", "task_type": _TASKS.get(model.architecture) if model.head == "lm" else None,
      "base_model_name_or_path": base, "inference_mode": True, "r": cfg.lora_rank, "lora_alpha": alpha,
      "target_modules": sorted(ends if short else ranks), "rank_pattern": fused,
      # PEFT divides by the rank that a module has.
      "alpha_pattern": {module: alpha * (rank // cfg.lora_rank) for module, rank in fused.items()},
      "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "fan_in_fan_out": transposed,
      "init_lora_weights": True, "modules_to_save": learned or None}
