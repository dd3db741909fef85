"""What a worker of `lmjax sweep` makes of settings before anything is trained."""

import types

import pytest

from lmjax.commands import sweep as command
from lmjax.config import UserError
from lmjax.sweeps import Sweep, driver, values, worker
from lmjax.sweeps.sweep import resolve


def test_settings_that_make_no_config_are_like_no_others(monkeypatch):
  """A driver may choose some: a worker that only asks what they have in common with its own must not die of it."""
  seen = {}
  monkeypatch.setattr(driver, "follow_driver", lambda: None)
  monkeypatch.setattr(worker, "work", lambda board, run_trial, together: seen.update(together=together, run=run_trial)
                      or True)

  def make_config(settings):
    raise UserError("No.")
  board = types.SimpleNamespace(sweep=resolve(Sweep(values("model.num_heads", [3, 5]))))
  command._work(board, make_config, None, 1)
  assert seen["together"].alike({"model.num_heads": 3}) != seen["together"].alike({"model.num_heads": 5})
  with pytest.raises(UserError, match="No."):
    seen["run"]({"model.num_heads": 3}, None, None)
