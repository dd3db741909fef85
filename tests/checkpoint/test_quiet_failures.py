"""What asyncio and TensorStore print when the disk refuses a checkpoint: the sentence that is raised says it all."""

import logging
import sys
import types

from lmjax import checkpoint
from lmjax.config import CheckpointConfig


def test_what_asyncio_says_of_orbax_is_kept_back(caplog):
  logger = logging.getLogger("asyncio")
  logger.error("_GatheringFuture exception was never retrieved\nfuture: <_GatheringFuture finished>")
  logger.error("Task exception was never retrieved\nfuture: <Task coro=<save() done, defined at /orbax/b.py:1>")
  logger.error("Task was destroyed but it is pending!")
  assert [entry.getMessage() for entry in caplog.records] == ["Task was destroyed but it is pending!"]


def test_what_tensorstore_says_of_closed_loops_is_kept_back(tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "unraisablehook", shown.append)
  before = sys.unraisablehook
  run = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
  closed, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
  sys.unraisablehook(closed)
  sys.unraisablehook(other)
  run.close()
  assert shown == [other] and sys.unraisablehook == before
