"""What a setting may be: the sentence for each mistake, the ranges of single settings, and what goes together.

`lmjax.config` declares the settings and calls these checks whenever it reads some.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Any, Iterable, Mapping

# Every duration: (group, stem of its three fields).
DURATIONS = (("train", "num"), ("optim", "warmup"), ("optim", "decay"), ("eval", "every"), ("checkpoint", "every"))
UNITS = ("steps", "tokens", "epochs")
# The results of a block that config.model.remat_save and remat_offload may name: of the linear maps of attention and
# MLP, of softmax attention itself, of a router, of a shared expert's gate, and of XLNet's distances.
REMAT_NAMES = ("query", "key", "value", "attention", "out", "up", "gate", "down", "router", "shared_gate", "distance")


class UserError(Exception):
  """Something the user can mend. Its message is one sentence: what is wrong, where, and what would be right."""


class Refused(UserError):
  """What was asked is right, but the machine or the run stands in its way: a full disk, a workdir in use, bad numbers.

  The exit status is 1, where that of a wrong request is 2.
  """


class TooLarge(Refused):
  """The machine lacks what a config asks for, and may have what another one does."""


def check_one_of(what: str, value: str, known: Iterable[str]) -> None:
  """Raises a UserError, which says `what` of the value, where it is none of those that are known."""
  known = tuple(known)
  if value not in known:
    raise UserError(f"{what} {value!r}{nearest(value, known)}")


def by_full_name(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the leaves of nested mappings by their names joined with dots, as settings are called."""
  flat = {}
  for name, value in tree.items():
    flat.update(by_full_name(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
  return flat


def nearest(name: str, known: typing.Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the known name closest to `name`, or a list of what is known."""
  known = sorted(known)
  match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"; did you mean {match[0]!r}?" if match else f"; known are: {', '.join(known)}."


def split_sources(spec: str) -> list[str]:
  """Splits `data.source` at its commas."""
  return [part.strip() for part in spec.split(",") if part.strip()]


def split_optional(kind: type) -> tuple[type, bool]:
  """Splits `int | None` into (int, True) and `int` into (int, False)."""
  if isinstance(kind, types.UnionType):
    return next(a for a in typing.get_args(kind) if a is not type(None)), True
  return kind, False


def reject_unknown(where: str, given: typing.Iterable[str], known: typing.Iterable[str]) -> None:
  """Raises a UserError for a name that is not known."""
  for name in given:
    if name not in known:
      raise UserError(f"{where} has no setting {name!r}{nearest(name, known)}")


def checked(where: str, name: str, value: Any, kind: type, field: dataclasses.Field) -> Any:
  """Returns the value in the field's type, or raises a UserError that says what would be right."""
  full = f"{where}.{name}"
  base, optional = split_optional(kind)
  if value is None:
    if optional:
      return None
    raise UserError(f"{full} is None, but it needs a value of type {base.__name__}.")
  value = _converted(full, value, base)
  meta = field.metadata
  if meta["choices"] and value not in meta["choices"]:
    raise UserError(f"{full} is {value!r}, which is not one of its values{nearest(str(value), meta['choices'])}")
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{full} is {value}, but it must be a finite number.")
  for bound, broken, words in (("low", lambda v, b: v < b, "at least"), ("above", lambda v, b: v <= b, "more than"),
                               ("high", lambda v, b: v > b, "at most")):
    if meta[bound] is not None and broken(value, meta[bound]):
      unit = f" {meta['unit']}" if meta["unit"] else ""
      raise UserError(f"{full} is {value}, but it must be {words} {meta[bound]}{unit}.")
  return value


def _converted(full: str, value: Any, base: type) -> Any:
  if base is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if base is tuple and isinstance(value, (list, tuple)):
    return _frozen(value)
  if base is int and isinstance(value, float) and value.is_integer():
    return int(value)
  if not isinstance(value, base) or (base is int and isinstance(value, bool)):
    raise UserError(f"{full} is {value!r}, but it must be of type {base.__name__}.")
  return value


def _frozen(value: Any) -> Any:
  """Returns a value whose lists are tuples, so that what JSON gives back is equal to what it was made of."""
  if isinstance(value, (list, tuple)):
    return tuple(_frozen(part) for part in value)
  return {name: _frozen(part) for name, part in value.items()} if isinstance(value, typing.Mapping) else value


def check_combinations(config: Any) -> None:
  """Raises a UserError where settings of a `lmjax.config.Config`, each right alone, cannot work together."""
  for group, stem in DURATIONS:
    given = [f"config.{group}.{stem}_{unit}" for unit in UNITS
             if getattr(getattr(config, group), f"{stem}_{unit}") is not None]
    if len(given) > 1:
      raise UserError(f"{' and '.join(given)} are both set; keep one and set the other to None.")
    if (group, stem) == ("train", "num") and not given:
      raise UserError("The length of the run is not set; set one of config.train.num_steps, num_tokens, num_epochs.")
  _check_model(config.model, config.data.seq_len)
  _check_architecture(config.model)
  _check_parametrization(config.model, config.optim)
  if config.eval.patience is not None and config.eval.best_metric is None:
    raise UserError("config.eval.patience is set, but config.eval.best_metric is None; name the metric to wait for, "
                    "such as validation/loss.")
  every = [unit for unit in UNITS if getattr(config.eval, f"every_{unit}") is not None]
  if config.eval.best_metric is not None and not every:
    raise UserError("config.eval.best_metric is set, but nothing is evaluated in the loop; set "
                    "config.eval.every_steps.")
  if config.objective.mask_random + config.objective.mask_same > 1:
    raise UserError(f"config.objective.mask_random is {config.objective.mask_random} and mask_same "
                    f"{config.objective.mask_same}, but they are shares of the hidden tokens; together at most 1.")
  _check_optim(config.optim)
  train, data, mesh = config.train, config.data, config.mesh
  if train.batch_size % train.grad_accum_steps:
    raise UserError(f"config.train.batch_size is {train.batch_size}, which config.train.grad_accum_steps = "
                    f"{train.grad_accum_steps} does not divide.")
  if train.gradient_noise and train.grad_accum_steps < 2:
    raise UserError("config.train.gradient_noise compares microbatches with whole batches, but "
                    "config.train.grad_accum_steps is 1; set it to 2 or more, or gradient_noise to False.")
  mixed = (data.tasks, "tasks", "tasks") if data.tasks else (split_sources(data.source), "sources", "source")
  for name, weights in (("data.weights", data.weights), ("objective.task_weights", config.objective.task_weights)):
    if weights and len(weights) != len(mixed[0]):
      raise UserError(f"config.{name} has {len(weights)} values for the {len(mixed[0])} {mixed[1]} of "
                      f"config.data.{mixed[2]}; give one each, or ().")
    if any(not isinstance(w, (int, float)) or not 0 < w < math.inf for w in weights):
      raise UserError(f"config.{name} is {weights}, but every weight must be a number above 0.")
  for entry in config.eval.sets:
    if not isinstance(entry, str):
      raise UserError(f"config.eval.sets has the entry {entry!r}, but every entry must be text: validation, train or "
                      "NAME=SOURCE.")
  starts = ("restore_from", "import_from", "finetune_from")
  for name in starts:
    if getattr(config.checkpoint, name) == "":
      raise UserError(f"config.checkpoint.{name} is empty; give a folder, or None to start from none.")
  if len(given := [name for name in starts if getattr(config.checkpoint, name)]) > 1:
    raise UserError(f"config.checkpoint.{' and '.join(given)} are set, but a run starts from one folder; keep one.")
  sizes = dataclasses.asdict(mesh)
  if sum(size == -1 for size in sizes.values()) > 1:
    raise UserError("Only one axis of config.mesh may be -1; "
                    f"now {' and '.join(k for k, v in sizes.items() if v == -1)} are.")
  for axis, size in sizes.items():
    if size == 0:
      raise UserError(f"config.mesh.{axis} is 0, but it must be -1 or at least 1.")


# What each objective does, and the architectures and the head of the model that it trains.
_ONE_SIDED = ("encoder", "decoder")
_TRAINED = {
    "causal_lm": ("predicts each token from those before it", ("decoder",), "lm"),
    "multi_token": ("predicts several tokens from those before them", ("decoder",), "lm"),
    "prefix_lm": ("predicts each token from those before it and a prefix", ("decoder",), "lm"),
    "fill_in_the_middle": ("predicts each token from those before it", ("decoder",), "lm"),
    "masked_lm": ("tells hidden tokens from those on both sides", ("encoder",), "lm"),
    "span_corruption": ("writes what is missing from a text", ("encoder_decoder",), "lm"),
    "mixture_of_denoisers": ("writes what is missing from a text", ("encoder_decoder",), "lm"),
    "replaced_tokens": ("tells tokens that a generator has replaced", ("electra",), "replaced"),
    "permutation_lm": ("predicts tokens in an order drawn for each text", ("xlnet",), "lm"),
    "classification": ("labels texts", _ONE_SIDED, "sequence"),
    "regression": ("gives texts a number", _ONE_SIDED, "sequence"),
    "token_classification": ("labels words", _ONE_SIDED, "token"),
    "extractive_qa": ("finds answers in a text", _ONE_SIDED, "span"),
    "multiple_choice": ("chooses among answers", _ONE_SIDED, "choice"),
    "text_to_text": ("writes a text after another", ("encoder_decoder", "decoder"), "lm"),
    "chat": ("writes the answers of a chat", ("decoder",), "lm"),
    "multi_task": ("has a head for each task", _ONE_SIDED, "tasks"),
}


# Those that learn from config.data.tasks.
_LABELLED = ("classification", "regression", "token_classification", "extractive_qa", "multiple_choice", "text_to_text",
             "chat", "multi_task")
# Those whose loss has the routers' terms.
_ROUTED = ("causal_lm", "prefix_lm", "fill_in_the_middle")


def check_objective(config: Any) -> None:
  """Raises a UserError where the objective trains another kind of model than the one a `lmjax.config.Config` has.

  This is about training and its loss: a converted model has a config too, with an objective that nobody has chosen.
  """
  model, objective = config.model, config.objective
  does, architectures, head = _TRAINED[objective.name]
  if objective.name == "masked_lm" and objective.sentence_pairs != "none":
    head = "pretraining"
  if model.num_experts and objective.name not in _ROUTED:
    raise UserError(f"config.objective.name is {objective.name}, which does not balance experts, but "
                    f"config.model.num_experts is {model.num_experts}; set it to 0, or the objective to one of "
                    f"{', '.join(_ROUTED)}.")
  if (objective.name == "multi_token") != (model.num_future > 1):
    raise UserError(f"config.model.num_future is {model.num_future} and config.objective.name {objective.name}, but "
                    "multi_token is for 2 and more, and others are for 1; change one.")
  for name, needed in (("architecture", architectures), ("head", (head,))):
    if getattr(model, name) not in needed:
      raise UserError(f"config.objective.name is {objective.name}, which {does}, but config.model.{name} is "
                      f"{getattr(model, name)}; set it to {' or '.join(needed)}, or another objective.")
  if (objective.name in _LABELLED) != bool(config.data.tasks):
    raise UserError(f"config.objective.name is {objective.name}, which learns from "
                    f"{'labelled tasks' if objective.name in _LABELLED else 'plain text'}, but config.data.tasks is "
                    f"{config.data.tasks!r}; {'name some' if objective.name in _LABELLED else 'set it to ()'}, or "
                    "another objective.")
  for name, apart, joined in (("packing", "best_fit", "concat"), ("document_mask", True, False)):
    if objective.name in ("span_corruption", "mixture_of_denoisers") and getattr(config.data, name) == apart:
      raise UserError(f"config.objective.name is {objective.name}, which reads documents joined, but "
                      f"config.data.{name} is {apart}, which keeps them apart; set it to {joined}.")
  if objective.name == "prefix_lm" and model.attention_impl in ("cudnn", "splash"):
    raise UserError(f"config.objective.name is prefix_lm, but config.model.attention_impl is {model.attention_impl}, "
                    "which does not do prefixes; set it to auto.")
  if objective.name != "masked_lm" and objective.sentence_pairs != "none":
    raise UserError(f"config.objective.sentence_pairs is {objective.sentence_pairs}, which config.objective.name = "
                    f"{objective.name} does not tell; set it to none.")
  if objective.name == "permutation_lm":
    _check_permutation(model, objective, config.data)


def _check_permutation(model: Any, objective: Any, data: Any) -> None:
  if model.unidirectional:
    raise UserError("config.model.unidirectional is True, so that a token sees none after it, but the orders that "
                    "config.objective.name = permutation_lm draws go both ways; set it to False.")
  if objective.memory and model.memory_reuse_len is not None:
    raise UserError(f"config.model.memory_reuse_len is {model.memory_reuse_len}, which leaves a gap between the memory "
                    "of config.objective.memory and the text that goes on from it; set it to None.")
  if objective.memory and (data.packing != "concat" or data.document_mask):
    raise UserError("config.objective.memory reads on from one part of a text to the next, whatever documents they are "
                    "of, but config.data.packing or document_mask keeps documents apart; set them to concat and False.")


def _check_model(model: Any, seq_len: int) -> None:
  if model.head_dim is None and model.embed_dim % model.num_heads:
    raise UserError(f"config.model.num_heads = {model.num_heads} does not divide embed_dim = {model.embed_dim}; "
                    "change one, or set config.model.head_dim.")
  if model.num_kv_heads and model.num_heads % model.num_kv_heads:
    raise UserError(f"config.model.num_kv_heads = {model.num_kv_heads} does not divide num_heads = "
                    f"{model.num_heads}.")
  head_dim = model.head_dim or model.embed_dim // model.num_heads
  if model.position == "rotary" and int(head_dim * model.rotary_fraction) % 2:
    raise UserError(f"config.model.position is rotary, which needs an even head_dim, but it turns "
                    f"{int(head_dim * model.rotary_fraction)} of {head_dim}.")
  if model.rope_scaling not in ("none", "linear") and model.rope_original_positions is None:
    raise UserError(f"config.model.rope_scaling is {model.rope_scaling}, which needs "
                    "config.model.rope_original_positions; set it to the positions the model was first trained with.")
  for kind in model.attention_pattern:
    if kind not in ("local", "global"):
      raise UserError(f"config.model.attention_pattern has the entry {kind!r}, but each is 'local' or 'global'.")
  if "local" in model.attention_pattern and model.attention_window is None:
    raise UserError("config.model.attention_pattern has local layers, but config.model.attention_window is None; set "
                    "it to the keys that a query in them may see.")
  if model.num_experts and model.experts_per_token > model.num_experts:
    raise UserError(f"config.model.experts_per_token is {model.experts_per_token}, but there are only "
                    f"{model.num_experts} experts (config.model.num_experts).")
  if model.num_experts and (model.use_bias if model.mlp_bias is None else model.mlp_bias):
    raise UserError("config.model.num_experts asks for experts, which have no biases here; set config.model.mlp_bias "
                    "to False.")
  if model.num_experts and model.quantization != "none":
    raise UserError(f"config.model.quantization is {model.quantization}, which the products of experts "
                    "(config.model.num_experts) are not made in; set it to none.")
  if model.head in ("pretraining", "sentence", "replaced", "pooled") and model.architecture == "decoder":
    raise UserError(f"config.model.head is {model.head}, which reads a text from both sides, but "
                    "config.model.architecture is decoder; set it to encoder.")
  if (model.head in ("lm", "pretraining") and model.tie_embeddings and not model.head_transform
      and model.embedding_dim not in (None, model.embed_dim)):
    raise UserError(f"config.model.embedding_dim is {model.embedding_dim} and embed_dim {model.embed_dim}, but the "
                    "output projection is the embedding's transpose; set config.model.head_transform to True, or "
                    "tie_embeddings to False.")
  exact = model.relative_buckets // 2
  if model.position == "relative" and not exact < model.relative_max_distance:
    raise UserError(f"config.model.relative_max_distance is {model.relative_max_distance}, but the first {exact} "
                    "distances have buckets of their own (config.model.relative_buckets); make it larger.")
  if model.position == "relative" and model.relative_buckets % 2:
    raise UserError(f"config.model.relative_buckets is {model.relative_buckets}, but it must be even, for an encoder "
                    "halves them.")
  _check_remat(model)
  if model.position == "learned" and model.max_positions and model.max_positions < seq_len:
    raise UserError(f"config.data.seq_len is {seq_len}, more than the {model.max_positions} learned positions of "
                    "config.model.max_positions; shorten the one or raise the other.")


def _check_parametrization(model: Any, optim: Any) -> None:
  kind = model.parametrization
  said = f"config.model.parametrization is {kind}"
  if kind == "standard":
    return
  for name, needed in (("base_embed_dim", ("mup", "completep")), ("base_num_layers", ("completep",))):
    if kind in needed and getattr(model, name) is None:
      raise UserError(f"{said}, which is relative to a base size, but config.model.{name} is None; set it to the "
                      f"{name.removeprefix('base_')} at which the learning rate was tuned.")
  if optim.name == "sophia":
    raise UserError(f"{said}, but no rule is known for config.optim.name = sophia; set it to another such as adamw.")
  if optim.name == "sgd" and optim.clip_norm is not None:
    raise UserError(f"{said}, but config.optim.clip_norm is {optim.clip_norm}: the norm of all gradients grows with "
                    "the width, and SGD's steps would shrink; set it to None.")
  if optim.name == "sgd" and model.qk_norm == "head":
    raise UserError(f"{said}, but no rule is known for SGD of the gains of config.model.qk_norm = head, which all "
                    "heads share; set config.optim.name to another such as adamw.")
  if kind == "completep" and (model.block == "post" or model.architecture == "xlnet"):
    raise UserError(f"{said}, but config.model.block is post, for which no rule for depth is known; set the former to "
                    "mup, or the block to another such as pre.")
  if kind == "completep" and model.num_future > 1:
    raise UserError(f"{said}, but config.model.num_future is {model.num_future}: no rule for depth is known for blocks "
                    "that stand beside the stack; set the former to mup, or num_future to 1.")
  if kind == "completep" and model.num_decoder_layers not in (None, model.num_layers):
    raise UserError(f"{said}, but config.model.num_decoder_layers is {model.num_decoder_layers} and num_layers "
                    f"{model.num_layers}, which have one base; make them equal.")


def _check_remat(model: Any) -> None:
  for setting in ("remat_save", "remat_offload"):
    names = getattr(model, setting)
    if names and model.remat_policy != "names":
      raise UserError(f"config.model.{setting} is {names!r}, which config.model.remat_policy {model.remat_policy} does "
                      "not read; set that to names, or leave this ().")
    for name in names:
      if name not in REMAT_NAMES:
        raise UserError(f"config.model.{setting} has {name!r}, but the results of a block are called "
                        f"{', '.join(REMAT_NAMES)}.")
  if both := [name for name in model.remat_save if name in model.remat_offload]:
    raise UserError(f"config.model.remat_save and remat_offload both have {both[0]!r}, but it is kept in one place; "
                    "leave it in one of them.")


# What encoder-decoders, XLNet and ELECTRA have in one form only, and what XLNet or ELECTRA alone has, with the value
# that is off.
_ENCODER_DECODER = {"head": "lm", "num_future": 1, "num_experts": 0, "attention_window": None, "attention_pattern": (),
                    "token_types": 0}
_XLNET = {"num_future": 1, "block": "post", "position": "relative", "qk_norm": "none", "attention_window": None,
          "attention_pattern": (), "attention_softcap": None, "logit_softcap": None, "token_types": 0,
          "head_transform": False, "scale_logits": False, "num_experts": 0}
_ONLY_XLNET = {"distance_clamp": None, "memory_len": None, "memory_reuse_len": None, "memory_same_len": False,
               "unidirectional": False, "reverse_half": False}
_ELECTRA = {"head": "replaced", "num_future": 1, "tie_embeddings": True, "head_transform": True, "num_experts": 0}
_ONLY_ELECTRA = {"generator_fraction": 0.25}
_FORMS = {"encoder_decoder": _ENCODER_DECODER, "xlnet": _XLNET, "electra": _ELECTRA}


def _check_architecture(model: Any) -> None:
  is_xlnet, two_sided = model.architecture == "xlnet", model.architecture == "encoder_decoder"
  only = {**({} if is_xlnet else _ONLY_XLNET), **({} if model.architecture == "electra" else _ONLY_ELECTRA),
          **_FORMS.get(model.architecture, {})}
  if two_sided and model.block in ("parallel", "parallel_two"):
    raise UserError(f"config.model.block is {model.block!r}, which has no place for cross-attention; set it to 'pre', "
                    "or config.model.architecture to another than encoder_decoder.")
  for name, value in only.items():
    if getattr(model, name) != value:
      raise UserError(f"config.model.{name} is {getattr(model, name)!r}, which config.model.architecture "
                      f"{model.architecture} does not do; set it to {value!r}.")
  if is_xlnet and model.head not in ("lm", "none"):
    raise UserError(f"config.model.head is {model.head}, which config.model.architecture xlnet does not have; it has "
                    "lm and none.")
  for name, own in (("num_kv_heads", "num_heads"), ("embedding_dim", "embed_dim")):
    if is_xlnet and getattr(model, name) not in (None, getattr(model, own)):
      raise UserError(f"config.model.{name} is {getattr(model, name)}, but in config.model.architecture xlnet it is "
                      f"{own}, which is {getattr(model, own)}; leave it None.")
  if model.memory_same_len and not model.unidirectional:
    raise UserError("config.model.memory_same_len bounds what a token sees before it, but the model sees what is after "
                    "it too; set config.model.unidirectional, or memory_same_len to False.")


# Optimizers whose state has to be on the device as a whole.
_WHOLE = {"sophia": "which measures the curvature of all parameters together",
          "schedule_free": "which makes the averages to evaluate of its state"}


def _check_optim(optim: Any) -> None:
  if optim.name == "schedule_free" and optim.schedule != "constant":
    raise UserError("config.optim.name is schedule_free, which averages in place of a schedule, but "
                    f"config.optim.schedule is {optim.schedule}; set it to constant.")
  decay = [unit for unit in UNITS if getattr(optim, f"decay_{unit}") is not None]
  if decay and optim.schedule != "wsd":
    raise UserError(f"config.optim.decay_{decay[0]} is for the wsd schedule, but config.optim.schedule is "
                    f"{optim.schedule}; set it to wsd, or leave the decay out.")
  if optim.name == "schedule_free" and optim.beta1 == 0:
    raise UserError("config.optim.beta1 is 0, but schedule_free interpolates by it; set it above 0, such as 0.9.")
  if optim.offload and optim.name in _WHOLE:
    raise UserError(f"config.optim.offload is True, but config.optim.name is {optim.name}, {_WHOLE[optim.name]}; set "
                    "offload to False, or name to another such as adamw.")
  try:
    re.compile(optim.lora_targets)
  except re.error as e:
    raise UserError(f"config.optim.lora_targets is {optim.lora_targets!r}, which is not a regex: {e}.") from e
  is_factor, is_step = lambda value: 0 <= float(value) < math.inf, lambda value: int(value) == value >= -1
  for name, what, is_good, words in (("learning_rate_policy", "factor", is_factor, "0 or more"),
                                     ("weight_decay_policy", "factor", is_factor, "0 or more"),
                                     ("freeze_policy", "step", is_step, "a step, or -1 for never")):
    for entry in getattr(optim, name):
      try:
        pattern, value = entry
        re.compile(pattern)
        if not is_good(value):
          raise ValueError(f"the {what} must be {words}")
      except (TypeError, ValueError, re.error) as e:
        raise UserError(f"config.optim.{name} has the entry {entry!r}, which is not a (regex, {what}) pair: "
                        f"{e}.") from e
