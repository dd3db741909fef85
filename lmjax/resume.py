"""Whether a run may go on from what its workdir holds: which settings may change in between, and which may not."""

import dataclasses
import json
import operator
from typing import Any, Mapping

from absl import logging
from etils import epath

from lmjax.config import Config, UserError, from_config_dict, resolve_model

# Every setting is in one of these three.

# They say which examples a step sees, what the model is, and what the state holds; or they have had their effect on
# the initial parameters, and the run's record would no longer be true.
FIXED = (
    "seed", "train.batch_size", "objective.name", "objective.sentence_pairs", "objective.noise_density",
    "objective.mean_span_length", "objective.memory", "optim.name", "optim.lora_rank", "optim.lora_alpha",
    "optim.lora_targets",
    "objective.start_token", "data.tasks", "data.mixing_temperature", "data.mixing_limit", "model.task_heads",
    "data.source", "data.weights", "data.text_field", "data.validation_fraction", "data.tokenizer",
    "data.tokenizer_vocab_size", "data.seq_len", "data.packing", "data.document_mask", "data.shuffle",
    "model.architecture", "model.num_layers", "model.num_decoder_layers", "model.share_layers", "model.num_future",
    "model.generator_fraction", "model.embed_dim", "model.num_heads", "model.num_kv_heads", "model.head_dim",
    "model.mlp_dim", "model.vocab_size",
    "model.embedding_dim", "model.embedding_norm", "model.share_embeddings", "model.token_types", "model.max_positions",
    "model.position_offset",
    "model.block", "model.norm", "model.norm_eps", "model.norm_bias", "model.norm_offset", "model.position",
    "model.rope_theta", "model.local_rope_theta", "model.rotary_fraction", "model.rope_scaling", "model.rope_factor",
    "model.rope_original_positions", "model.rope_low_frequency", "model.rope_high_frequency",
    "model.rope_attention_factor", "model.relative_buckets", "model.relative_max_distance", "model.distance_clamp",
    "model.memory_len", "model.memory_reuse_len", "model.memory_same_len", "model.unidirectional", "model.reverse_half",
    "model.activation", "model.gated_mlp", "model.use_bias", "model.qkv_bias", "model.out_bias", "model.mlp_bias",
    "model.num_experts", "model.experts_per_token", "model.expert_dim", "model.shared_expert_dim",
    "model.normalize_expert_weights", "model.expert_capacity_factor", "model.qk_norm",
    "model.attention_scale", "model.attention_window", "model.attention_pattern", "model.attention_softcap",
    "model.logit_softcap", "model.head", "model.pooler", "model.num_labels", "model.head_transform", "model.head_bias",
    "model.tie_embeddings", "model.scale_embeddings", "model.scale_logits", "model.init_std", "model.init",
    "model.scale_residual_init", "model.parametrization", "model.base_embed_dim", "model.base_head_dim",
    "model.base_num_layers", "model.param_dtype")

# They change what is learned from here on, which is what a researcher may want: a longer run, another learning rate
# after a spike, more dropout. The run says so, once, in a warning. Another num_steps bends the rest of the schedule.
WARNED = (
    "train.num_steps", "train.num_tokens", "train.num_epochs", "train.ema_decay", "train.on_spike",
    "train.spike_threshold", "model.dropout", "model.dtype", "model.quantization",
    "objective.label_smoothing", "objective.z_loss", "objective.router_balance",
    "objective.router_z_loss", "objective.mask_rate", "objective.mask_unit",
    "objective.mask_random", "objective.mask_same", "objective.sentence_weight", "objective.future_weight",
    "objective.task_weights", "data.augment_replace", "data.augment_delete", "data.augment_insert", "data.augment_swap",
    "objective.fim_rate", "objective.fim_spm_rate", "objective.predict_fraction", "objective.replaced_weight",
    "optim.learning_rate", "optim.schedule", "optim.warmup_steps", "optim.warmup_tokens", "optim.warmup_epochs",
    "optim.decay_steps", "optim.decay_tokens", "optim.decay_epochs", "optim.final_learning_rate_ratio", "optim.beta1",
    "optim.beta2", "optim.momentum", "optim.eps", "optim.weight_decay", "optim.clip_norm",
    "optim.adam_learning_rate_ratio", "optim.learning_rate_policy", "optim.weight_decay_policy",
    "optim.freeze_policy", "optim.layer_decay")

# They change how the numbers are computed, kept and shown, and not what they are but for rounding.
FREE = (
    "train.grad_accum_steps", "train.gradient_noise", "train.on_nonfinite", "train.log_every_steps",
    "train.sample_prompt", "train.sample_length", "train.compilation_cache", "train.watchdog_seconds",
    "model.attention_impl", "model.context_attention", "model.remat_policy", "model.remat_save", "model.remat_offload",
    "model.stage_microbatches", "model.stage_repeats", "model.scan_layers", "objective.loss_chunk", "optim.offload",
    "data.data_dir", "data.cache_dir", "data.num_workers", "data.prefetch",
    "eval.sets", "eval.every_steps", "eval.every_tokens", "eval.every_epochs", "eval.batch_size", "eval.num_batches",
    "eval.final_num_batches", "eval.use_ema", "eval.best_metric", "eval.best_mode", "eval.best_min_change",
    "eval.patience",
    "checkpoint.every_steps", "checkpoint.every_tokens", "checkpoint.every_epochs", "checkpoint.keep_last",
    "checkpoint.keep_every_steps", "checkpoint.async_save", "checkpoint.restore_from", "checkpoint.import_from",
    "checkpoint.finetune_from",
    "mesh.replica", "mesh.data", "mesh.fsdp", "mesh.stage", "mesh.expert", "mesh.context", "mesh.tensor",
    "tracking.tensorboard", "tracking.wandb_project", "tracking.trackio_project")

# Those among WARNED with a value that switches them off: the state has a part for them or it has not.
OFF = {"train.ema_decay": 0.0, "train.on_spike": "ignore"}


def check_resume(saved: Mapping[str, Any], config: Config, workdir: Any) -> list[str]:
  """Compares the config of a run with the one that it is to go on with, both with sizes and durations resolved.

  Args:
    saved: what the run had, as `dataclasses.asdict` made it.
    config: what it is to go on with.
    workdir: for the message.

  Returns:
    For each change of a setting in WARNED, words such as "config.optim.learning_rate = 0.1 (it was 0.3)".

  Raises:
    UserError: where a setting in FIXED has changed, or one in OFF was switched on or off.
  """
  changes = _changes(from_config_dict(saved), config)
  _refuse(changes, workdir)
  return [f"config.{name} = {new!r} (it was {old!r})" for name, (old, new) in changes.items()]


def check_before_data(workdir: epath.Path, config: Config) -> None:
  """Checks a run that has checkpoints for what can be told before its data is open, which may take long.

  Args:
    workdir: of the run.
    config: what it is to go on with, as the user gave it.

  Raises:
    UserError: as `check_resume` does.
  """
  if (record := _read_record(workdir)) is None:
    return
  saved = from_config_dict(record)
  # These follow from the data; any other that was not given follows from the config.
  from_data = {name: getattr(config.model, name) or getattr(saved.model, name)
               for name in ("vocab_size", "num_labels", "task_heads")}
  if config.checkpoint.finetune_from:  # Whose vocabulary special tokens may have been added to.
    from_data["vocab_size"] = saved.model.vocab_size
  model = dataclasses.replace(config.model, **from_data)
  _refuse(_changes(saved, resolve_model(dataclasses.replace(config, model=model), 0)), workdir)


def check_workdir(workdir: epath.Path, config: Config, tokenizer: Any) -> None:
  """Checks a run that has checkpoints before anything large is built, and warns of what it learns otherwise from here.

  Args:
    workdir: of the run.
    config: what it is to go on with, sizes and durations resolved.
    tokenizer: the one of its data.

  Raises:
    UserError: as `check_resume` does, and where the text has changed and with it a tokenizer trained on it.
  """
  if (saved := _read_record(workdir)) is None:
    return _check_tokenizer(workdir, tokenizer)
  # Other text under the same settings is told as such, and not by the sizes that follow from it.
  if not any(name.startswith("data.") for name in _changes(from_config_dict(saved), config)):
    _check_tokenizer(workdir, tokenizer)
  for change in check_resume(saved, config, workdir):
    logging.warning("The run goes on with %s.", change)


def finished_result(workdir: epath.Path) -> dict[str, Any] | None:
  """Returns the result.json of a run that has finished, else None."""
  path = workdir / "result.json"
  result = json.loads(path.read_text()) if path.exists() else {}
  return result if result.get("status") == "finished" else None


def _read_record(workdir: epath.Path) -> dict[str, Any] | None:
  """Returns the config.json of a run; None where someone has copied the checkpoints alone, which have it in them."""
  path = workdir / "config.json"
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except ValueError as e:
    raise UserError(f"{path} is not valid JSON ({e}); put back the one that the run has written, or remove it.") from e


def _refuse(changes: Mapping[str, tuple[Any, Any]], workdir: Any) -> None:
  for name, (old, new) in changes.items():
    if name in FIXED or (name in OFF and OFF[name] in (old, new)):
      raise UserError(f"The run in {workdir} has config.{name} = {old!r}, but now it is {new!r}; to go on keep "
                      f"{old!r}, to start another run give another --workdir.")


def _changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
  """Returns {name: (old value, new value)} of the settings in FIXED and WARNED that differ."""
  values = {name: tuple(operator.attrgetter(name)(config) for config in (before, now)) for name in (*FIXED, *WARNED)}
  return {name: (old, new) for name, (old, new) in values.items() if old != new}


def _check_tokenizer(workdir: epath.Path, tokenizer: Any) -> None:
  from lmjax.data.tokenizer import Tokenizer
  saved = workdir / "tokenizer.json"
  if saved.exists() and Tokenizer.from_file(saved).fingerprint != tokenizer.fingerprint:
    raise UserError(f"The text has changed since {workdir} was begun, and with it the tokenizer; to go on with the one "
                    f"of that run set config.data.tokenizer={saved} in a new --workdir, with checkpoint.restore_from.")
