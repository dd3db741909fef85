"""config.json of a Hugging Face model <-> ModelConfig, after the tables of its family.

Reading is strict: a setting that changes the numbers in a way not done here, and any setting that no table names, is
refused by name and value.
"""

import dataclasses
import json
from typing import Any, Mapping

from etils import epath

from lmjax import config as config_lib
from lmjax import parametrization
from lmjax.config import Config, ModelConfig
from lmjax.config_checks import UserError, nearest
from lmjax.convert import (
  albert,
  bart,
  bert,
  distilbert,
  electra,
  gemma,
  gpt2,
  gpt_neox,
  llama,
  marian,
  mistral,
  mixtral,
  olmo2,
  qwen,
  roberta,
  t5,
  xlnet,
)
from lmjax.convert.family import Family, Field, Required

# Where several can express a model, the first is written.
FAMILIES = {family.model_type: family for family in (
    gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3,
    gpt_neox.FAMILY, olmo2.FAMILY, mixtral.MIXTRAL, mixtral.QWEN2_MOE, mixtral.QWEN3_MOE,
    bert.FAMILY, roberta.FAMILY, albert.FAMILY, electra.FAMILY, distilbert.FAMILY, t5.FAMILY, bart.FAMILY,
    marian.FAMILY, xlnet.FAMILY)}

# ModelConfig settings that change how a model starts, trains or is computed, but not which function it is; what
# use_bias says stands in qkv_bias, out_bias and mlp_bias once sizes are resolved.
_NEUTRAL = ("use_bias", "dropout", "init_std", "init", "scale_residual_init", "attention_impl", "dtype", "param_dtype",
            "remat_policy", "remat_save", "remat_offload", "scan_layers")

_NUM_LABELS = 2  # Where config.json names no labels.

# config.json settings of every family that change no logits: names, types of storage, defaults of generation, labels.
_IGNORED_FIELDS = frozenset("""
    model_type architectures transformers_version _name_or_path dtype torch_dtype use_cache attn_implementation
    _attn_implementation_autoset gradient_checkpointing tokenizer_class prefix task_specific_params finetuning_task
    problem_type id2label label2id num_labels return_dict output_hidden_states output_attentions output_scores
    return_dict_in_generate chunk_size_feed_forward tf_legacy_loss bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens model_max_length
    transformers.js_config unsloth_fixed unsloth_version
""".split())


def read_json(path: epath.Path) -> dict:
  """Returns the object that a JSON file holds.

  Raises:
    UserError: if it holds none.
  """
  try:
    value = json.loads(path.read_text())
  except (UnicodeDecodeError, ValueError) as e:
    raise UserError(f"{path} is not JSON ({e}); put back a good copy.") from e
  if not isinstance(value, dict):
    raise UserError(f"{path} holds a JSON {type(value).__name__}, but it must hold an object.")
  return value


def from_hf(hf: Mapping[str, Any], where: str) -> tuple[Family, Config]:
  """Returns the family of a Hugging Face config and a checked experiment with its model, all sizes filled in.

  Args:
    hf: what config.json holds.
    where: its path, for messages.

  Raises:
    UserError: for a family, a setting or a value that is not supported, or a size that is missing.
  """
  if hf["model_type"] not in FAMILIES:
    raise UserError(f"{where} has model_type {hf['model_type']!r}, which lmjax cannot convert"
                    f"{nearest(str(hf['model_type']), FAMILIES)}")
  family = FAMILIES[hf["model_type"]]
  return family, _experiment(_read_model(family, hf, where), where)


def _read_model(family: Family, hf: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the ModelConfig settings of a Hugging Face config."""
  flat = _flat(hf, {*_IGNORED_FIELDS, *family.ignored_fields} - family.required.keys())
  _refuse(family, flat, where)
  labels = hf.get("id2label") or hf.get("num_labels") or _NUM_LABELS
  model = {"num_labels": len(labels) if isinstance(labels, dict) else labels,
           **family.fixed, **_architecture(family, hf, where)}
  read_from = {}
  for field in family.fields:
    value, name = _read_field(field, flat, where), field.names[0]
    if field.ours in read_from and model[field.ours] != value:
      raise UserError(f"{where} has {name} = {value!r} but {read_from[field.ours]} = {model[field.ours]!r}, which "
                      "lmjax cannot do; they must be equal.")
    model[field.ours], read_from[field.ours] = value, name
  return model


def _architecture(family: Family, hf: Mapping[str, Any], where: str) -> Mapping[str, Any]:
  name = (hf.get("architectures") or list(family.architectures))[0]
  if name not in family.architectures:
    raise UserError(f"{where} has architectures = {[name]!r}, which lmjax does not do; it does "
                    f"{', '.join(family.architectures)}.")
  return family.architectures[name]


def _flat(hf: Mapping[str, Any], ignored: set[str], prefix: str = "") -> dict[str, Any]:
  """Returns {"name": value, "name.inner": value} without what is ignored."""
  flat = {}
  for name, value in hf.items():
    if prefix + name in ignored:
      continue
    flat.update(_flat(value, ignored, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
  return flat


def _refuse(family: Family, flat: Mapping[str, Any], where: str) -> None:
  for name, only in family.required.items():
    if name in flat and flat[name] not in (only, None):
      raise UserError(f"{where} has {name} = {flat[name]!r}, which lmjax does not do; it does {only!r} only.")
  known = {*family.required, *(name for field in family.fields for name in field.names)}
  for name, value in flat.items():
    # What is null, false, zero or empty asks for nothing.
    if name not in known and value not in (None, False, []):
      raise UserError(f"{where} has {name} = {value!r}, which lmjax does not know in {family.model_type}; remove it if "
                      "it changes nothing that the model computes.")


def _read_field(field: Field, flat: Mapping[str, Any], where: str) -> Any:
  given = [name for name in field.names if name in flat]
  if not given and field.default is Required:
    raise UserError(f"{where} has no {field.names[0]}, which lmjax needs; add it.")
  value = flat[given[0]] if given else field.default
  for name in given[1:]:
    if flat[name] != value:
      raise UserError(f"{where} has {given[0]} = {value!r} but {name} = {flat[name]!r}; make them equal.")
  if field.nonzero and value == 0:
    raise UserError(f"{where} has {given[0]} = {value!r}, which lmjax does not do; it does 1 and more.")
  if field.read:
    return field.read(value, flat)
  if not field.values:
    return value
  for theirs, ours in field.values:
    if theirs == value:
      return ours
  raise UserError(f"{where} has {[*given, *field.names][0]} = {value!r}, which lmjax does not do; it does "
                  f"{', '.join(str(theirs) for theirs, _ in field.values)}.")


def _experiment(model: Mapping[str, Any], where: str) -> Config:
  """Returns the default experiment with the given model; one step long, since a run needs a length."""
  values = config_lib.base_config().to_dict()
  values["model"] |= model
  values["train"]["num_steps"] = 1
  if model["position"] == "learned" and isinstance(model["max_positions"], int):
    values["data"]["seq_len"] = min(values["data"]["seq_len"], model["max_positions"])
  try:
    config = config_lib.from_config_dict(values)
  except UserError as e:
    raise UserError(f"{where} describes a model that lmjax cannot build: {e}") from e
  return config_lib.resolve_model(config, config.model.vocab_size)


def to_hf(cfg: ModelConfig) -> tuple[Family, dict[str, Any]]:
  """Returns the family that can express a model, and its settings there.

  Args:
    cfg: of the model.

  Raises:
    UserError: if no family can; it names the settings that stand in the way in the two that come nearest.
  """
  cfg, refusals = config_lib.fill_sizes(cfg), []
  cfg = config_lib.fill_sizes(parametrization.as_standard(cfg) or cfg)
  for family in FAMILIES.values():
    hf = _written(family, cfg)
    lost = _lost(family, hf, cfg)
    if not lost:
      return family, hf
    refusals.append((len(lost), f"{family.model_type} would need another {', '.join(lost)}"))
  told = "; ".join(refusal for _, refusal in sorted(refusals)[:2])
  raise UserError(f"No Hugging Face family that lmjax writes can hold this model: {told}.")


def _written(family: Family, cfg: ModelConfig) -> dict[str, Any]:
  fits = lambda settings: all(getattr(cfg, name) == value for name, value in settings.items())
  names = [name for name, settings in family.architectures.items() if fits(settings)] or [*family.architectures]
  hf = {"model_type": family.model_type, "architectures": names[:1], **family.written}
  if cfg.num_labels != _NUM_LABELS:
    names = [f"LABEL_{i}" for i in range(cfg.num_labels)]
    hf |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
  for field in family.fields:
    value = getattr(cfg, field.ours)
    if field.write:
      values = [field.write(value, cfg)]
    else:
      values = [theirs for theirs, ours in field.values if ours == value] if field.values else [value]
    if values and not (field.optional and values[0] == field.default):
      _put(hf, field.names[0], values[0])
  return hf


def _put(hf: dict[str, Any], name: str, value: Any) -> None:
  *outer, last = name.split(".")
  for part in outer:
    hf = hf.setdefault(part, {})
  hf[last] = value


def _lost(family: Family, hf: Mapping[str, Any], cfg: ModelConfig) -> list[str]:
  """Returns "config.model.<setting> than <value>" for whatever would not come back from a written config."""
  back = config_lib.Config(model=ModelConfig(**_read_model(family, hf, "config.json")))
  names = differences(family, cfg, config_lib.resolve_model(back, cfg.vocab_size).model)
  # Hugging Face checks this, although the width of a head is a setting of its own in some families.
  if cfg.embed_dim % cfg.num_heads and "head_dim" not in names:
    names.append("num_heads")
  return [f"config.model.{name} than {getattr(cfg, name)!r}" for name in names]


def differences(family: Family, one: ModelConfig, other: ModelConfig) -> list[str]:
  """Returns the settings in which two models of a family are not the same function of their parameters."""
  names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in (*_NEUTRAL, *family.unused)]
  return [name for name in names if getattr(one, name) != getattr(other, name)]
