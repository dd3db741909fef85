"""Runs that differ in numbers only, trained together by one compiled program, or one after another by one.

The states of the runs are stacked on a leading axis, which lies on the mesh axes that would else split the batch; each
run, a member, sees the whole of its batch. The compiled step is `jax.vmap` of the step of one run. On a CPU a device
takes its members in turn within the program: products of matrices with a leading axis are slow there, and the states
of all members together leave no room in its caches.

What the members have of their own are inputs of the program: learning rate, weight decay, seed, and the settings that
`train.with_numbers` replaces. Evaluation, saving and all else is each member's, as if it were alone.
"""

import contextlib
import gc
import time
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from lmjax import checkpoint, memory, partitioning, train
from lmjax import workdir as workdir_lib
from lmjax.config import Config
from lmjax.loop import Report, train_batches
from lmjax.peers import Peers, only_run


class Trial(NamedTuple):
  """A run that is to be trained, alone or with others.

  Attributes:
    config: as `config.from_config_dict` returns it.
    workdir: folder of the run.
    report: as `train.train_and_evaluate` takes it.
    numbers: settings that the compiled step is to be given, by name; the same names in all that train together.
  """
  config: Config
  workdir: str
  report: Report | None
  numbers: Mapping[str, float]


class Stack(train.Program):
  """A program that trains several runs at once.

  Attributes:
    size: how many there is room for; fewer are filled up with copies.
  """

  def __init__(self, config: Config, data: Any, numbers: Sequence[str], count: int, shared: bool):
    """Compiles the step.

    Args:
      config: of the first run, with sizes and durations resolved.
      data: that all read.
      numbers: names of the settings that the step is given.
      count: of the runs; as many are taken at once as fit the devices' memory.
      shared: whether all read the same batches, which are then not copied.
    """
    super().__init__(config, data)
    mesh, shapes = self.setup.mesh, self.setup.state_shapes
    self._shared, self._ways = shared, int(np.prod([mesh.shape[axis] for axis in partitioning.MEMBERS]))
    self._of_states = jax.tree.map(partitioning.members_sharding, self.setup.state_shardings)
    self._of_members = partitioning.members_sharding(partitioning.replicated(mesh))
    with partitioning.each_member():
      of_batch = partitioning.batch_sharding(mesh)
    self._of_batch = of_batch if shared else partitioning.members_sharding(of_batch)
    example = next(train_batches(config, data, mesh, 0))
    names = {"learning_rate": np.float32, "weight_decay": np.float32, "seed": np.uint32,
             **dict.fromkeys(numbers, np.float32)}
    self.size = self._rounded(min(count, memory.num_that_fit(shapes) * self._ways))
    with partitioning.use_mesh(mesh):
      while (compiled := self._compile(example, names)) is None:
        self.size = self._rounded(self.size // 2)
      self._compiled, self._fills_memory = compiled, self.size < count
      self._put = jax.jit(_put, out_shardings=self._of_states, donate_argnums=0)
      self._take = jax.jit(_take, out_shardings=self.setup.state_shardings)
    logging.info("%d runs train together, %d at a time, by one program.", count, self.size)

  def suits(self, count: int) -> bool:
    has_room = self.size >= count or self._fills_memory
    return count > 1 and has_room and self.size < 2 * max(count, self._ways)

  def _rounded(self, size: int) -> int:
    return max(1, -(-size // self._ways)) * self._ways

  def _compile(self, example: dict[str, np.ndarray], names: Mapping[str, Any]) -> Any | None:
    """Returns the compiled step of `size` runs, or None where it does not fit the memory and half as many may."""
    stacked = lambda x: jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype)
    batch = example if self._shared else {name: stacked(x) for name, x in example.items()}
    hparams = {name: jax.ShapeDtypeStruct((self.size,), kind) for name, kind in names.items()}
    step = jax.jit(self._update, donate_argnums=0, in_shardings=(self._of_states, self._of_batch, self._of_members),
                   out_shardings=(self._of_states, self._of_members))
    lowered = step.lower(jax.tree.map(stacked, self.setup.state_shapes), batch, hparams)
    least = self.size == self._ways
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if least or "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return None
    # The state of a run is taken out of the stack to be evaluated and saved.
    return compiled if least or memory.program_fits(compiled, self.setup.state_shapes) else None

  def _update(self, states: Any, batch: Any, hparams: Any) -> Any:
    def one(state, batch, hparams):
      with partitioning.each_member():
        return self.update(state, batch, hparams)
    together = jax.vmap(one, in_axes=(0, None if self._shared else 0, 0), spmd_axis_name=partitioning.MEMBERS)
    if partitioning.platform() != "cpu":
      return together(states, batch, hparams)
    # On every device the first of its members, then the second, and so on.
    turns, ways = self.size // self._ways, self._ways
    split = lambda x: x.reshape(ways, turns, *x.shape[1:]).swapaxes(0, 1) if ways > 1 else x
    merge = lambda x: x.swapaxes(0, 1).reshape(self.size, *x.shape[2:]) if ways > 1 else x
    own_batches = () if self._shared else (batch,)
    each = together if ways > 1 else one
    # The barriers keep the compiler from mixing a step with what reads and writes the stack: it rounds as one alone.
    alone = jax.lax.optimization_barrier

    def turn(member):
      state, hparams, *own = alone((*member, *(() if own_batches else (batch,))))
      return alone(each(state, *own, hparams))

    return jax.tree.map(merge, jax.lax.map(turn, jax.tree.map(split, (states, hparams, *own_batches))))

  def step(self, state: Any, batch: Any, hparams: list[dict]) -> tuple[Any, dict[str, jax.Array]]:
    stacked = {name: self._stacked([one[name] for one in hparams]) for name in hparams[0]}
    return self._compiled(state, batch, jax.device_put(stacked, self._of_members))

  def place(self, batches: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    of_all = batches[0] if self._shared else {
        name: self._stacked([one[name] for one in batches]) for name in batches[0]}
    return jax.device_put(of_all, self._of_batch)

  def read(self, out: dict[str, jax.Array]) -> list[dict[str, float]]:
    values = jax.device_get(out)
    return [{name: float(of_all[number]) for name, of_all in values.items()} for number in range(self.size)]

  def join(self, states: Iterator[Any]) -> Any:
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros((self.size, *x.shape), x.dtype), self.setup.state_shapes)
    stacked, number = jax.jit(zeros, out_shardings=self._of_states)(), 0
    for state in states:
      stacked, number = self._put(stacked, state, np.int32(number)), number + 1
    for place in range(number, self.size):
      stacked = self._put(stacked, state, np.int32(place))
    return stacked

  def part(self, state: Any, number: int) -> Any:
    return self._take(state, np.int32(number))

  def _stacked(self, values: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([*values, *[values[-1]] * (self.size - len(values))])


# Written so that no device needs what is another's but for the sum.
def _put(states: Any, one: Any, number: jax.Array) -> Any:
  return jax.tree.map(lambda x, new: jnp.where(_is_at(x, number), new, x), states, one)


def _take(states: Any, number: jax.Array) -> Any:
  return jax.tree.map(lambda x: jnp.sum(jnp.where(_is_at(x, number), x, 0), axis=0, dtype=x.dtype), states)


def _is_at(x: jax.Array, number: jax.Array) -> jax.Array:
  return (jnp.arange(x.shape[0]) == number).reshape(-1, *[1] * (x.ndim - 1))


class Trainer:
  """Trains trials, and keeps data and what is compiled for those that come next."""

  def __init__(self):
    self._key, self._data, self._programs = None, None, []

  def __call__(self, trials: Sequence[Trial], key: str) -> list[dict[str, Any] | Exception]:
    """Trains trials together, each from where its workdir stands, to its end.

    Those that stand at different steps, or are too many for the memory, train one group after another.

    Args:
      trials: that differ in numbers only.
      key: of what they have in common: where it is that of the call before, nothing is compiled again.

    Returns:
      For each what result.json holds, or the error that has ended it alone; of those that had not begun when others
      were interrupted, that status alone.

    Raises:
      UserError, Refused: where something is wrong with all of them.
    """
    began = time.time()
    configs = [train.prepare(trial.config) for trial in trials]
    with contextlib.ExitStack() as stack:
      others = stack.enter_context(Peers())
      for trial in trials:
        stack.enter_context(only_run(trial.workdir))
      stack.enter_context(workdir_lib.write_errors(trials[0].workdir))
      for trial, config in zip(trials, configs):
        train.check_before_data(epath.Path(trial.workdir), config)
      if key != self._key:
        self._forget()
        self._key, self._data = key, train.open_data(configs[0], trials[0].workdir)
      members = [train.Member(train.resolved(config, self._data), epath.Path(trial.workdir), trial.report,
                              trial.numbers) for trial, config in zip(trials, configs)]
      outcomes, by_step = {}, {}
      for number, member in enumerate(members):
        by_step.setdefault(checkpoint.latest_step(member.workdir), []).append(number)
      for numbers in by_step.values():
        program = self._program([members[number] for number in numbers])
        for chunk in _chunks(numbers, program.size):
          made = train.run_together(program, [members[number] for number in chunk], others, began)
          outcomes |= dict(zip(chunk, made))
          began = time.time()
          if any(map(_is_interrupted, made)):
            return [outcomes.get(number, {"status": "interrupted"}) for number in range(len(members))]
    return [outcomes[number] for number in range(len(members))]

  def _program(self, members: Sequence[train.Member]) -> train.Program:
    """Returns a program for some runs: one that is there, unless most of its room would be left, or more would fit."""
    config, count, names = members[0].config, len(members), tuple(members[0].numbers)
    shared = len({member.config.seed for member in members}) == 1
    for program, of in self._programs:
      if program.suits(count) and (of == shared or count == 1):
        return program
    program = train.Program(config, self._data) if count == 1 else Stack(config, self._data, names, count, shared)
    self._programs.append((program, shared))
    return program

  def _forget(self) -> None:
    self._programs = []
    jax.clear_caches()  # Else the programs of all trials stay in memory.
    gc.collect()


def _is_interrupted(outcome: dict[str, Any] | Exception) -> bool:
  return not isinstance(outcome, Exception) and outcome["status"] == "interrupted"


def _chunks(numbers: Sequence[int], most: int) -> list[Sequence[int]]:
  """Returns as few and as even parts as there can be of at most so many."""
  count = -(-len(numbers) // most)
  return [numbers[i * len(numbers) // count:(i + 1) * len(numbers) // count] for i in range(count)]
