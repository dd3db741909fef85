"""Settings under which an experiment could run on a machine, the likely fastest first.

What is tried: how the mesh splits between fsdp and tensor, how many microbatches a batch has, and what the backward
pass makes again. The order follows a rough estimate; what counts is what the compiler then says.
"""

import dataclasses
import itertools
from typing import Any, Iterator, NamedTuple

from lmjax.config import Config
from lmjax.config_checks import UserError
from lmjax.plan import Plan, arithmetic_seconds, made_again, make_plan, resolved
from lmjax.plan.topologies import Topology

_TENSOR, _MICROBATCHES, _REMAT = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32), (
    "none", "products", "attention", "offload", "full")
# Work that making again what stands between products adds to a forward and a backward pass.
_BETWEEN = 0.03
# Bytes that a layer saves of a token, in units of its width: everything, the results of products, its input; and the
# same of what goes to the host.
_SAVED = {"none": 34, "products": 16, "offload": 2, "attention": 4, "full": 2}
_ON_HOST = {"offload": 14}
_PARAM_BYTES, _OPTIMIZER_BYTES, _COMPUTE_BYTES = 4, 8, 2


class Proposal(NamedTuple):
  """Settings to try.

  Attributes:
    changes: {"mesh.fsdp": 16, ...}.
    seconds: a rough estimate of a step.
    bytes: a rough estimate of what a device needs at least.
  """
  changes: dict[str, Any]
  seconds: float
  bytes: float

  def flags(self) -> str:
    """Returns the flags that make these changes."""
    return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


def proposals(config: Config, topology: Topology) -> list[Proposal]:
  """Returns what could fit by a rough estimate, the fastest first."""
  size, chip = resolved(config), topology.chip
  unnamed = {f"model.{name}": () for name in ("remat_save", "remat_offload") if getattr(config.model, name)}
  made = []
  for tensor, count, remat in itertools.product(_TENSOR, _MICROBATCHES, _REMAT):
    ways = topology.num_devices // topology.num_slices // tensor // config.mesh.expert
    if not ways or not _divides(size, topology, tensor, ways, count):
      continue
    changes = {"mesh.replica": topology.num_slices, "mesh.data": 1, "mesh.fsdp": ways, "mesh.tensor": tensor,
               "train.grad_accum_steps": count, "model.remat_policy": remat, **unnamed}
    made.append(Proposal(changes, *_estimate(size, topology, tensor, ways, count, remat)))
  fitting = [one for one in made if one.bytes <= chip.memory]
  return sorted(fitting, key=lambda one: (one.seconds, one.bytes))


def changed(config: Config, changes: dict[str, Any]) -> Config:
  """Returns the config with some settings changed."""
  groups: dict[str, dict[str, Any]] = {}
  for name, value in changes.items():
    group, _, key = name.partition(".")
    groups.setdefault(group, {})[key] = value
  return dataclasses.replace(
      config, **{group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()})


def search(config: Config, topology: Topology, tries: int) -> Iterator[tuple[Proposal, Plan]]:
  """Compiles the likely fastest settings, and yields those that fit.

  Args:
    config: the experiment.
    topology: the machine.
    tries: programs compiled at most.
  """
  for proposal in proposals(config, topology)[:tries]:
    try:
      plan = make_plan(changed(config, proposal.changes), topology)
    except UserError:
      continue  # A size of the model does not divide after all.
    if plan.fits:
      yield proposal, plan


def _divides(config: Config, topology: Topology, tensor: int, ways: int, count: int) -> bool:
  model, batch = config.model, config.train.batch_size
  rows = count * ways * topology.num_slices * config.mesh.expert
  sizes = (model.num_heads, model.num_kv_heads, model.mlp_dim, model.vocab_size)
  return batch % rows == 0 and model.embed_dim % ways == 0 and all(size % tensor == 0 for size in sizes)


def _estimate(config: Config, topology: Topology, tensor: int, ways: int, count: int,
              remat: str) -> tuple[float, float]:
  """Returns seconds of a step and bytes of a device.

  Each microbatch gathers the parameters over fsdp twice and scatters their gradients once; over tensor each layer adds
  up its two outputs, forward and backward. What is kept in the host's memory goes there and comes back.
  """
  model, chip = config.model, topology.chip
  layers = model.num_layers + (model.num_decoder_layers or 0)
  tokens = config.train.batch_size * config.data.seq_len / (ways * topology.num_slices * config.mesh.expert)
  num_params = _num_params(model, layers)
  split = ways * tensor * config.mesh.expert
  gathered = 3 * count * num_params * _COMPUTE_BYTES / (tensor * config.mesh.expert) * (ways > 1)
  summed = 4 * layers * tokens * model.embed_dim * _COMPUTE_BYTES * 2 * (tensor - 1) / tensor
  again = 1 + (remat != "none") * _BETWEEN + made_again(
      dataclasses.replace(model, remat_policy=remat), config.data.seq_len) / 3
  of_layer = layers * tokens * model.embed_dim * _COMPUTE_BYTES / (tensor if remat != "full" else 1)
  moments = num_params * _OPTIMIZER_BYTES / split
  to_host = _ON_HOST.get(remat, 0) * of_layer + moments * config.optim.offload
  seconds = max(arithmetic_seconds(config, topology) * again, (gathered + summed) / chip.link_bandwidth,
                to_host / chip.host_bandwidth) + 0.02 * count * layers * 1e-4
  kept = num_params * (_PARAM_BYTES + _PARAM_BYTES) / split + moments * (not config.optim.offload)
  return seconds, kept + _SAVED[remat] * of_layer / count


def _num_params(model: Any, layers: int) -> float:
  width = model.embed_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
  per_unit = (3 if model.gated_mlp else 2) * model.embed_dim
  mlp = per_unit * (model.expert_dim or model.mlp_dim) * max(1, model.num_experts)
  return layers * (width + mlp) + model.vocab_size * model.embed_dim * (1 if model.tie_embeddings else 2)
