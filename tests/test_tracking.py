"""Tests of lmjax.tracking: what is on disk after writing, resuming and failing, and what a terminal shows."""

import json
import math
import struct
import sys
import types

import numpy as np
import pytest

from lmjax import tracking, workdir
from lmjax.config import Config, TrackingConfig, TrainConfig, UserError

QUIET = Config(train=TrainConfig(num_steps=20), tracking=TrackingConfig(tensorboard=False))


def make(workdir, config=QUIET, start_step=0, num_steps=20, active=True):
  return tracking.Tracker(workdir, config, start_step=start_step, num_steps=num_steps, active=active)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_write_is_one_line_at_once(tmp_path):
  tracker = make(tmp_path / "new" / "run")
  tracker.write(1, {"loss": np.float32(2.5), "num_tokens": np.int64(512)})
  tracker.write(2, {"loss": 2.25})
  text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
  assert text == '{"step": 1, "loss": 2.5, "num_tokens": 512}\n{"step": 2, "loss": 2.25}\n'


def test_what_is_not_finite_is_null(tmp_path):
  make(tmp_path).write(1, {"loss": math.nan, "grad_norm": np.float32(np.inf), "mfu": -math.inf})
  assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "mfu": None}]


def test_a_resumed_run_has_the_lines_of_an_unbroken_one(tmp_path):
  unbroken = make(tmp_path / "unbroken")
  for step in range(1, 7):
    unbroken.write(step, {"loss": 1 / step})
  unbroken.sample(2, "a", "b")

  broken = make(tmp_path / "broken")
  for step in range(1, 6):
    broken.write(step, {"loss": 1 / step})
  broken.sample(2, "a", "b")
  broken.sample(5, "a", "c")
  with open(tmp_path / "broken" / "metrics.jsonl", "a") as f:
    f.write('{"step": 6, "lo')
  resumed = make(tmp_path / "broken", start_step=3)
  for step in range(4, 7):
    resumed.write(step, {"loss": 1 / step})

  for name in ("metrics.jsonl", "samples.jsonl"):
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
  assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_cut_last_line_goes_even_where_its_step_would_stay(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
  make(tmp_path, start_step=5).write(6, {})
  assert read(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 6}]


def test_what_follows_the_last_save_is_not_written_twice(tmp_path):
  tracker = make(tmp_path)
  tracker.write(20, {"loss": 1.0})
  tracker.write(20, {"validation/loss": 2.0})
  tracker.sample(20, "a", "b")
  again = make(tmp_path, start_step=20)
  again.write(20, {"validation/loss": 2.0})
  again.write(20, {"train/loss": 3.0})
  again.sample(20, "a", "b")
  assert read(tmp_path / "metrics.jsonl") == [
      {"step": 20, "loss": 1.0}, {"step": 20, "validation/loss": 2.0}, {"step": 20, "train/loss": 3.0}]
  assert len(read(tmp_path / "samples.jsonl")) == 1


def test_a_damaged_line_is_not_dropped_in_silence(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(UserError, match="metrics.jsonl has a line .*'nonsense'"):
    make(tmp_path, start_step=2)
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\nnonsense\n{"step": 2}\n'


def test_an_object_store_gets_the_same_text(tmp_path, monkeypatch):
  for module in (tracking, workdir):
    monkeypatch.setattr(module, "is_local", lambda path: False)
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
  tracker = make(tmp_path, start_step=1)
  tracker.write(2, {})
  tracker.write(3, {})
  assert read(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_an_inactive_tracker_touches_nothing(tmp_path, capsys):
  tracker = make(tmp_path / "run", active=False)
  tracker.write(1, {"loss": 1.0})
  tracker.progress(20, {"loss": 1.0})
  tracker.sample(1, "a", "b")
  tracker.write_result({"status": "finished"})
  tracker.close()
  assert not (tmp_path / "run").exists()
  assert capsys.readouterr() == ("", "")


def test_result_is_whole_and_plain(tmp_path):
  make(tmp_path).write_result({"status": "finished", "mfu": None, "train_loss": np.float32(1.5), "eval_loss": math.nan,
                               "versions": {"jax": "1"}, "sizes": (np.int32(2), True)})
  assert json.loads((tmp_path / "result.json").read_text()) == {
      "status": "finished", "mfu": None, "train_loss": 1.5, "eval_loss": None, "versions": {"jax": "1"},
      "sizes": [2, True]}
  assert not (tmp_path / "result.json.tmp").exists()


def test_a_failed_result_leaves_the_old_one(tmp_path):
  tracker = make(tmp_path)
  tracker.write_result({"status": "finished"})
  with pytest.raises(TypeError):
    tracker.write_result({"status": object()})
  assert json.loads((tmp_path / "result.json").read_text()) == {"status": "finished"}


def test_sample_is_kept_and_printed(tmp_path, capsys):
  make(tmp_path).sample(7, "def ", "f():\n  pass")
  assert read(tmp_path / "samples.jsonl") == [{"step": 7, "prompt": "def ", "text": "f():\n  pass"}]
  assert "step 7 ---\ndef f():\n  pass\n" in capsys.readouterr().out


def test_without_a_terminal_a_line_every_twentieth(tmp_path, capsys):
  tracker = make(tmp_path, num_steps=200)
  for step in range(1, 201):
    tracker.progress(step, {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.5, "grad_norm": 1.0})
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 20
  assert lines[0].startswith("step 10/200 (5%)  loss 2.000  tokens/s 12,346  MFU 50.0%  0:00 left")
  assert lines[-1] == "step 200/200 (100%)  loss 2.000  tokens/s 12,346  MFU 50.0%"


def test_a_resumed_run_counts_on_from_its_step(tmp_path, capsys):
  tracker = make(tmp_path, start_step=100, num_steps=200)
  tracker.progress(101, {})
  tracker.progress(110, {"loss": 2.0})
  assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == ["step 110/200 (55%)"]


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  with make(tmp_path, start_step=5, num_steps=20) as tracker:
    tracker.progress(20, {"loss": 1.25, "tokens_per_second": 10.0})
  last = capsys.readouterr().err.split("\r")[-1]
  assert "20/20" in last and "loss=1.250" in last and "tokens/s=10" in last and "MFU" not in last


def test_clock():
  assert tracking._clock(59.6) == "1:00"
  assert tracking._clock(3725) == "1:02:05"


def test_tensorboard_events_hold_the_scalars(tmp_path):
  tracker = make(tmp_path, Config(train=TrainConfig(num_steps=20)))
  tracker.write(3, {"loss": 1.5, "grad_norm": math.nan})
  tracker.sample(3, "a", "b")
  tracker.close()
  assert events(tmp_path) == {("loss", 3, 1.5), ("sample/text_summary", 3, None)}


def events(workdir):
  """Reads (tag, step, scalar or None) from the TFRecord files of TensorBoard."""
  from tensorboardX.proto import event_pb2
  found = set()
  for path in workdir.glob("events.out.*"):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12:12 + length])
      data = data[12 + length + 4:]
      for value in event.summary.value:
        found.add((value.tag, event.step, value.simple_value if value.HasField("simple_value") else None))
  return found


def hosted(name, monkeypatch):
  """Returns (run, what was called, arguments) of a stand-in for a hosted tracker, as they come, and a config with it.

  Like W&B it returns the run that is there, unless it is told to make another.
  """
  calls, there = [], []

  def init(**arguments):
    if not there or arguments.get("reinit") == "create_new":
      run = arguments["name"]
      calls.append((run, "init", arguments))
      there.append(types.SimpleNamespace(
          log=lambda metrics, step: calls.append((run, "log", metrics, step)),
          finish=lambda: calls.append((run, "finish")) or there.clear()))
    return there[-1]
  fake = types.ModuleType(name)
  fake.init = init
  monkeypatch.setitem(sys.modules, name, fake)
  tracking = TrackingConfig(tensorboard=False, **{f"{name}_project": "mine"})
  return calls, Config(train=TrainConfig(num_steps=20), tracking=tracking)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_go_on_as_the_same_run(tmp_path, monkeypatch, name):
  calls, config = hosted(name, monkeypatch)
  for start_step in (0, 10, 0):
    tracker = make(tmp_path / "run", config, start_step=start_step)
    tracker.write(start_step + 1, {"loss": 1.0, "grad_norm": math.nan})
    tracker.close()
  first, resumed, fresh = (c[2] for c in calls if c[1] == "init")
  assert first["project"] == "mine" and first["resume"] == "allow" and first["config"]["train"]["num_steps"] == 20
  assert first["name"] == resumed["name"] != fresh["name"] and first["name"].startswith("run-")
  assert ("id" in first) == (name == "wandb")
  assert calls[1:3] == [(first["name"], "log", {"loss": 1.0}, 1), (first["name"], "finish")]


def test_runs_of_one_process_are_apart_in_wandb(tmp_path, monkeypatch):
  calls, config = hosted("wandb", monkeypatch)
  trackers = [make(tmp_path / name, config) for name in ("000", "001")]
  for tracker, loss in zip(trackers, (1.0, 9.0)):
    tracker.write(1, {"loss": loss})
  trackers[0].close()
  trackers[1].write(2, {"loss": 8.0})
  assert [(run[:3], what, *rest) for run, what, *rest in calls if what != "init"] == [
      ("000", "log", {"loss": 1.0}, 1), ("001", "log", {"loss": 9.0}, 1), ("000", "finish"),
      ("001", "log", {"loss": 8.0}, 2)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_named(tmp_path, monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  config = Config(tracking=TrackingConfig(tensorboard=False, **{f"{name}_project": "mine"}))
  with pytest.raises(UserError, match=rf"{name}_project is set, but {name} is not installed; .*lmjax\[tracking\]"):
    make(tmp_path, config)


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="file/run cannot be made: .*; choose"):
    make(tmp_path / "file" / "run")
