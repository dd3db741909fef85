"""Training: the state, the compiled step, and the loop around it.

The path from a config to a gradient: `train_and_evaluate` opens the data and the mesh, `build` makes the model and the
optimizer, `init_state` makes sharded parameters, and `make_train_step` compiles one update.
"""

import contextlib
import dataclasses
import functools
import time
from typing import Any, Callable, Iterator, NamedTuple

from absl import logging
from etils import epath
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax import checkpoint, convert, evaluate, finetune, memory, metrics, objectives, partitioning, resume, watch
from lmjax import config as config_lib
from lmjax import workdir as workdir_lib
from lmjax.checkpoint import best as best_lib
from lmjax.config import Config, UserError
from lmjax.config_checks import Refused, check_objective
from lmjax.data import chat
from lmjax.interrupt import Interrupt
from lmjax.models.transformer import init_params, make_model
from lmjax.optim import lora, offload
from lmjax.optim.gates import Gates, join, make_gates, split
from lmjax.optim.optimizer import Optimizer, make_optimizer, mean_and_clip
from lmjax.optim.schedules import make_schedule
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
        if config.train.ema_decay or averages else None,
        spike=jnp.zeros(3, jnp.float32) if config.train.on_spike != "ignore" else None)

  shapes = jax.eval_shape(start, nn.unbox(of_model), jax.random.key(0))
  of_params = partitioning.param_shardings(mesh, boxed)
  shardings = partitioning.like_params(mesh, shapes, shapes.params, of_params)
  if config.optim.offload:
    shardings = shardings.replace(opt_state=offload.on_host(shapes.opt_state, shardings.opt_state))
  shapes = partitioning.laid_out(shapes, shardings)
  return Setup(config, mesh, model, objectives.OBJECTIVES[config.objective.name], optimizer, gates, start,
               shapes)


def init_state(setup: Setup) -> TrainState:
  """Makes the initial state on its devices; the values do not depend on the mesh."""
  return _initial(setup, lambda key: setup.start(nn.unbox(init_params(setup.model, key)), key), setup.state_shardings)


def _initial(setup: Setup, init: Callable[[jax.Array], Any], shardings: Any) -> Any:
  with partitioning.use_mesh(setup.mesh):
    # Optimised for a CPU, the inverse error function behind normal numbers rounds by the shape of a device's part.
    options = {"xla_backend_optimization_level": 0} if partitioning.platform() == "cpu" else None
    init = jax.jit(init, out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(setup.config.seed))


def make_train_step(setup: Setup) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the compiled update: (state, batch, hparams) -> (state, metrics).

  `batch` holds arrays [B, T]. `hparams` holds scalars: `learning_rate`, `weight_decay` and `seed`, inputs of the
  compiled program. `metrics` holds scalars: the means `loss`, `accuracy`, `z_loss` over the batch's weights,
  `grad_norm` before clipping, and `applied`, 0 where the update was dropped because the loss or the gradient was not
  finite (`nonfinite` is 1) or the loss a spike (`spike` is 1). With train.gradient_noise it has `square_small` and
  `square_big` too, squared norms of the mean gradient of a microbatch, averaged over these, and of the whole batch.
  """
  batch = partitioning.batch_sharding(setup.mesh)
  one = partitioning.replicated(setup.mesh)
  return jax.jit(functools.partial(_train_step, setup), donate_argnums=0,
                 in_shardings=(setup.state_shardings, batch, one), out_shardings=(setup.state_shardings, one))


def _train_step(setup: Setup, state: TrainState, batch: dict[str, jax.Array], hparams: dict[str, jax.Array]):
  cfg = setup.config
  batch = objectives.balance(setup.objective, batch, cfg.objective)
  key = jax.random.fold_in(jax.random.key(hparams["seed"]), state.step)

  learned, rest = split(state.params, setup.frozen)

  def loss_fn(learned, microbatch, index):
    params = lora.merge(join(learned, rest), cfg.optim)
    rngs = {"dropout": jax.random.fold_in(key, index)} if cfg.model.dropout else None
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


def train_and_evaluate(config: Config, workdir: str, profile: tuple[int, int] | None = None,
                       report: Callable[[int, dict[str, float]], bool] | None = None) -> dict[str, Any]:
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
  config = finetune.take_model(config)
  check_objective(config)
  if config.train.compilation_cache:
    enable_compilation_cache()
  partitioning.join_processes()
  with Peers() as others, only_run(workdir), workdir_lib.write_errors(workdir):
    return _run(config, epath.Path(workdir), profile, others, report)


def _run(config: Config, workdir: epath.Path, profile: tuple[int, int] | None, others: Peers,
         report: Callable[[int, dict[str, float]], bool] | None) -> dict[str, Any]:
  from lmjax.data import pipeline  # Imports grain, which a caller with batches of its own does without.
  began = time.time()
  mesh = partitioning.make_mesh(config.mesh)
  goes_on = checkpoint.latest_step(workdir) is not None
  if goes_on:
    resume.check_before_data(workdir, config)
  labels = workdir_lib.read_labels(workdir) if goes_on else {}
  data = pipeline.open_data(config, *objectives.text_needs(config), labels=labels)
  config = finetune.grow_vocabulary(objectives.with_heads(config, data.tasks), data.tokenizer.size)
  config = config_lib.resolve_durations(
      config_lib.resolve_model(config, data.tokenizer.size), data.train.num_examples * config.data.seq_len)
  if goes_on:
    resume.check_workdir(workdir, config, data.tokenizer)
  setup = build(config, mesh)
  memory.check_fits(setup.state_shapes)
  with partitioning.use_mesh(mesh), contextlib.closing(
      checkpoint.Checkpointer(workdir, config.checkpoint)) as checkpointer:
    state, past = _first_state(setup, checkpointer, began)
    best = past.best
    first_step = int(state.step)
    if first_step > config.train.num_steps:
      raise UserError(f"{workdir} is already at step {first_step}, beyond the {config.train.num_steps} of this run; "
                      "give it another --workdir, or a config.train.num_steps of at least that.")
    over = first_step == config.train.num_steps or best.is_over(config.eval)
    if over and (finished := resume.finished_result(workdir)):
      logging.info("%s is already finished.", workdir)
      return finished
    _announce(setup, data, workdir)
    if jax.process_index() == 0:
      (workdir / "result.json").unlink(missing_ok=True)  # Of a part of the run that ended before.
      workdir_lib.write_whole(workdir / "config.json", config_lib.to_json(config))
      data.tokenizer.save(workdir / "tokenizer.json")
      _write_names(workdir, config, data.tasks)
    with Tracker(workdir, config, start_step=first_step, num_steps=config.train.num_steps,
                 active=jax.process_index() == 0) as tracker:
      return _Loop(setup, data, tracker, checkpointer, past, profile, others, report).run(state)


class _Loop:
  """The loop over steps. The host reads a step's metrics only after it has dispatched the next one."""

  def __init__(self, setup: Setup, data: Any, tracker: Tracker, checkpointer: checkpoint.Checkpointer, past: "_Past",
               profile: tuple[int, int] | None, others: Peers, report: Callable[..., bool] | None):
    self.report, self.pruned = report, False
    self.setup, self.data, self.tracker, self.checkpointer = setup, data, tracker, checkpointer
    self.past, self.others, self.trace = past, others, watch.Trace(checkpointer.workdir, profile)
    self.config = setup.config
    self.evaluator = evaluate.Evaluator(setup.model, setup.objective, setup.config, setup.mesh, data)
    self.flops_per_token = objectives.flops_per_token(self.config)
    self.tokens_per_step = self.config.train.batch_size * self.config.data.seq_len
    self.clock = metrics.Clock(self.tokens_per_step, self.flops_per_token, metrics.peak_flops(jax.devices()),
                               time.time() - past.began, past.seconds)
    self.schedule = make_schedule(self.config.optim, self.config.train.num_steps)
    self.loss, self.best = past.loss, past.best
    checkpointer.keep(past.best.step)

  def run(self, state: TrainState) -> dict[str, Any]:
    step = first = int(state.step)
    last = self.config.train.num_steps
    batches = self._batches(first)
    train_step, pending = make_train_step(self.setup), None
    interrupted = False
    watchdog = watch.Watchdog(self.clock, self.config.train.watchdog_seconds, self.others)
    with Interrupt() as interrupt, self.trace, watch.Recompilations() as recompilations, watchdog:
      for step in range(first + 1, first + 1 if self.best.is_over(self.config.eval) else last + 1):
        self.trace.before(step)
        with self.clock.waiting_for_data():
          batch = next(batches)
        self.others.say(step=step)
        with recompilations.expected(step == first + 1, step):
          state, out = train_step(state, batch, self._hparams(step - 1))
        if pending:
          self._read(*pending)
        pending = (step, out)
        if self._due(step):
          self._read(*pending)
          pending = None
          self._evaluate_and_save(step, state)
        if (interrupted := interrupt.stops_after(step)) or self.best.is_over(self.config.eval) or self.pruned:
          break
      if pending:
        self._read(*pending)
      if self.pruned:
        return self._result("pruned", step)
      if interrupted and step < last:
        return self._interrupted(step, state)
    return self._finish(step, state)

  def _batches(self, first: int) -> Iterator[dict[str, jax.Array]]:
    from lmjax.data import pipeline
    mesh, size = self.setup.mesh, self.config.train.batch_size
    make_example = objectives.host_function(objectives.recipe_of(self.config, self.data, self.data.train, True))
    batches = pipeline.train_batches(self.data, self.config, start_step=first, make_example=make_example,
                                     rows=partitioning.process_rows(mesh, size))
    return (partitioning.global_batch(mesh, batch, size) for batch in batches)

  def _hparams(self, step: int) -> dict[str, np.ndarray]:
    optim = self.config.optim
    return {"learning_rate": np.float32(self.schedule(step)), "weight_decay": np.float32(optim.weight_decay),
            "seed": np.uint32(self.config.seed)}

  def _read(self, step: int, out: dict[str, jax.Array]) -> None:
    """Waits for a step, applies the policies to what it saw, and logs it when it is due."""
    with self.clock.waiting_for_devices():
      values = {name: float(value) for name, value in jax.device_get(out).items()}
    self.clock.tick()
    self.loss = values["loss"]
    self._apply_policies(step, values)
    rate = self.clock.rates()
    if step % self.config.train.log_every_steps == 0 or step == self.config.train.num_steps:
      self.others.say(**self.clock.of_step())
      self.tracker.write(step, {
          **values, "learning_rate": self.schedule(step - 1), "num_tokens": step * self.tokens_per_step,
          "train_flops": step * self.tokens_per_step * self.flops_per_token, **rate, **self.others.slowest(step),
          **self.clock.shares(self.past.started)[0]})
      self.clock.restart()
    self.tracker.progress(step, {"loss": self.loss, **rate})

  def _apply_policies(self, step: int, values: dict[str, float]) -> None:
    train = self.config.train
    seen = {"nonfinite": ("is not finite", "on_nonfinite", train.on_nonfinite),
            "spike": ("is a spike", "on_spike", train.on_spike)}
    for flag, (what, setting, policy) in seen.items():
      if flag not in values or not values[flag]:
        continue
      logging.warning("The loss at step %d, %s, %s; its update was dropped.", step, values["loss"], what)
      if policy == "stop":
        self._result("stopped", step)
        raise Refused(f"The loss or gradient at step {step} {what} (loss {values['loss']}, gradient norm "
                      f"{values['grad_norm']}); lower config.optim.learning_rate or set config.train.{setting}=skip. "
                      "Checkpoints up to then are kept.")

  def _due(self, step: int) -> bool:
    every = self.config.eval.every_steps
    return bool(every and step % every == 0) or self.checkpointer.should_save(step)

  def _evaluate_and_save(self, step: int, state: TrainState) -> None:
    every = self.config.eval.every_steps
    # Metrics come first: a run that goes on from this checkpoint keeps what was written up to it.
    with self.clock.paused("evaluation"):
      # The last step's evaluation is the final one, over as much as eval.final_num_batches says.
      due, cfg = every and step % every == 0, self.config.eval
      # Whether it is the best must not depend on how long the run is.
      if due and (step < self.config.train.num_steps or cfg.best_metric):
        values = dict(self.evaluator(eval_params(self.setup, state), cfg.num_batches))
        self.tracker.write(step, values)
        if cfg.best_metric:
          self.best = self.best.after(step, values, cfg)
        self.pruned = bool(self.report and self.report(step, values))
    if self.checkpointer.should_save(step) or self.best.step == step:
      with self.clock.paused("saving"):
        self._save(step, state)

  def _save(self, step: int, state: TrainState) -> None:
    meta = {"config": dataclasses.asdict(self.config), "train_loss": self.loss, "versions": metrics.versions(),
            "best": dataclasses.asdict(self.best), "started": self.past.started, "seconds": dict(self.clock.seconds)}
    self.checkpointer.keep(self.best.step)
    self.checkpointer.save(step, state, meta)
    if self.best.step == step:
      self.checkpointer.wait()
      if jax.process_index() == 0:
        best_lib.write(self.checkpointer.workdir, self.best)

  def _interrupted(self, step: int, state: TrainState) -> dict[str, Any]:
    with self.clock.paused("saving"):
      self._save(step, state)
      self.checkpointer.wait()
    logging.warning("Interrupted after step %d, which is saved; the same command goes on from there.", step)
    return self._result("interrupted", step)

  def _finish(self, step: int, state: TrainState) -> dict[str, Any]:
    with self.clock.paused("saving"):
      self._save(step, state)
      self.checkpointer.wait()  # The evaluation may be long; a restart from here does only that again.
    if self.best.is_over(self.config.eval):
      logging.info("Stopped after step %d: %s has not been better than at step %d for %d evaluations.", step,
                   self.config.eval.best_metric, self.best.step, self.best.waited)
    params = eval_params(self.setup, state)
    if self.best.step not in (None, step):
      of_model = lora.without(self.setup.state_shapes.params)
      params = checkpoint.restore_params(self.checkpointer.workdir, of_model, self.best.step,
                                         prefer_ema=self.config.eval.use_ema)
    with self.clock.paused("evaluation"):
      values = dict(self.evaluator(params, self.config.eval.final_num_batches))
    if values:
      self.tracker.write(step, values)
    self._sample(step, params)
    first = next(iter(self.data.eval_sets), None)
    return self._result("finished", step, eval_loss=values.get(f"{first}/loss"),
                        bits_per_byte=values.get(f"{first}/bits_per_byte"),
                        params_sha256=metrics.digest(state.params))

  def _sample(self, step: int, params: Any) -> None:
    train, tokenizer = self.config.train, self.data.tokenizer
    prompt = tokenizer.encode(train.sample_prompt) or [tokenizer.eos_id]
    model = self.setup.config.model
    room = model.max_positions - len(prompt) if model.position == "learned" else train.sample_length
    length = min(train.sample_length, room)
    if length < 1 or jax.process_count() > 1 or (model.architecture, model.head) != ("decoder", "lm"):
      return
    from lmjax.generation import generate
    tokens = generate(self.setup.model, params, [prompt], max_new_tokens=length,
                      temperature=0.8, top_p=0.95, seed=self.config.seed, eos_id=tokenizer.eos_id,
                      vocab_size=tokenizer.size, both_sides=self.config.objective.name == "prefix_lm")
    self.tracker.sample(step, train.sample_prompt, tokenizer.decode(tokens[0]))

  def _result(self, status: str, step: int, eval_loss: float | None = None, bits_per_byte: float | None = None,
              params_sha256: str | None = None) -> dict[str, Any]:
    """Writes result.json.

    What was not measured is null. `tokens_per_second` and `mfu` are of the steps since the run was last started, for
    an earlier part of it may have had other hardware.
    """
    shapes, tokens = lora.without(self.setup.state_shapes.params), step * self.tokens_per_step
    rate, (spent, goodput) = self.clock.overall(), self.clock.shares(self.past.started)
    result = {
        "status": status, "step": step, "num_params": metrics.count_params(shapes),
        "num_params_non_embedding": metrics.count_non_embedding(shapes),
        "num_params_active": metrics.count_active(shapes, self.setup.config.model), "num_tokens": tokens,
        "train_flops": tokens * self.flops_per_token, "train_loss": self.loss, "eval_loss": eval_loss,
        "bits_per_byte": bits_per_byte, "tokens_per_second": rate.get("tokens_per_second"), "mfu": rate.get("mfu"),
        "goodput": goodput, **spent,
        "params_sha256": params_sha256, "best_step": self.best.step, "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(), "versions": metrics.versions()}
    self.tracker.write_result(result)
    return result


def eval_params(setup: Setup, state: TrainState) -> Any:
  """Returns the model's parameters to evaluate: averages where there are some and they are wanted, adapters merged."""
  averaged = state.ema is not None and setup.config.eval.use_ema
  return lora.merge(join(state.ema, state.params) if averaged else state.params, setup.config.optim)


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


class _Past(NamedTuple):
  """What a run has behind it.

  Attributes:
    loss: of the step before; None before the first.
    best: the best checkpoint.
    started: when the run was first started, in seconds since the epoch.
    began: when it was last started.
    seconds: of each of `metrics.Clock.KINDS`, but for what was done again.
  """
  loss: float | None
  best: best_lib.Best
  started: float
  began: float
  seconds: dict[str, float]


def _first_state(setup: Setup, checkpointer: checkpoint.Checkpointer, began: float) -> tuple[TrainState, _Past]:
  """Resume, else restore, else import, else scratch; returns the state, and what the run has behind it."""
  resumed = checkpointer.restore(setup.state_shapes)
  if resumed:
    state, meta = resumed
    resume.check_resume(meta["config"], setup.config, checkpointer.workdir)
    logging.info("Going on from the checkpoint of step %d.", int(state.step))
    past = _Past(meta["train_loss"], best_lib.Best(**meta.get("best", {})), meta.get("started", began), began,
                 meta.get("seconds", {}))
    return state, past
  cfg, past = setup.config.checkpoint, _Past(None, best_lib.Best(), began, began, {})
  of_model = lora.without(setup.state_shapes.params)
  if cfg.restore_from:
    params = checkpoint.restore_params(cfg.restore_from, of_model)
  elif cfg.import_from:
    params = convert.import_params(cfg.import_from, setup.model, of_model)
  elif cfg.finetune_from:
    shardings = lora.without(setup.state_shardings.params)
    fresh = _initial(setup, lambda key: nn.unbox(init_params(setup.model, key)), shardings)
    params = finetune.first_params(setup.config, setup.mesh, fresh)
  else:
    return init_state(setup), past
  start = jax.jit(setup.start, out_shardings=setup.state_shardings, donate_argnums=0)
  return start(params, jax.random.key(setup.config.seed)), past
