"""Training: the state, the compiled step, and how a run begins; loop.py has the loop over steps.

The path from a config to a gradient: `train_and_evaluate` opens the data and the mesh, `build` makes the model and the
optimizer, `init_state` makes sharded parameters, and `make_train_step` compiles one update.
"""

import contextlib
import dataclasses
import functools
import time
from types import MappingProxyType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from absl import logging
from etils import epath
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax import checkpoint, convert, evaluate, finetune, memory, metrics, objectives, partitioning, resume
from lmjax import config as config_lib
from lmjax import workdir as workdir_lib
from lmjax.checkpoint import best as best_lib
from lmjax.config import Config, UserError
from lmjax.config_checks import check_objective
from lmjax.data import chat
from lmjax.loop import Loop, Past, Report, Run
from lmjax.models.transformer import init_params, make_model
from lmjax.optim import lora, offload
from lmjax.optim.gates import Gates, join, make_gates, split
from lmjax.optim.optimizer import Optimizer, make_optimizer, mean_and_clip
from lmjax.peers import Peers, only_run
from lmjax.tracking import Tracker

# A loss is compared with a running mean over about this many steps, and never before that many have been seen.
_SPIKE_HISTORY = 50


@struct.dataclass
class TrainState:
  """All that a step changes.

  Attributes:
    step: [] int32, updates tried so far.
    params: nested dict of parameters, with adapters in its "lora" where there are some.
    opt_state: the optimizer's state.
    ema: averages of the parameters that learn, the ones to evaluate, or None where training keeps no average.
    spike: [3] float32 running mean and variance of the loss and how many were seen, or None.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  spike: jax.Array | None


class Setup(NamedTuple):
  """What is fixed for a run: made once by `build`, read by training, evaluation and planning.

  Attributes:
    config: with all sizes and durations resolved.
    mesh: the devices.
    model: the Flax module.
    objective: a module of `lmjax.objectives`.
    optimizer: init and update.
    gates: which parameters learn when; None where all do.
    start: (params of the model, key) -> TrainState of a run that starts from them, to be compiled; adapters are random.
    state_shapes: the TrainState as ShapeDtypeStructs that carry their shardings.
  """
  config: Config
  mesh: jax.sharding.Mesh
  model: nn.Module
  objective: Any
  optimizer: Optimizer
  gates: Gates | None
  start: Callable[[Any, jax.Array], TrainState]
  state_shapes: TrainState

  @property
  def frozen(self) -> Any | None:
    """Which parameters never learn, a tree of booleans; None where all do."""
    return self.gates.frozen if self.gates else None

  @property
  def state_shardings(self) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, self.state_shapes)


def build(config: Config, mesh: jax.sharding.Mesh) -> Setup:
  """Makes the model and the optimizer, and works out the shape and sharding of their state without allocating it.

  Args:
    config: with sizes and durations resolved.
    mesh: real devices, or described ones.

  Raises:
    UserError: where the model or the batch does not divide by the mesh, or a policy names no parameter.
    Refused: where something is to be kept in the host's memory, and the devices do not reach it.
  """
  partitioning.check_divisible(config, mesh)
  memory.check_host_memory(config, mesh)
  model = make_model(config.model, mesh.devices.flat[0].platform)
  of_model = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  adapters = functools.partial(lora.init, of_model, config.optim)
  boxed = {**of_model, **jax.eval_shape(adapters, jax.random.key(0))}
  axes = partitioning.logical_axes(boxed)
  gates = make_gates(config.optim, axes, nn.unbox(boxed))
  frozen = gates.frozen if gates else None
  of_others = functools.partial(make_optimizer, config.optim, axes, model=config.model)
  optimizer = offload.in_turn(of_others, boxed, frozen) if config.optim.offload else of_others(frozen)
  averages = config.optim.name == "schedule_free"

  def start(params: Any, key: jax.Array) -> TrainState:
    params = {**params, **nn.unbox(adapters(key))}
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
        ema=jax.tree.map(lambda p: p.astype(jnp.float32), split(params, frozen)[0])
        if config_lib.is_on(config.train.ema_decay) or averages else None,
        spike=jnp.zeros(3, jnp.float32) if config.train.on_spike != "ignore" else None)

  shapes = jax.eval_shape(start, nn.unbox(of_model), jax.random.key(0))
  of_params = partitioning.param_shardings(mesh, boxed)
  shardings = partitioning.like_params(mesh, shapes, shapes.params, of_params)
  if config.optim.offload:
    shardings = shardings.replace(opt_state=offload.on_host(shapes.opt_state, shardings.opt_state))
  shapes = partitioning.laid_out(shapes, shardings)
  return Setup(config, mesh, model, objectives.OBJECTIVES[config.objective.name], optimizer, gates, start,
               shapes)


def with_numbers(setup: Setup, numbers: Mapping[str, Any]) -> Setup:
  """Returns the setup of a run some of whose settings are another number, which may be one of the running program.

  Args:
    setup: of a run.
    numbers: by names such as "optim.beta1"; they change no shape, and none of them is off in one run and on in another.
  """
  if not numbers:
    return setup
  config = setup.config
  for name, value in numbers.items():
    group, _, field = name.partition(".")
    config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})
  return build(config, setup.mesh)


def init_state(setup: Setup) -> TrainState:
  """Makes the initial state on its devices; the values do not depend on the mesh."""
  with partitioning.use_mesh(setup.mesh):
    init = _compiled_init(setup, lambda key: _fresh(setup, key), setup.state_shardings)
    return init(jax.random.key(setup.config.seed))


def _fresh(setup: Setup, key: jax.Array) -> TrainState:
  return setup.start(nn.unbox(init_params(setup.model, key)), key)


def _compiled_init(setup: Setup, init: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
  # Optimised for a CPU, the inverse error function behind normal numbers rounds by the shape of a device's part.
  on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
  return jax.jit(init, out_shardings=shardings,
                 compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None)


def make_train_step(setup: Setup) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the compiled update: (state, batch, hparams) -> (state, metrics).

  `batch` holds arrays [B, T]. `hparams` holds scalars, inputs of the compiled program: `learning_rate`,
  `weight_decay` and `seed`, and those of `with_numbers`. `metrics` holds scalars: the means `loss`, `accuracy`,
  `z_loss` over the batch's weights, `grad_norm` before clipping, and `applied`, 0 where the update was dropped because
  the loss or the gradient was not finite (`nonfinite` is 1) or the loss a spike (`spike` is 1). With
  train.gradient_noise it has `square_small` and `square_big` too, squared norms of the mean gradient of a microbatch,
  averaged over these, and of the whole batch.
  """
  batch = partitioning.batch_sharding(setup.mesh)
  one = partitioning.replicated(setup.mesh)
  return jax.jit(functools.partial(_train_step, setup), donate_argnums=0,
                 in_shardings=(setup.state_shardings, batch, one), out_shardings=(setup.state_shardings, one))


def _train_step(setup: Setup, state: TrainState, batch: dict[str, jax.Array], hparams: dict[str, jax.Array]):
  setup = with_numbers(setup, {name: value for name, value in hparams.items() if "." in name})
  cfg = setup.config
  batch = objectives.balance(setup.objective, batch, cfg.objective)
  key = jax.random.fold_in(jax.random.key(hparams["seed"]), state.step)

  learned, rest = split(state.params, setup.frozen)

  def loss_fn(learned, microbatch, index):
    params = lora.merge(join(learned, rest), cfg.optim)
    rngs = {"dropout": jax.random.fold_in(key, index)} if config_lib.is_on(cfg.model.dropout) else None
    return setup.objective.loss(setup.model, params, microbatch, cfg.objective, rngs)

  shardings, _ = split(setup.state_shardings.params, setup.frozen)
  grads, sums, squares = _sum_of_grads(loss_fn, learned, batch, cfg.train, shardings)
  weight = jnp.maximum(sums["weight"], 1e-9)
  if setup.gates:
    hparams = {**hparams, "gates": split(setup.gates.at(state.step), setup.frozen)[0]}
    grads = jax.tree.map(lambda g, gate: jnp.where(gate > 0, g, 0), grads, hparams["gates"])
  grads, grad_norm = mean_and_clip(grads, weight, cfg.optim.clip_norm)
  out = {name: value / jnp.maximum(metrics.weight_of(sums, name), 1e-9) for name, value in sums.items()
         if not name.endswith("weight")}
  ok, spike, flags = _accept(cfg, state.spike, out["loss"], grad_norm)

  def mean_loss(learned):
    first = _microbatch(batch, cfg.train.grad_accum_steps, 0)
    return loss_fn(learned, first, 0)[0] / jnp.maximum(jnp.sum(first["weights"]), 1e-9)

  params, opt_state = setup.optimizer.update(grads, state.opt_state, state.params, hparams, mean_loss, ok)
  ema = state.ema
  if ema is not None:
    # The average of few steps weighs them evenly, and so forgets the initial parameters.
    decay = jnp.minimum(cfg.train.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    learned, _ = split(setup.optimizer.eval_params(opt_state, params), setup.frozen)
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, learned)
  return (TrainState(state.step + 1, params, opt_state, ema, spike),
          {**out, **squares, **flags, "grad_norm": grad_norm, "applied": ok.astype(jnp.float32)})


def _microbatch(batch: dict[str, jax.Array], count: int, index: Any) -> dict[str, jax.Array]:
  """Returns rows index, index + count, ...: every device's part comes from the rows it already holds."""
  pick = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(x.shape[0] // count, count, *x.shape[1:]), index, 1, False)
  return batch if count == 1 else jax.tree.map(pick, batch)


def _sum_of_grads(loss_fn, params, batch, cfg, shardings):
  """Adds up gradients and metric sums over microbatches; dividing once at the end makes every split the same.

  Returns:
    Both sums, and where they are wanted the squared norms of mean gradients that tell their noise (McCandlish et al.
    2018, arXiv 1812.06162, appendix A.1), else {}.
  """
  value_and_grad, count = jax.grad(loss_fn, has_aux=True), cfg.grad_accum_steps
  if count == 1:
    return *value_and_grad(params, batch, 0), {}

  def square_of_mean(grads, sums):
    return optax.tree.norm(grads, squared=True) / jnp.square(jnp.maximum(sums["weight"], 1e-9))

  def body(total, index):
    part = value_and_grad(params, _microbatch(batch, count, index), index)
    grads, sums = jax.tree.map(lambda t, x: t + x.astype(t.dtype), total[:2], part)
    square = total[2] + square_of_mean(*part) if cfg.gradient_noise else total[2]
    return (jax.lax.with_sharding_constraint(grads, shardings), sums, square), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32),
                       jax.eval_shape(value_and_grad, params, _microbatch(batch, count, 0), 0))
  grads, sums, square = jax.lax.scan(body, (*zeros, jnp.zeros((), jnp.float32)), jnp.arange(count))[0]
  squares = {"square_small": square / count, "square_big": square_of_mean(grads, sums)}
  return grads, sums, squares if cfg.gradient_noise else {}


def _accept(cfg: Config, spike: jax.Array | None, loss: jax.Array, grad_norm: jax.Array):
  """Decides on the device whether an update counts: returns that, the new spike statistics, and what was seen."""
  nonfinite = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
  flags = {"nonfinite": nonfinite.astype(jnp.float32)}
  if spike is None:
    return ~nonfinite, None, flags
  mean, variance, seen = spike
  limit = mean + cfg.train.spike_threshold * jnp.sqrt(variance)
  is_spike = (seen >= _SPIKE_HISTORY) & (loss > limit)
  # A spike enters the statistics cut off at the limit, so that a lasting change of level is soon accepted.
  value = jnp.where(nonfinite, mean, jnp.where(seen >= _SPIKE_HISTORY, jnp.minimum(loss, limit), loss))
  rate = 1.0 / jnp.minimum(seen + 1.0, _SPIKE_HISTORY)
  variance = (1 - rate) * (variance + rate * jnp.square(value - mean))
  flags["spike"] = is_spike.astype(jnp.float32)
  return ~nonfinite & ~is_spike, jnp.stack([mean + rate * (value - mean), variance, seen + 1.0]), flags


class Program:
  """What is compiled for a run, and for those that train one after another and differ in numbers only.

  `step`, `place`, `read` and `part` are about a list of runs, here of one; `stack.Stack` has several.

  Attributes:
    setup: of the first run; the others have another config in it, but no other shapes.
    data: that all read.
  """
  size = 1

  def __init__(self, config: Config, data: Any):
    """Args: `config`: with sizes and durations resolved; `data`: that it describes."""
    self.setup, self.data = build(config, partitioning.make_mesh(config.mesh)), data
    setup, shardings = self.setup, self.setup.state_shardings
    self.fresh = _compiled_init(setup, lambda key, numbers: _fresh(with_numbers(setup, numbers), key), shardings)
    self.start = jax.jit(setup.start, out_shardings=shardings, donate_argnums=0)
    self._evaluator = evaluate.Evaluator(setup.model, setup.objective, config, setup.mesh, data)

  def suits(self, count: int) -> bool:
    """Is it meant for so many runs?"""
    return count == 1

  def evaluator(self, config: Config) -> evaluate.Evaluator:
    """Returns what evaluates a run."""
    return self._evaluator.of(config)

  def update(self, state: TrainState, batch: dict[str, jax.Array], hparams: dict[str, jax.Array]) -> Any:
    """Returns what the step of one run does, to be compiled."""
    return _train_step(self.setup, state, batch, hparams)

  @functools.cached_property
  def _step(self) -> Callable[..., Any]:
    return make_train_step(self.setup)

  def step(self, state: TrainState, batch: Any, hparams: list[dict]) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after an update, and its metrics on the device."""
    return self._step(state, batch, hparams[0])

  def place(self, batches: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    """Puts a batch on the devices."""
    return partitioning.global_batch(self.setup.mesh, batches[0], self.setup.config.train.batch_size)

  def read(self, out: dict[str, jax.Array]) -> list[dict[str, float]]:
    """Waits for the metrics of a step."""
    return [{name: float(value) for name, value in jax.device_get(out).items()}]

  def join(self, states: Iterator[TrainState]) -> TrainState:
    """Returns the state to train, of those of the runs."""
    return next(states)

  def part(self, state: TrainState, number: int) -> TrainState:
    """Returns the state of a run."""
    return state


class Member(NamedTuple):
  """A run that is to be trained by a program.

  Attributes:
    config: with sizes and durations resolved.
    workdir: of the run.
    report: as `train_and_evaluate` takes it.
    numbers: settings that the compiled step is given, by name.
  """
  config: Config
  workdir: epath.Path
  report: Report | None = None
  numbers: Mapping[str, float] = MappingProxyType({})


def train_and_evaluate(config: Config, workdir: str, profile: tuple[int, int] | None = None,
                       report: Report | None = None) -> dict[str, Any]:
  """Runs an experiment from start, or from where its workdir stands, to its end.

  Args:
    config: as `config.from_config_dict` returns it.
    workdir: folder or object-store URL; see the README for what is written to it.
    profile: first and last step of a trace for XProf, written to the workdir's `profile`; None writes none.
    report: told the step and the metrics of each evaluation in the loop; where it returns True the run is over, with
      the status "pruned".

  Returns:
    What result.json holds.

  Raises:
    UserError: for anything in the config, the data or the workdir that cannot work.
    Refused: where another run has the workdir, where it cannot be written, and where a policy of `train.on_nonfinite`
      or `train.on_spike` stops the run.
  """
  config, began = prepare(config), time.time()
  with Peers() as others, only_run(workdir), workdir_lib.write_errors(workdir):
    folder = epath.Path(workdir)
    check_before_data(folder, config)
    data = open_data(config, workdir)
    program = Program(resolved(config, data), data)
    outcome, = run_together(program, [Member(program.setup.config, folder, report)], others, began, profile)
  if isinstance(outcome, Exception):
    raise outcome
  return outcome


def prepare(config: Config) -> Config:
  """Checks what the data need not be open for, joins the processes of a run, and returns the config to train."""
  config = finetune.take_model(config)
  check_objective(config)
  if config.train.compilation_cache:
    enable_compilation_cache()
  partitioning.join_processes()
  return config


def check_before_data(workdir: epath.Path, config: Config) -> None:
  """Raises a UserError where a run cannot go on from what its workdir holds, as far as that can be told."""
  partitioning.make_mesh(config.mesh)
  if checkpoint.latest_step(workdir) is not None:
    resume.check_before_data(workdir, config)


def open_data(config: Config, workdir: Any) -> Any:
  """Returns the data of a config; its labels are those of the run that the workdir holds, where it holds one."""
  from lmjax.data import pipeline  # Imports grain, which a caller with batches of its own does without.
  goes_on = checkpoint.latest_step(epath.Path(workdir)) is not None
  labels = workdir_lib.read_labels(epath.Path(workdir)) if goes_on else {}
  return pipeline.open_data(config, *objectives.text_needs(config), labels=labels)


def resolved(config: Config, data: Any) -> Config:
  """Returns a config with all sizes and durations that follow from its data."""
  config = finetune.grow_vocabulary(objectives.with_heads(config, data.tasks), data.tokenizer.size)
  return config_lib.resolve_durations(
      config_lib.resolve_model(config, data.tokenizer.size), data.train.num_examples * config.data.seq_len)


def run_together(program: Program, members: Sequence[Member], others: Peers, began: float,
                 profile: tuple[int, int] | None = None) -> list[dict[str, Any] | Exception]:
  """Trains runs, each from where its workdir stands, which must be the same step.

  Args:
    program: with room for them.
    members: the runs.
    others: the processes of the run.
    began: seconds since the epoch.
    profile: as `train_and_evaluate` takes it.

  Returns:
    For each what result.json holds, or the error that has ended it alone.
  """
  setup, data = program.setup, program.data
  for member in members:
    if checkpoint.latest_step(member.workdir) is not None:
      resume.check_workdir(member.workdir, member.config, data.tokenizer)
  memory.check_fits(setup.state_shapes)
  with partitioning.use_mesh(setup.mesh), contextlib.ExitStack() as stack:
    runs, first, clock = [], 0, None

    def states() -> Iterator[TrainState]:
      nonlocal first, clock
      for member in members:
        checkpointer = stack.enter_context(contextlib.closing(
            checkpoint.Checkpointer(member.workdir, member.config.checkpoint)))
        state, past = _first_state(program, member, checkpointer, began)
        first, clock = int(state.step), clock or _clock(member.config, past)
        _check_step(member, first)
        run_of = functools.partial(Run, setup._replace(config=member.config), data, program.evaluator(member.config),
                                   num_together=len(members))
        if finished := _finished(member, first, past):
          run = run_of(None, checkpointer, past, clock, others)
          run.outcome = finished
        else:
          tracker = stack.enter_context(_begin(setup._replace(config=member.config), data, member.workdir, first))
          run = run_of(tracker, checkpointer, past, clock, others, member.report, member.numbers)
        runs.append(run)
        yield state

    state = program.join(states())
    Loop(program, runs, others, profile).run(state, first)
    return [run.outcome for run in runs]


def _clock(config: Config, past: Past) -> metrics.Clock:
  return metrics.Clock(config.train.batch_size * config.data.seq_len,
                       objectives.flops_per_token(config), metrics.peak_flops(jax.devices()),
                       time.time() - past.began, past.seconds)


def _check_step(member: Member, step: int) -> None:
  if step > (last := member.config.train.num_steps):
    raise UserError(f"{member.workdir} is already at step {step}, beyond the {last} of this run; give it another "
                    "--workdir, or a config.train.num_steps of at least that.")


def _finished(member: Member, step: int, past: Past) -> dict[str, Any] | None:
  """Returns the result of a run that has nothing left to do."""
  over = step == member.config.train.num_steps or past.best.is_over(member.config.eval)
  if over and (finished := resume.finished_result(member.workdir)):
    logging.info("%s is already finished.", member.workdir)
    return finished
  return None


def _begin(setup: Setup, data: Any, workdir: epath.Path, step: int) -> Tracker:
  """Writes down what a run is, and returns what records it."""
  config = setup.config
  _announce(setup, data, workdir)
  if jax.process_index() == 0:
    (workdir / "result.json").unlink(missing_ok=True)  # Of a part of the run that ended before.
    workdir_lib.write_whole(workdir / "config.json", config_lib.to_json(config))
    data.tokenizer.save(workdir / "tokenizer.json")
    _write_names(workdir, config, data.tasks)
  return Tracker(workdir, config, start_step=step, num_steps=config.train.num_steps, active=jax.process_index() == 0)


def _first_state(program: Program, member: Member, checkpointer: checkpoint.Checkpointer,
                 began: float) -> tuple[TrainState, Past]:
  """Resume, else restore, else import, else scratch; returns the state, and what the run has behind it."""
  setup, config = program.setup, member.config
  resumed = checkpointer.restore(setup.state_shapes)
  if resumed:
    state, meta = resumed
    resume.check_resume(meta["config"], config, checkpointer.workdir)
    logging.info("Going on from the checkpoint of step %d.", int(state.step))
    past = Past(meta["train_loss"], best_lib.Best(**meta.get("best", {})), meta.get("started", began), began,
                meta.get("seconds", {}))
    return state, past
  cfg, past, key = config.checkpoint, Past(None, best_lib.Best(), began, began, {}), jax.random.key(config.seed)
  of_model = lora.without(setup.state_shapes.params)
  if cfg.restore_from:
    params = checkpoint.restore_params(cfg.restore_from, of_model)
  elif cfg.import_from:
    params = convert.import_params(cfg.import_from, setup.model, of_model)
  elif cfg.finetune_from:
    shardings = lora.without(setup.state_shardings.params)
    model = with_numbers(setup, member.numbers).model
    fresh = _compiled_init(setup, lambda key: nn.unbox(init_params(model, key)), shardings)(key)
    params = finetune.first_params(config, setup.mesh, fresh)
  else:
    return program.fresh(key, {name: np.float32(value) for name, value in member.numbers.items()}), past
  return program.start(params, key), past


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, in lmjax's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(config_lib.cache_dir() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _write_names(workdir: epath.Path, config: Config, tasks: Any) -> None:
  """Writes what whoever reads the workdir is to know of labels and chats."""
  workdir_lib.write_labels(workdir, {task.name: task.labels for task in tasks if task.labels})
  if config.objective.name == "chat":
    workdir_lib.write_whole(workdir / chat.TEMPLATE_FILE, chat.chat_template(config.data.tokenizer))


def _announce(setup: Setup, data: Any, workdir: epath.Path) -> None:
  config, params = setup.config, lora.without(setup.state_shapes.params)
  ways = " ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items() if size > 1)
  logging.info(
      "%s parameters (%s without embeddings), %s steps of %s tokens = %.2f epochs of %s tokens, on %d %s%s, to %s",
      f"{metrics.count_params(params):,}", f"{metrics.count_non_embedding(params):,}", f"{config.train.num_steps:,}",
      f"{config.train.batch_size * config.data.seq_len:,}",
      config.train.num_steps * config.train.batch_size / data.train.num_examples, f"{data.train.num_tokens:,}",
      setup.mesh.size, jax.devices()[0].device_kind, f" ({ways})" if ways else "", workdir)
  if setup.frozen is not None:
    learned, _ = split(setup.state_shapes.params, setup.frozen)
    logging.info("%s parameters learn.", f"{metrics.count_params(learned):,}")
