"""Plans an experiment for a machine that is not there: compiles its training step with that machine's own compiler.

What comes back is what the compiler says of memory, what its program sends between devices, and a bound on speed by
the published figures of the chips: no step is faster than its arithmetic, its traffic with memory, or its traffic with
other devices takes at peak rate, each alone (Williams et al. 2009, Roofline).
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import numpy as np

from lmjax import config as config_lib
from lmjax import metrics, objectives, partitioning, train
from lmjax.config import Config, ModelConfig
from lmjax.config_checks import Refused, check_objective
from lmjax.memory import in_host_memory
from lmjax.models import pipeline, quantized, remat
from lmjax.optim import lora
from lmjax.plan.batches import abstract_batch, tasks_of, vocab_size
from lmjax.plan.collectives import Collective, collectives
from lmjax.plan.topologies import Topology, described_devices

# How the compilers say what a program would need.
_NEEDED = re.compile(r"(?:[Uu]sed |required for [\w ]*\()([\d.]+)([KMGT])")
# No GPU is there to time kernels on.
UNTIMED = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What an experiment costs on a machine.

  Attributes:
    topology: the machine's name.
    num_chips: how many it has.
    mesh: sizes of the axes that split something.
    fits: whether the compiler could place it in memory.
    peak_bytes: of memory on a device; None where the compiler did not say.
    memory_bytes: that a device has.
    bytes_by_kind: on a device parameters, optimizer (with averages), activations (what the backward pass finds saved)
      and temporaries (the rest up to the peak); and host, what of optimizer and activations a device keeps in the
      memory of its host instead.
    num_params: of the model.
    model_flops: of a step on all devices.
    collectives: of a step, a device's part.
    seconds: a step's bounds: compute, memory, links, network, host (what goes to the host's memory or comes back).
    compile_seconds: that the compiler took here.
    tokens_a_step: of the batch.
    num_steps: of the run; None where it is given in epochs.
    message: what the compiler says where it does not fit.
  """
  topology: str
  num_chips: int
  mesh: dict[str, int]
  fits: bool
  peak_bytes: int | None
  memory_bytes: float
  bytes_by_kind: dict[str, float]
  num_params: int
  model_flops: float
  collectives: tuple[Collective, ...]
  seconds: dict[str, float]
  compile_seconds: float
  tokens_a_step: int
  num_steps: int | None
  message: str = ""

  @property
  def step_seconds(self) -> float:
    """The bound on a step: the largest of its parts, as if all of them went on at once."""
    return max(self.seconds.values())

  @property
  def tokens_per_second(self) -> float:
    return self.tokens_a_step / self.step_seconds

  @property
  def days(self) -> float | None:
    return None if self.num_steps is None else self.num_steps * self.step_seconds / 86400

  @property
  def mfu(self) -> float:
    """The share of the peak, of eight bits where these are used, that the bound leaves to the model's arithmetic."""
    return self.seconds["model"] / self.step_seconds

  def to_json(self) -> dict[str, Any]:
    """Returns the plan as what JSON holds."""
    collectives = [one._asdict() | {"axes": list(one.axes)} for one in self.collectives]
    derived = {"step_seconds": self.step_seconds, "tokens_per_second": self.tokens_per_second, "days": self.days,
               "mfu_bound": self.mfu}
    return dataclasses.asdict(self) | {"collectives": collectives} | derived


def resolved(config: Config) -> Config:
  """Returns an experiment with all sizes that do not need its data; a run in epochs is one step long.

  Raises:
    UserError: where its objective does not go with its model.
  """
  check_objective(config)
  num_steps = config.train.num_steps or (
      None if config.train.num_epochs else round(config.train.num_tokens / _tokens_a_step(config)))
  steps = lambda settings: {name: None for name in vars(settings) if name.endswith(("_tokens", "_epochs"))}
  length = dict(num_steps=max(num_steps or 1, 1), num_tokens=None, num_epochs=None)
  config = dataclasses.replace(
      config, train=dataclasses.replace(config.train, **length),
      **{name: dataclasses.replace(getattr(config, name), **steps(getattr(config, name)))
         for name in ("optim", "eval", "checkpoint")})
  config = objectives.with_heads(config, tasks_of(config))
  return config_lib.resolve_model(config, vocab_size(config))


def _tokens_a_step(config: Config) -> int:
  return config.train.batch_size * config.data.seq_len


def make_plan(config: Config, topology: Topology, program: str | None = None) -> Plan:
  """Compiles an experiment's training step for a machine and says what it costs.

  Args:
    config: the experiment.
    topology: the machine.
    program: file that the compiled step is written to, where it fits; see `_write`. None writes none.

  Raises:
    UserError: where the experiment is wrong, or does not divide by the machine.
    Refused: where the machine's compiler is not installed, or cannot write its programs.
  """
  in_epochs = config.train.num_epochs is not None
  config = resolved(config)
  mesh = partitioning.make_mesh(config.mesh, described_devices(topology))
  setup = train.build(config, mesh)
  batch, start = abstract_batch(config, mesh), time.perf_counter()
  compiled, message = _compile(setup, batch, topology)
  seconds = time.perf_counter() - start
  if program and compiled:
    _write(compiled, topology, program)
  found = tuple(collectives(compiled.as_text(), dict(mesh.shape), topology.devices_a_fast_network)) if compiled else ()
  by_kind, to_host, peak = _memory(setup, batch, compiled)
  asked = peak if compiled else _asked(message)
  return Plan(
      topology=topology.name, num_chips=topology.num_chips,
      mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
      fits=compiled is not None and asked <= topology.chip.memory, peak_bytes=asked,
      memory_bytes=topology.chip.memory, bytes_by_kind=by_kind,
      num_params=metrics.count_params(lora.without(setup.state_shapes.params)), model_flops=_flops(config),
      collectives=found, seconds=_bounds(setup, topology, by_kind, to_host, found), compile_seconds=seconds,
      tokens_a_step=_tokens_a_step(config), num_steps=None if in_epochs else config.train.num_steps, message=message)


def lower(setup: train.Setup, batch: dict[str, jax.ShapeDtypeStruct]) -> Any:
  """Returns the lowered training step of a setup whose devices are described."""
  one = partitioning.replicated(setup.mesh)
  hparams = {name: jax.ShapeDtypeStruct((), kind, sharding=one) for name, kind in (
      ("learning_rate", np.float32), ("weight_decay", np.float32), ("seed", np.uint32))}
  with partitioning.use_mesh(setup.mesh):
    return train.make_train_step(setup).lower(setup.state_shapes, batch, hparams)


def _compile(setup: train.Setup, batch: dict[str, jax.ShapeDtypeStruct], topology: Topology) -> tuple[Any, str]:
  """Returns the compiled step, or None and what the compiler says where it does not fit."""
  try:
    return lower(setup, batch).compile({} if topology.is_tpu else UNTIMED), ""
  except jax.errors.JaxRuntimeError as e:
    if not re.search(r"RESOURCE_EXHAUSTED|Oom|out of memory", str(e), re.IGNORECASE):
      raise
    lines = str(e).splitlines()
    return None, next((line.strip() for line in lines if _NEEDED.search(line)), lines[0])


def _asked(message: str) -> int | None:
  """Returns the bytes that a compiler's refusal says the program would need."""
  found = _NEEDED.search(message)
  return round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def _memory(setup: train.Setup, batch: dict, compiled: Any) -> tuple[dict[str, float], float, int | None]:
  """Returns bytes on a device by kind, those that it sends to its host in a step, and the peak."""
  state = setup.state_shapes
  optimizer, saved = _of_device((state.opt_state, state.ema, state.spike)), _saved(setup, batch)
  kinds = {"parameters": _of_device(state.params)[0], "optimizer": optimizer[0], "activations": saved[0]}
  host, to_host = {"host": optimizer[1] + saved[1]}, optimizer[1] + saved[1] * setup.config.train.grad_accum_steps
  if compiled is None:
    return kinds | host, to_host, None
  analysis = compiled.memory_analysis()
  allocated = (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
               - analysis.alias_size_in_bytes)
  peak = getattr(analysis, "peak_memory_in_bytes", 0) or allocated
  if host["host"]:  # The compiler's peak counts the state there, and what is saved there where it is the larger part.
    peak = min(peak - analysis.host_argument_size_in_bytes, allocated + analysis.generated_code_size_in_bytes)
  return kinds | {"temporaries": max(0.0, peak - sum(kinds.values()))} | host, to_host, peak


def _of_device(tree: Any) -> tuple[float, float]:
  """Returns the bytes that a device has of arrays in its own memory, and in its host's."""
  size = lambda leaf: float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)
  leaves = jax.tree.leaves(tree)
  on_host = sum(size(leaf) for leaf in leaves if in_host_memory(leaf))
  return sum(map(size, leaves)) - on_host, on_host


def _saved(setup: train.Setup, batch: dict) -> tuple[float, float]:
  """Returns the bytes on a device, and in its host's memory, of what the forward pass of a microbatch saves.

  Parameters are left out. The rest is taken to be split as the batch is.
  """
  cfg, params = setup.config, lora.without(setup.state_shapes.params)
  count = cfg.train.grad_accum_steps
  rows = {name: jax.ShapeDtypeStruct((leaf.shape[0] // count, *leaf.shape[1:]), leaf.dtype)
          for name, leaf in batch.items()}

  def residuals(params, rows):
    loss = lambda params: setup.objective.loss(setup.model, params, rows, cfg.objective, None)[0]
    return jax.tree.leaves(jax.vjp(loss, params)[1])

  plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  with partitioning.use_mesh(setup.mesh):
    saved = jax.make_jaxpr(residuals)(plain, rows).out_avals
    known = {leaf.shape for leaf in jax.tree.leaves(params)}
    mine = [leaf for leaf in saved if leaf.shape not in known]
    size = lambda on_host: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in mine
                               if (leaf.memory_space == jax.memory.Space.Host) == on_host)
    parts = partitioning.ways("batch_length")
    return size(False) / parts, size(True) / parts


def _flops(config: Config) -> float:
  return objectives.flops_per_token(config) * _tokens_a_step(config)


def arithmetic_seconds(config: Config, topology: Topology) -> float:
  """Returns the seconds of a step's model FLOPs at the peak rates of the types that they are in.

  Eight bits serve the linear maps of the blocks, forward and backward as far as the recipe goes.
  """
  total, chip = _flops(config), topology.chip
  recipe = quantized.RECIPES.get(config.model.quantization)
  fast = recipe.share * objectives.linear_flops_per_token(config) * _tokens_a_step(config) if recipe else 0.0
  rate = chip.eight_bit_flops.get(config.model.quantization, chip.peak_flops)
  return ((total - fast) / chip.peak_flops + fast / rate) / topology.num_devices


def _bounds(setup: train.Setup, topology: Topology, by_kind: dict[str, float], to_host: float,
            found: tuple[Collective, ...]) -> dict[str, float]:
  """Returns the seconds that each resource needs for a step at its peak rate.

  Memory moves at least: the compute copy of all parameters of a device, forward and backward, for each microbatch; the
  parameters and the optimizer's state, read and written; what the forward pass saves, written and read. What lies in
  the host's memory comes and goes as often; its link has a lane for each way. Stages without work wait.
  """
  config, chip = setup.config, topology.chip
  again = 1 + made_again(config.model, config.data.seq_len) / 3
  passes = 2 * config.train.grad_accum_steps
  moved = passes * by_kind["parameters"] / 2 + 2 * (by_kind["parameters"] + by_kind["optimizer"]) + (
      2 * by_kind["activations"] * config.train.grad_accum_steps)
  near = sum(one.sent for one in found if not one.crosses)
  far = sum(one.sent for one in found if one.crosses)
  model = arithmetic_seconds(config, topology)
  return {"model": model, "compute": model * again * (1 + _bubble(setup)), "memory": moved / chip.memory_bandwidth,
          "links": near / chip.link_bandwidth, "network": far / chip.network_bandwidth,
          "host": to_host / chip.host_bandwidth}


def _bubble(setup: train.Setup) -> float:
  """Returns the ticks of a pipeline that find a stage without work, over those that find it with work."""
  config, stages = setup.config, setup.mesh.shape["stage"]
  with partitioning.use_mesh(setup.mesh):
    count = stages * pipeline.microbatches_a_stage(config.train.batch_size // config.train.grad_accum_steps,
                                                   config.model.stage_microbatches)
  return (stages - 1) / (count * config.model.stage_repeats)


def made_again(model: ModelConfig, seq_len: int) -> float:
  """Returns the share of the forward pass's products that the backward pass makes again, as far as blocks have them.

  Args:
    model: with its sizes resolved.
    seq_len: T.
  """
  if model.remat_policy == "none":
    return 0.0
  D, H, N, K = model.embed_dim, model.head_dim, model.num_heads, model.num_kv_heads
  F = model.mlp_dim if not model.num_experts else (
      model.experts_per_token * model.expert_dim + model.shared_expert_dim)
  keys = min(model.attention_window or seq_len, seq_len) / (2 if model.architecture == "decoder" else 1)
  of_token = {"query": D * N * H, "key": D * K * H, "value": D * K * H, "attention": 2 * keys * N * H,
              "out": N * H * D, "up": D * F, "gate": D * F * model.gated_mlp, "down": F * D}
  kept = {name for names in remat.kept(model) for name in names}
  return sum(count for name, count in of_token.items() if name not in kept) / sum(of_token.values())


def _write(compiled: Any, topology: Topology, path: str) -> None:
  """Writes the compiled step, the first of what `jax.experimental.serialize_executable.deserialize_and_load` takes.

  The other two are the trees of `lower`'s arguments and results, which the machine makes again from the experiment.
  """
  from jax.experimental import serialize_executable
  try:
    program, _, _ = serialize_executable.serialize(compiled)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as e:
    raise Refused(f"The compiler for {topology.name} does not write its programs ({str(e).splitlines()[0]}); leave out "
                  "--save.") from e
  with open(path, "wb") as file:
    file.write(program)
