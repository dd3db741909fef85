"""The host never waits for the device in the loop: it reads a step's metrics only after it has dispatched the next.

The compiled step is replaced by one whose results note when they are read.
"""

import pathlib
import types

import jax
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import train
from lmjax.checkpoint.best import Best
from lmjax.loop import Loop, Past, Run
from lmjax.metrics import Clock
from lmjax.peers import Peers

NUM_STEPS = 5


class Unread:
  """A result on the device; turning it into anything on the host is noted."""

  def __init__(self, events, what, value=1.0):
    self._events, self._what, self._value = events, what, value

  def _read(self):
    self._events.append(("read", self._what))
    return self._value

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self._read(), dtype)

  def __float__(self):
    return float(self._read())

  def __int__(self):
    return int(self._read())

  def __bool__(self):
    return bool(self._read())

  def block_until_ready(self):
    self._read()
    return self


class Checkpointer:
  """Saves at one step, and notes it."""

  def __init__(self, events, step):
    self._events, self._step, self.workdir = events, step, pathlib.Path("run")

  def should_save(self, step):
    return step == self._step

  def keep(self, step):
    assert step is None

  def save(self, step, state, meta):
    if step < NUM_STEPS:  # The last step's is that of the end.
      self._events.append(("save", step))

  def wait(self):
    pass


class Tracker:
  """Keeps what is written to it."""

  def __init__(self):
    self.losses = {}

  def write(self, step, values):
    self.losses[step] = values["loss"]

  def progress(self, step, values):
    pass


class Program:
  """Has a step whose results note when they are read."""

  def __init__(self, events):
    self._events, self._counter = events, iter(range(1, NUM_STEPS + 1))

  def place(self, batches):
    return batches[0]

  def step(self, state, batch, hparams):
    number = next(self._counter)
    self._events.append(("dispatch", number))
    return (types.SimpleNamespace(step=Unread(self._events, "state")),
            {"loss": Unread(self._events, number, 10.0 + number), "grad_norm": 1.0, "nonfinite": 0.0})

  def read(self, out):
    return train.Program.read(self, out)

  def part(self, state, number):
    return state


@pytest.fixture
def loop(monkeypatch):
  """Returns a function from (step to save at) to (what the loop did in order, the losses written by step)."""
  def run(save_at=None):
    events, tracker = [], Tracker()
    base = config_lib.base_config()
    base.train.update(num_steps=NUM_STEPS, log_every_steps=1, batch_size=2)
    config = config_lib.resolve_durations(
        config_lib.resolve_model(config_lib.from_config_dict(base), 256), tokens_per_epoch=10 ** 6)
    setup = types.SimpleNamespace(config=config, model=None, objective=None, mesh=None)
    monkeypatch.setattr(Run, "batches", lambda self, first: iter([{}] * NUM_STEPS))
    monkeypatch.setattr(Run, "finish", lambda self, step, state: None)
    checkpointer, past = Checkpointer(events, save_at), Past(None, Best(), 0.0, 0.0, {})
    one = Run(setup, None, None, tracker, checkpointer, past, Clock(1, 1.0, None), Peers())
    Loop(Program(events), [one], one.others, None).run(None, 0)
    return events, tracker.losses
  return run


def test_a_step_is_read_only_after_the_next_is_dispatched(loop):
  events, losses = loop()
  assert events == [
      ("dispatch", 1), ("dispatch", 2), ("read", 1), ("dispatch", 3), ("read", 2), ("dispatch", 4), ("read", 3),
      ("dispatch", 5), ("read", 4), ("read", 5)]
  assert losses == {step: 10.0 + step for step in range(1, NUM_STEPS + 1)}


def test_only_a_step_that_is_saved_is_read_at_once(loop):
  events, _ = loop(save_at=3)
  assert events == [
      ("dispatch", 1), ("dispatch", 2), ("read", 1), ("dispatch", 3), ("read", 2), ("read", 3), ("save", 3),
      ("dispatch", 4), ("dispatch", 5), ("read", 4), ("read", 5)]


def test_reading_a_result_would_be_seen():
  events = []
  jax.device_get({"loss": Unread(events, 1)})
  float(Unread(events, 2))
  jax.block_until_ready(Unread(events, 3))
  assert events == [("read", 1), ("read", 2), ("read", 3)]
