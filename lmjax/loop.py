"""The loop over steps, of one run or of several that train together, and what each run keeps of it in its workdir."""

import dataclasses
from types import MappingProxyType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from absl import logging
import jax
import numpy as np

from lmjax import checkpoint, evaluate, metrics, objectives, partitioning, watch
from lmjax.checkpoint import best as best_lib
from lmjax.config import Config
from lmjax.config_checks import Refused
from lmjax.interrupt import Interrupt
from lmjax.optim import lora
from lmjax.optim.gates import join
from lmjax.optim.schedules import make_schedule
from lmjax.peers import Peers
from lmjax.tracking import Tracker

Report = Callable[[int, dict[str, float]], bool]


class Past(NamedTuple):
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


class Run:
  """One run within the loop: what it logs, evaluates, saves and comes to.

  Attributes:
    outcome: what result.json holds, or the error that has ended it; None while it goes on.
  """

  def __init__(self, setup: Any, data: Any, evaluator: evaluate.Evaluator, tracker: Tracker,
               checkpointer: checkpoint.Checkpointer, past: Past, clock: metrics.Clock, others: Peers,
               report: Report | None = None, numbers: Mapping[str, float] = MappingProxyType({}),
               num_together: int = 1):
    """Makes one.

    Args:
      report: as `train_and_evaluate` takes it.
      numbers: settings that the compiled step is given.
      num_together: of the runs that the clock is of.
    """
    self.report, self.pruned, self.outcome, self.num_together = report, False, None, num_together
    self.setup, self.data, self.tracker, self.checkpointer = setup, data, tracker, checkpointer
    self.past, self.clock, self.others, self.evaluator, self.numbers = past, clock, others, evaluator, numbers
    self.config = setup.config
    self.flops_per_token = objectives.flops_per_token(self.config)
    self.tokens_per_step = self.config.train.batch_size * self.config.data.seq_len
    self.schedule = make_schedule(self.config.optim, self.config.train.num_steps)
    self.loss, self.best = past.loss, past.best
    checkpointer.keep(past.best.step)

  @property
  def is_over(self) -> bool:
    """Has it stopped getting better?"""
    return self.best.is_over(self.config.eval)

  def batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches from step `first` on."""
    return train_batches(self.config, self.data, self.setup.mesh, first)

  def hparams(self, step: int) -> dict[str, np.ndarray]:
    """Returns what the compiled step is given."""
    optim = self.config.optim
    return {"learning_rate": np.float32(self.schedule(step)), "weight_decay": np.float32(optim.weight_decay),
            "seed": np.uint32(self.config.seed), **{name: np.float32(x) for name, x in self.numbers.items()}}

  def read(self, step: int, values: dict[str, float]) -> None:
    """Applies the policies to what a step saw, and logs it when it is due."""
    self.loss = values["loss"]
    self._apply_policies(step, values)
    rate = self.clock.rates()
    if self.logs(step):
      self.others.say(**self.clock.of_step())
      self.tracker.write(step, {
          **values, "learning_rate": self.schedule(step - 1), "num_tokens": step * self.tokens_per_step,
          "train_flops": step * self.tokens_per_step * self.flops_per_token, **rate, **self.others.slowest(step),
          **self.clock.shares(self.past.started)[0]})
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

  def logs(self, step: int) -> bool:
    """Are the metrics of a step written?"""
    return step % self.config.train.log_every_steps == 0 or step == self.config.train.num_steps

  def due(self, step: int) -> bool:
    """Is there something to evaluate or to save after a step?"""
    every = self.config.eval.every_steps
    return bool(every and step % every == 0) or self.checkpointer.should_save(step)

  def evaluate_and_save(self, step: int, state: Any) -> None:
    """Does what is due."""
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
        self.save(step, state)

  def save(self, step: int, state: Any) -> None:
    """Saves a checkpoint, in the background where the config says so."""
    meta = {"config": dataclasses.asdict(self.config), "train_loss": self.loss, "versions": metrics.versions(),
            "best": dataclasses.asdict(self.best), "started": self.past.started, "seconds": dict(self.clock.seconds)}
    self.checkpointer.keep(self.best.step)
    self.checkpointer.save(step, state, meta)
    if self.best.step == step:
      self.checkpointer.wait()
      if jax.process_index() == 0:
        best_lib.write(self.checkpointer.workdir, self.best)

  def prune(self, step: int) -> None:
    """Ends the run where others are ahead of it."""
    self.outcome = self._result("pruned", step)

  def interrupt(self, step: int) -> None:
    """Ends the run, whose step has been saved, to be gone on with."""
    logging.warning("Interrupted after step %d, which is saved; the same command goes on from there.", step)
    self.outcome = self._result("interrupted", step)

  def finish(self, step: int, state: Any) -> None:
    """Ends the run, whose step has been saved, with its last evaluation."""
    if self.is_over:
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
    self.outcome = self._result("finished", step, eval_loss=values.get(f"{first}/loss"),
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
    an earlier part of it may have had other hardware; of runs that train together, each has its own share. Seconds are
    those of the clock on the wall, which `num_together` runs share.
    """
    shapes, tokens = lora.without(self.setup.state_shapes.params), step * self.tokens_per_step
    rate, (spent, goodput) = self.clock.overall(), self.clock.shares(self.past.started)
    result = {
        "status": status, "step": step, "num_params": metrics.count_params(shapes),
        "num_params_non_embedding": metrics.count_non_embedding(shapes),
        "num_params_active": metrics.count_active(shapes, self.setup.config.model), "num_tokens": tokens,
        "train_flops": tokens * self.flops_per_token, "train_loss": self.loss, "eval_loss": eval_loss,
        "bits_per_byte": bits_per_byte, "tokens_per_second": rate.get("tokens_per_second"), "mfu": rate.get("mfu"),
        "goodput": goodput, **spent, "num_together": self.num_together,
        "params_sha256": params_sha256, "best_step": self.best.step, "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(), "versions": metrics.versions()}
    self.tracker.write_result(result)
    return result


class Loop:
  """The loop over steps. The host reads a step's metrics only after it has dispatched the next one."""

  def __init__(self, program: Any, runs: Sequence[Run], others: Peers, profile: tuple[int, int] | None):
    """Args: `program`: a `train.Program`; `runs`: with one clock, and at the same step; others: see `train`."""
    self.program, self.runs, self.others, self.clock = program, runs, others, runs[0].clock
    self.train = runs[0].config.train
    self.trace = watch.Trace(runs[0].checkpointer.workdir, profile)

  def run(self, state: Any, first: int) -> None:
    """Goes from a state after `first` steps to the end; each run then has its outcome."""
    step, last, pending, interrupted = first, self.train.num_steps, None, False
    batches = {run.config.seed: run.batches(first) for run in self.runs}
    watchdog = watch.Watchdog(self.clock, self.train.watchdog_seconds, self.others)
    self._end_before_others(step, state)
    with Interrupt() as interrupt, self.trace, watch.Recompilations() as recompilations, watchdog:
      while step < last and not interrupted and not all(run.is_over for run in self._live()):
        step += 1
        self.trace.before(step)
        with self.clock.waiting_for_data():
          read = {seed: next(found) for seed, found in batches.items()}
          batch = self.program.place([read[run.config.seed] for run in self.runs])
        self.others.say(step=step)
        with recompilations.expected(step == first + 1, step):
          state, out = self.program.step(state, batch, [run.hparams(step - 1) for run in self.runs])
        if pending:
          self._read(*pending)
        pending = (step, out)
        if any(run.due(step) for run in self._live()):
          self._read(*pending)
          pending = None
          self._evaluate_and_save(step, state)
        interrupted = interrupt.stops_after(step)
      if pending:
        self._read(*pending)
    self._end(step, state, self._live(), interrupted and step < last)

  def _live(self) -> list[Run]:
    return [run for run in self.runs if run.outcome is None]

  def _read(self, step: int, out: dict[str, jax.Array]) -> None:
    """Waits for a step, and lets each run see what it made."""
    with self.clock.waiting_for_devices():
      made = self.program.read(out)
    self.clock.tick()
    for run, values in zip(self.runs, made):
      if run.outcome is None:
        try:
          run.read(step, values)
        except Refused as e:  # The others go on.
          run.outcome = e
    if self.runs[0].logs(step):
      self.clock.restart()

  def _evaluate_and_save(self, step: int, state: Any) -> None:
    for run in self._live():
      part = self.program.part(state, self.runs.index(run))
      run.evaluate_and_save(step, part)
      if run.pruned:
        run.prune(step)
    self._end_before_others(step, state)

  def _end_before_others(self, step: int, state: Any) -> None:
    """Ends those runs that get no better, unless all are at their end, which the loop leaves first."""
    over = [run for run in self._live() if run.is_over]
    if len(over) < len(self._live()):
      self._end(step, state, over)

  def _end(self, step: int, state: Any, runs: Sequence[Run], interrupted: bool = False) -> None:
    with self.clock.paused("saving"):
      for run in runs:
        run.save(step, self.program.part(state, self.runs.index(run)))
      for run in runs:  # The evaluations may be long; a restart from here does only those again.
        run.checkpointer.wait()
    for run in runs:
      run.interrupt(step) if interrupted else run.finish(step, self.program.part(state, self.runs.index(run)))


def train_batches(config: Config, data: Any, mesh: jax.sharding.Mesh, first: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches, the part of them that this process reads, from step `first` on."""
  from lmjax.data import pipeline  # Imports grain, which a caller with batches of its own does without.
  make_example = objectives.host_function(objectives.recipe_of(config, data, data.train, True))
  rows = partitioning.process_rows(mesh, config.train.batch_size)
  return pipeline.train_batches(data, config, start_step=first, make_example=make_example, rows=rows)


def eval_params(setup: Any, state: Any) -> Any:
  """Returns the model's parameters to evaluate: averages where there are some and they are wanted, adapters merged."""
  averaged = state.ema is not None and setup.config.eval.use_ema
  return lora.merge(join(state.ema, state.params) if averaged else state.params, setup.config.optim)
