"""Which trials differ in numbers only, so that one compiled program trains them together or one after another."""

import dataclasses
import operator
from typing import Any, Collection, Mapping

from lmjax.config import Config, to_json

# Settings that the loop reads on the host, or has always given the compiled step.
_OF_HOST = ("seed", "optim.learning_rate", "optim.weight_decay", "optim.schedule", "optim.final_learning_rate_ratio",
            *(f"optim.{stem}_{unit}" for stem in ("warmup", "decay") for unit in ("steps", "tokens", "epochs")))
# Settings that `train.with_numbers` can make inputs of the compiled step, and of the optimizers those that these read.
_OF_STEP = ("model.dropout", "model.init_std", "train.ema_decay", "train.spike_threshold", "optim.clip_norm",
            "objective.label_smoothing", "objective.z_loss", "objective.router_balance", "objective.router_z_loss",
            "objective.future_weight", "objective.sentence_weight", "objective.replaced_weight")
_OF_OPTIMIZER = {
    "adamw": ("optim.beta1", "optim.beta2", "optim.eps"), "lion": ("optim.beta1", "optim.beta2"),
    "sgd": ("optim.momentum",), "adafactor": (), "schedule_free": (), "sophia": (),
    "muon": ("optim.momentum", "optim.beta1", "optim.beta2", "optim.eps", "optim.adam_learning_rate_ratio")}
# A program that has these has something that one without them has not.
_SWITCHES = ("model.dropout", "train.ema_decay", "objective.label_smoothing", "optim.clip_norm")
_ANY = "any"  # In place of a number that does not matter; None would be a value that some have.
# Mesh axes over which a member of a stack may be split.
_WITHIN = ("fsdp", "tensor")


def numbers(config: Config, searched: Collection[str]) -> dict[str, float]:
  """Returns the settings of a trial that are to be inputs of the compiled step, by name.

  Args:
    config: of the trial.
    searched: names of the settings that the sweep varies.
  """
  able = {*_OF_STEP, *_OF_OPTIMIZER[config.optim.name]} if _may_stack(config) else set()
  values = {name: operator.attrgetter(name)(config) for name in sorted(able & {*searched})}
  return {name: value for name, value in values.items() if value is not None and not _is_off(name, value)}


def key(config: Config, searched: Collection[str]) -> str:
  """Returns what a trial has in common with those that differ from it in numbers only, and with no other.

  Args:
    config: of the trial.
    searched: names of the settings that the sweep varies.
  """
  if not _may_stack(config):
    return to_json(config)
  open_fields = {*numbers(config, searched), *({*_OF_HOST} & {*searched})}
  for name in open_fields:
    config = _without(config, name)
  return to_json(config)


def groups(configs: Mapping[int, Config], searched: Collection[str]) -> list[list[int]]:
  """Returns the numbers of trials, those together that train together."""
  found: dict[str, list[int]] = {}
  for number, config in configs.items():
    found.setdefault(key(config, searched), []).append(number)
  return list(found.values())


def _is_off(name: str, value: Any) -> bool:
  return name in _SWITCHES and value == 0


def _may_stack(config: Config) -> bool:
  # Moments or activations in the host's memory, stages and rings have not been seen to work in a stack.
  mesh = dataclasses.asdict(config.mesh)
  split = [axis for axis in mesh if axis not in ("replica", "data", *_WITHIN) and mesh[axis] != 1]
  one_at_a_time = config.tracking.trackio_project is not None  # Trackio has one run of a process.
  return not (split or one_at_a_time or config.optim.offload or config.model.remat_policy == "offload"
              or config.model.remat_offload)


def _without(config: Config, name: str) -> Config:
  group, _, field = name.rpartition(".")
  if not group:
    return dataclasses.replace(config, **{field: _ANY})
  return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: _ANY})})
