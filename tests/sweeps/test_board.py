"""Tests of trials, drivers and workers on a problem that needs no training."""

import json
import math
import os
import statistics
import subprocess
import sys
import time

import optuna
import pytest

from lmjax.config_checks import Refused, UserError
from lmjax.sweeps import Sweep, chain, conditional, grid, integer, log_uniform, product, uniform, values
from lmjax.sweeps import board as board_lib
from lmjax.sweeps.board import Board
from lmjax.sweeps.driver import Workers, divide_devices, table
from lmjax.sweeps.sweep import resolve
from lmjax.sweeps.worker import Together, metric_of, work

RATE, DECAY, BATCH = "optim.learning_rate", "optim.weight_decay", "train.batch_size"
RATES = [1e-4 * 10 ** (i * 3 / 7) for i in range(8)]
DECAYS = [1e-2 * 10 ** (i * 2 / 7) for i in range(8)]
LISTS = grid({RATE: RATES, DECAY: DECAYS})
RANGES = product(log_uniform(RATE, 1e-4, 1e-1), log_uniform(DECAY, 1e-2, 1.0))


def bowl(settings):
  x, y = math.log10(settings[RATE]) + 2.4, math.log10(settings[DECAY]) + 1.1
  return 2 + x * x + 0.5 * y * y + 0.3 * x * y


def always(loss):
  """Returns a trial that has a loss, a function of its settings, and notes the settings that it was run with."""
  def run(settings, folder, report):
    run.seen.append(settings)
    return {"status": "finished", "eval_loss": loss(settings)}
  run.seen = []
  return run


@pytest.fixture
def begin(tmp_path):
  """Returns a function that makes the board of a sweep in a folder that the test's boards share."""
  return lambda space, storage=None, **settings: Board(resolve(Sweep(space, **settings)), tmp_path / "sweep", storage)


@pytest.mark.parametrize("driver, space, count", [
    ("grid", LISTS, 64), ("random", RANGES, 12), ("sobol", RANGES, 12), ("halton", RANGES, 12), ("tpe", RANGES, 12),
    ("tpe", LISTS, 12), ("gp", LISTS, 10)])
def test_every_driver_makes_its_trials(begin, driver, space, count):
  board, run = begin(space, driver=driver, num_trials=count), always(bowl)
  assert work(board, run)
  rows = board.rows()
  own = [row for row in rows if row.state != "duplicate"]
  assert len(own) == len(run.seen) == count and {row.state for row in own} == {"complete"}
  assert [row.settings for row in own] == run.seen and [row.value for row in own] == list(map(bowl, run.seen))
  assert len({json.dumps(settings) for settings in run.seen}) == count
  assert board.best_first()[0].value == min(map(bowl, run.seen))
  assert all(1e-4 <= settings[RATE] <= 0.1 + 1e-12 for settings in run.seen)


def tilted(settings):
  x, y = math.log10(settings[RATE]) + 1.9, math.log10(settings[DECAY]) + 1.3
  return 2 + (x + y) ** 2 + 0.1 * (x - y) ** 2


def cliff(settings):
  """Loss as it is against learning rates: it rises slowly below the best one and steeply above."""
  y = math.log10(settings[DECAY])
  x = math.log10(settings[RATE]) + 2 + 0.3 * (y + 1)
  return 3 + 0.3 * x * x * (4 if x > 0 else 1) + 0.1 * (y + 0.6) ** 2


def runs_to_the_best(driver, space, loss, seed, folder):
  """Returns after how many runs a sweep has reached the best of the 64 points."""
  best = min(loss({RATE: rate, DECAY: decay}) for rate in RATES for decay in DECAYS)
  run = always(loss)
  work(Board(resolve(Sweep(space, driver=driver, num_trials=20, seed=seed)), folder), run)
  return next((i + 1 for i, settings in enumerate(run.seen) if loss(settings) <= best + 1e-12), math.inf)


@pytest.mark.parametrize("loss", [bowl, pytest.param(tilted, marks=pytest.mark.slow),
                                  pytest.param(cliff, marks=pytest.mark.slow)])
@pytest.mark.parametrize("driver, space", [
    pytest.param("tpe", LISTS, id="tpe-lists"), pytest.param("tpe", RANGES, id="tpe-ranges"),
    pytest.param("gp", LISTS, id="gp-lists", marks=pytest.mark.slow),
    pytest.param("gp", RANGES, id="gp-ranges", marks=pytest.mark.slow)])
def test_bayesian_search_reaches_the_best_of_64_points_within_20_trials(driver, space, loss, tmp_path):
  found = [runs_to_the_best(driver, space, loss, seed, tmp_path / str(seed)) for seed in range(10)]
  assert statistics.median(found) <= 20, found


def test_what_was_chosen_is_a_function_of_the_seed(tmp_path):
  first, again, other = always(bowl), always(bowl), always(bowl)
  for folder, run, seed in (("a", first, 0), ("b", again, 0), ("c", other, 1)):
    work(Board(resolve(Sweep(RANGES, driver="tpe", num_trials=12, seed=seed)), tmp_path / folder), run)
  assert first.seen == again.seen != other.seen


def test_a_conditional_space_is_searched(begin):
  space = conditional("optim.name", {"adamw": log_uniform(RATE, 1e-4, 1e-2), "muon": log_uniform(RATE, 1e-3, 1e-1)})
  board, run = begin(space, driver="tpe", num_trials=20), always(
      lambda s: abs(math.log10(s[RATE]) + 1.5) + (s["optim.name"] == "adamw"))
  work(board, run)
  names = [settings["optim.name"] for settings in run.seen]
  assert set(names) == {"adamw", "muon"} and names[8:].count("muon") > 8
  assert board.best_first()[0].settings["optim.name"] == "muon"


@pytest.mark.parametrize("driver", ["random", "sobol", "halton", "tpe"])
@pytest.mark.parametrize("field, off, of", [
    ("optim.clip_norm", None, uniform), ("model.dropout", 0.0, log_uniform), ("model.num_experts", 0, integer)])
def test_a_setting_may_be_off_or_in_a_range(begin, driver, field, off, of):
  low, high = (2, 8) if of is integer else (0.1, 0.9)
  board, run = begin(chain(values(field, [off]), of(field, low, high)), driver=driver, num_trials=12), always(
      lambda settings: float(settings[field] or 0))
  assert work(board, run)
  drawn = [settings[field] for settings in run.seen]
  assert drawn.count(off) == 1 < len(drawn) and all(low <= value <= high for value in drawn if value != off)


def test_the_largest_may_be_the_best(begin):
  board = begin(LISTS, driver="tpe", num_trials=15, mode="max", metric="validation/accuracy")

  def run(settings, folder, report):
    folder.mkdir(parents=True)
    lines = [{"step": 1, "validation/accuracy": 9.0}, {"step": 2, "validation/accuracy": -bowl(settings)}, {"step": 3}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"status": "finished", "eval_loss": None}
  work(board, run)
  rows = board.best_first()
  assert rows[0].value == max(-bowl(row.settings) for row in rows if row.state == "complete")
  assert metric_of({}, board.folder(0), "no/such") is None


def test_an_exhausted_list_ends_a_search(begin):
  board, run = begin(grid({RATE: [1e-3, 1e-2], DECAY: [0.1, 0.2, 0.3]}), driver="tpe", num_trials=20), always(bowl)
  assert work(board, run)
  assert len(run.seen) == 6 and board.is_over()


def test_a_failed_trial_says_why_and_is_retried_no_more_than_it_may(begin):
  board, calls = begin(values(BATCH, [1, 2, 3, 4]), retries=1), []

  def run(settings, folder, report):
    calls.append(settings[BATCH])
    if settings[BATCH] == 2:
      raise ValueError("a\nb")
    if settings[BATCH] == 3:
      raise UserError("Batches of 3 do not divide.")
    if settings[BATCH] == 1 and calls.count(1) == 1:
      raise OSError("once")
    return {"status": "finished", "eval_loss": math.nan if settings[BATCH] == 4 else 1.0}
  assert work(board, run)
  assert sorted(calls) == [1, 1, 2, 2, 3, 4]
  assert [(row.state, row.reason) for row in board.rows()] == [
      ("complete", ""), ("failed", "ValueError: a b"), ("failed", "Batches of 3 do not divide."),
      ("failed", "its eval_loss is nan, which is not a finite number")]
  assert table(board.best_first(), "eval_loss")[:3] == [
      "trial  state     eval_loss  settings", "0      complete  1          train.batch_size=1",
      "1      failed               train.batch_size=2  (ValueError: a b)"]


def test_a_trial_that_diverges_is_run_once(begin):
  board, calls = begin(values(BATCH, [1, 2])), []

  def run(settings, folder, report):
    calls.append(settings[BATCH])
    if settings[BATCH] == 1:
      folder.mkdir(parents=True)
      (folder / "result.json").write_text('{"status": "stopped"}')
      raise Refused("The loss is not finite.")
    return {"status": "finished", "eval_loss": 1.0}
  assert work(board, run) and sorted(calls) == [1, 2]
  assert [(row.state, row.value, row.reason) for row in board.best_first()] == [
      ("complete", 1.0, ""), ("diverged", None, "The loss is not finite.")]


def test_a_search_leaves_the_place_where_trials_diverge(begin):
  board, calls = begin(log_uniform(RATE, 1e-4, 1.0), driver="tpe", num_trials=24), []

  def run(settings, folder, report):
    calls.append(settings[RATE])
    if settings[RATE] > 1e-2:
      folder.mkdir(parents=True)
      (folder / "result.json").write_text('{"status": "stopped"}')
      raise Refused("The loss is not finite.")
    return {"status": "finished", "eval_loss": abs(math.log10(settings[RATE]) + 2.5)}
  work(board, run)
  # Half of the range diverges, and so do half of the first eight, which are spread evenly.
  assert sum(rate > 1e-2 for rate in calls[:8]) == 4 and sum(rate > 1e-2 for rate in calls[8:]) < 5


def test_gp_is_told_the_worst_of_a_trial_that_diverges(begin):
  board = begin(values(BATCH, [1, 2, 3]), driver="gp", num_trials=3)
  first, second, third = board.take(), board.take(), board.take()
  board.end(first, "complete", 1.0)
  board.end(second, "complete", 2.0)
  board.end(third, "diverged", reason="Not finite.")
  told = board._trial(third.number)
  assert (told.state.name, told.value) == ("COMPLETE", 2.0)
  row = board.rows()[third.number]
  assert (row.state, row.value, row.reason) == ("diverged", None, "Not finite.")


def test_an_interrupted_trial_is_gone_on_with(begin):
  board = begin(values(BATCH, [1, 2]))
  assert not work(board, lambda *_: {"status": "interrupted"})
  assert [row.state for row in board.rows()] == ["running", "waiting"]
  assert work(board, always(lambda settings: 1.0)) and [row.state for row in board.rows()] == ["complete"] * 2


def test_a_result_whose_worker_died_before_it_was_told_counts(begin):
  board = begin(values(BATCH, [1]))
  claim = board.take()
  claim.folder.mkdir(parents=True)
  (claim.folder / "result.json").write_text('{"status": "finished", "eval_loss": 3.5}')
  board.leave(claim)
  run = always(lambda settings: 9.9)
  work(board, run)
  assert run.seen == [] and board.rows()[0].value == 3.5


def test_a_trial_is_one_workers_at_a_time(begin):
  first, second = begin(values(BATCH, [1, 2])), begin(values(BATCH, [1, 2]))
  a, b = first.take(), second.take()
  assert (a.number, b.number) == (0, 1) and first.take() is None and second.take() is None
  first.leave(a)
  assert second.take().number == 0


def test_a_trial_that_kills_its_workers_is_given_up(begin):
  board = begin(values(BATCH, [1]))
  for _ in range(board_lib._MOST_STARTS):
    board.leave(board.take())
  assert board.take() is None and board.is_over()
  assert board.rows()[0].reason == "its worker ended 20 times without a word or a new checkpoint"


def test_a_trial_that_makes_checkpoints_is_not(begin):
  board = begin(values(BATCH, [1]))
  for step in range(2 * board_lib._MOST_STARTS):
    claim = board.take()
    (claim.folder / "checkpoints" / str(step)).mkdir(parents=True)
    board.leave(claim)
  assert board.take().number == 0


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_pruned_trials_stop(begin, pruner):
  board, steps = begin(values(BATCH, list(range(1, 13))), pruner=pruner), []

  def run(settings, folder, report):
    for step in range(1, 28):
      steps.append((settings[BATCH], step))
      if report(step, {"validation/accuracy": 0.0, "validation/loss": settings[BATCH] + 1 / step, "other/loss": 0.0}):
        return {"status": "pruned"}
    return {"status": "finished", "eval_loss": float(settings[BATCH])}
  assert work(board, run)
  states = [row.state for row in board.rows()]
  # The first is the best of all, and each that follows is worse than all before it.
  assert states[0] == "complete" and states.count("pruned") > 4
  assert len(steps) < 12 * 27 * 0.7
  assert all(row.ended for row in board.rows()) and board.best_first()[0].number == 0


def test_sqlite_holds_a_sweep_as_well(begin, tmp_path):
  url = f"sqlite:///{tmp_path / 'sweep.db'}"
  board, run = begin(LISTS, url, driver="tpe", num_trials=10), always(bowl)
  assert work(board, run) and len(run.seen) == 10
  with pytest.raises(UserError, match="keeps its trials in a database, but --storage is not given"):
    begin(LISTS, driver="tpe", num_trials=10)
  with pytest.raises(UserError, match="--storage=nonsense cannot be opened"):
    Board(resolve(Sweep(LISTS)), tmp_path / "other", "nonsense")


def test_a_sweep_may_grow_and_not_change(begin):
  work(begin(RANGES, driver="sobol", num_trials=4), first := always(bowl))
  work(begin(RANGES, driver="sobol", num_trials=6), more := always(bowl))
  assert (len(first.seen), len(more.seen)) == (4, 2)
  with pytest.raises(UserError, match="has seed = 0, but now it is 1; to go on keep what it was"):
    begin(RANGES, driver="sobol", num_trials=6, seed=1)
  with pytest.raises(UserError, match="has space = "):
    begin(LISTS, driver="sobol", num_trials=6)


def test_optuna_reads_the_study_as_it_is(begin, tmp_path):
  work(begin(product(LISTS, chain(values(BATCH, [4]), values(BATCH, [8]))), driver="random", num_trials=5),
       always(bowl))
  storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(
      str(tmp_path / "sweep" / "optuna.journal")))
  summary, = optuna.get_all_study_summaries(storage)
  study = optuna.load_study(study_name=summary.study_name, storage=storage)
  assert len(study.trials) == 5 and all(trial.state.name == "COMPLETE" for trial in study.trials)
  # The parameters are the settings themselves.
  assert all(trial.params == trial.user_attrs["settings"] for trial in study.trials)
  assert study.best_value == min(bowl(trial.params) for trial in study.trials)


DEPTH = "model.num_layers"


def test_a_worker_takes_trials_that_are_alike(begin):
  space = grid({RATE: [1e-3, 1e-2, 1e-1], DEPTH: [2, 4]})
  first, second = begin(space), begin(space)
  alike = lambda settings: str(settings[DEPTH])
  one, other = first.take(), second.take()
  assert [claim.number for claim in first.take_alike(one, alike, 9, 1)] == [2, 4]
  assert [claim.number for claim in second.take_alike(other, alike, 9, 2)] == [3]  # Half of three, rounded up.
  assert first.take().number == 5 and first.take() is None


def test_together_each_ends_as_it_ends(begin):
  board, seen = begin(grid({RATE: [1e-3, 1e-2, 1e-1, 1.0]})), []

  def run(trials):
    seen.append(len(trials))
    assert trials[3][2](1, {"validation/loss": 1.0}) is False
    (trials[1][1]).mkdir(parents=True)
    (trials[1][1] / "result.json").write_text('{"status": "stopped"}')
    return [{"status": "finished", "eval_loss": 1.0}, Refused("Not finite."), {"status": "pruned"},
            {"status": "finished", "eval_loss": 2.0}]
  assert work(board, None, together=Together(lambda settings: "", 9, 1, run))
  assert seen == [4]
  assert [(row.state, row.value) for row in board.rows()] == [
      ("complete", 1.0), ("diverged", None), ("pruned", None), ("complete", 2.0)]


def test_what_cannot_train_together_is_run_alone(begin):
  board, calls = begin(values(BATCH, [1, 2, 3])), []

  def run_trial(settings, folder, report):
    calls.append(settings[BATCH])
    if settings[BATCH] == 2:
      raise UserError("No.")
    return {"status": "finished", "eval_loss": 1.0}

  def run(trials):
    raise MemoryError
  assert work(board, run_trial, together=Together(lambda settings: "", 9, 1, run)) and calls == [1, 2, 3]
  assert [row.state for row in board.rows()] == ["complete", "failed", "complete"]


def test_trials_that_are_interrupted_together_are_gone_on_with(begin):
  board = begin(values(BATCH, [1, 2]))
  stopped = lambda trials: [{"status": "interrupted"}] * len(trials)
  assert not work(board, None, together=Together(lambda settings: "", 9, 1, stopped))
  assert work(board, always(lambda settings: 1.0)) and [row.state for row in board.rows()] == ["complete"] * 2


def test_a_trial_that_may_be_what_kills_workers_is_run_alone(begin):
  board = begin(values(BATCH, [1, 2]))
  for _ in range(3):
    board.leave(board.take())
  first, second = board.take(), board.take()
  assert (first.number, first.starts, second.number) == (0, 4, 1)
  assert board.take_alike(first, lambda settings: "", 9, 1) == []
  board.leave(first)
  assert board.take_alike(second, lambda settings: "", 9, 1) == []


def test_what_a_kill_leaves_half_written_is_cut_off(begin, tmp_path):
  board = begin(values(BATCH, [1, 2]))
  with open(tmp_path / "sweep" / "optuna.journal", "a") as file:
    file.write('{"op_code": 8, "worker')
  work(board, always(lambda settings: 1.0))
  assert [row.state for row in begin(values(BATCH, [1, 2])).rows()] == ["complete"] * 2


def test_an_object_store_has_no_locks():
  with pytest.raises(UserError, match="in an object store, where workers cannot lock"):
    Board(resolve(Sweep(LISTS)), "gs://bucket/sweep")


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(Refused, match="cannot be written"):
    Board(resolve(Sweep(LISTS)), tmp_path / "file" / "sweep")


def test_workers_have_their_own_devices(tmp_path):
  divide = lambda count, **environment: divide_devices(count, environment, tmp_path)
  assert divide(2, CUDA_VISIBLE_DEVICES="0,1,2,5") == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1,5"}]
  assert divide(1, CUDA_VISIBLE_DEVICES="0,1") == [{}] and divide(2, CUDA_VISIBLE_DEVICES="") == [{}, {}]
  with pytest.raises(UserError, match="--workers is 3, but there are 2 GPUs"):
    divide(3, CUDA_VISIBLE_DEVICES="0,1")


def test_the_devices_of_a_container_are_numbered_from_0(tmp_path):
  for name in ("nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
    (tmp_path / name).touch()
  assert divide_devices(2, {}, tmp_path) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
  assert divide_devices(2, {"JAX_PLATFORMS": "cpu"}, tmp_path) == [{}, {}]
  with pytest.raises(UserError, match="--workers is 3, but there are 2 GPUs"):
    divide_devices(3, {}, tmp_path)


@pytest.mark.parametrize("device, environment", [
    ("accel0", {}), ("vfio/0", {}), ("none", {"JAX_PLATFORMS": "tpu,cpu"})])
def test_the_chips_of_a_tpu_host_are_one_workers(tmp_path, device, environment):
  (tmp_path / device).parent.mkdir(exist_ok=True)
  (tmp_path / device).touch()
  assert divide_devices(1, environment, tmp_path) == [{}]
  assert divide_devices(2, {"JAX_PLATFORMS": "cpu"}, tmp_path) == [{}, {}]
  with pytest.raises(UserError, match="--workers is 2, but the chips of a TPU host are one process's"):
    divide_devices(2, environment, tmp_path)


def test_devices_that_are_no_tpu_are_nobodys(tmp_path):
  (tmp_path / "vfio").mkdir()
  (tmp_path / "vfio" / "vfio").touch()
  assert divide_devices(2, {}, tmp_path) == [{}, {}]
  (tmp_path / "vfio" / "12").touch()  # Something that a host of virtual machines hands on.
  assert divide_devices(2, {"JAX_PLATFORMS": "cuda,cpu"}, tmp_path) == [{}, {}]
  for name in ("nvidia0", "nvidia1"):
    (tmp_path / name).touch()
  assert divide_devices(2, {}, tmp_path) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_what_workers_say_is_in_files_of_their_driver(tmp_path, monkeypatch):
  for pid, said in ((7, "one"), (8, "two")):
    monkeypatch.setattr(os, "getpid", lambda: pid)  # noqa: B023
    workers = Workers([sys.executable, "-c", f"print({said!r}); raise SystemExit(3)"], tmp_path, [{}])
    for _ in range(2):
      workers.keep_running()
      while workers.running():
        time.sleep(0.01)
    assert (workers.deaths, workers.last) == (1, said)
  assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
      f"{os.uname().nodename}-7-0.log": "one\none\n", f"{os.uname().nodename}-8-0.log": "two\ntwo\n"}


def test_an_experiment_file_loads_neither_jax_nor_optuna():
  code = "import lmjax.sweeps, lmjax.sweeps.sweep, sys; print({'jax', 'optuna', 'torch'} & set(sys.modules))"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
