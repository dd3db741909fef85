"""Parameters are read while the run trains on, and its newest checkpoint is replaced in between."""

import logging
import shutil

import jax
import jax.numpy as jnp
import pytest

from lmjax import checkpoint
from lmjax.checkpoint import arrays, record
from lmjax.config import CheckpointConfig, UserError

SHAPES = {"w": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


def save(workdir, step):
  run = checkpoint.Checkpointer(workdir, CheckpointConfig(keep_last=10))
  run.save(step, {"params": {"w": jnp.full((64,), step, jnp.float32)}}, {})
  run.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Returns the workdir of a run that has checkpoints of the steps 10, 20 and 30."""
  workdir = tmp_path_factory.mktemp("saved")
  for step in (10, 20, 30):
    save(workdir, step)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """Returns a workdir with the checkpoints of the steps 10 and 20."""
  workdir = tmp_path / "run"
  shutil.copytree(saved, workdir)
  shutil.rmtree(workdir / "checkpoints" / "30")
  return workdir


def before_first_call(monkeypatch, module, name, happens):
  """Lets something happen just before a function is first called."""
  function, happened = getattr(module, name), []

  def call(*args, **kwargs):
    if not happened:
      happened.append(True)
      happens()
    return function(*args, **kwargs)
  monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("module, name", [(record, "agreed_damage"), (arrays, "saved"), (arrays, "read")])
@pytest.mark.parametrize("what_is_left", ["nothing", "a part"])
def test_the_newest_that_is_there_is_taken(workdir, saved, monkeypatch, caplog, module, name, what_is_left):
  def goes_on():
    shutil.copytree(saved / "checkpoints" / "30", workdir / "checkpoints" / "30")
    shutil.rmtree(workdir / "checkpoints" / "20" / ("state" if what_is_left == "a part" else ""))
  before_first_call(monkeypatch, module, name, goes_on)
  with caplog.at_level(logging.WARNING):
    assert checkpoint.restore_params(workdir, SHAPES)["w"].tolist() == [30.0] * 64
  assert not caplog.records


def test_a_step_that_was_asked_for_is_not_replaced(workdir, saved, monkeypatch):
  def goes_on():
    shutil.copytree(saved / "checkpoints" / "30", workdir / "checkpoints" / "30")
    shutil.rmtree(workdir / "checkpoints" / "20")
  before_first_call(monkeypatch, record, "agreed_damage", goes_on)
  with pytest.raises(UserError, match="checkpoint of step 20 .* is damaged"):
    checkpoint.restore_params(workdir, SHAPES, 20)


def test_without_a_newer_one_it_is_damage(workdir, caplog):
  shutil.rmtree(workdir / "checkpoints" / "20" / "state")
  with caplog.at_level(logging.WARNING):
    assert checkpoint.restore_params(workdir, SHAPES)["w"].tolist() == [10.0] * 64
  assert ["step 20" in entry.getMessage() for entry in caplog.records] == [True]
