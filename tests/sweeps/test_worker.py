"""Tests of what ends a worker, and what ends a trial."""

import json
import pathlib
import sys

import pytest

from lmjax.config_checks import Refused, TooLarge, UserError
from lmjax.sweeps import Sweep, driver, values
from lmjax.sweeps.board import Board
from lmjax.sweeps.sweep import resolve
from lmjax.sweeps.worker import Together, work

BATCH = "train.batch_size"


@pytest.fixture
def begin(tmp_path):
  """Returns a function that opens the board of a sweep of some batch sizes, and closes the one before."""
  boards = []

  def begin(count=3, **settings):
    for board in boards:
      board.close()
    boards[:] = [Board(resolve(Sweep(values(BATCH, list(range(1, count + 1))), **settings)), tmp_path / "sweep")]
    return boards[0]
  return begin


def finish(settings, folder, report):
  """A trial that has two losses."""
  folder.mkdir(parents=True, exist_ok=True)
  result = {"status": "finished", "eval_loss": float(settings[BATCH]), "train_loss": -float(settings[BATCH])}
  (folder / "result.json").write_text(json.dumps(result))
  return result


def states(board):
  return [row.state for row in board.rows()]


def never(*_):
  raise AssertionError("It has been run before.")


def test_a_full_disk_ends_the_worker_and_no_trial(begin):
  board, calls = begin(8), []

  def run(settings, folder, report):
    calls.append(settings[BATCH])
    if len(calls) > 2:
      raise Refused("metrics.jsonl could not be written (No space left on device).")
    return finish(settings, folder, report)
  for _ in range(3):
    with pytest.raises(Refused, match="No space left"):
      work(board, run)
  assert calls == [1, 2, 3, 3, 3] and states(board) == ["complete"] * 2 + ["running"] + ["waiting"] * 5
  assert board.starts() == 2  # So that the driver does not take it for progress.
  assert work(begin(8), finish) and states(begin(8)) == ["complete"] * 8


ON_A_FULL_DISK = """
import sys
from tests.sweeps import test_worker as test
def run(*_):
  raise test.Refused("No space left.")
test.work(test.Board(test.resolve(test.Sweep(test.values(test.BATCH, [1, 2, 3]))), sys.argv[1]), run)
"""


def test_a_full_disk_ends_the_command_which_goes_on_later(begin, tmp_path):
  board, root = begin(3), pathlib.Path(__file__).resolve().parents[2]
  workers = driver.Workers([sys.executable, "-c", ON_A_FULL_DISK, str(board.workdir)], tmp_path / "workers",
                           [{"PYTHONPATH": str(root)}])
  with pytest.raises(Refused, match="No space left"):
    driver.drive(board, workers, pause=0.05)
  assert states(board) == ["running", "waiting", "waiting"]
  assert work(begin(3), finish) and states(begin(3)) == ["complete"] * 3


def test_a_full_disk_in_a_stack_ends_those_that_have_ended(begin):
  board = begin(3)
  run = lambda trials: [finish(*trials[0]), Refused("No space left."), finish(*trials[2])]
  with pytest.raises(Refused, match="No space left"):
    work(board, None, together=Together(lambda settings: "", 9, 1, run))
  assert states(board) == ["complete", "running", "complete"]


def test_a_trial_that_is_too_large_fails_alone(begin):
  board = begin(3)

  def run(settings, folder, report):
    if settings[BATCH] == 2:
      raise TooLarge("The state takes 90 GB.")
    return finish(settings, folder, report)
  assert work(board, run) and states(board) == ["complete", "failed", "complete"]


def test_failed_trials_are_run_again_by_a_command_with_more_retries(begin):
  def run(settings, folder, report):
    if settings[BATCH] == 2:
      raise ValueError("A broken machine.")
    return finish(settings, folder, report)
  board = begin(3, retries=1)
  work(board, run)
  name = board._study.study_name
  assert states(begin(3, retries=1)) == ["complete", "failed", "complete"]
  other = Board(resolve(Sweep(values(BATCH, [1, 2, 3]), retries=2)), board.workdir)
  assert states(other) == ["complete", "failed", "complete"]  # Others work on the sweep, by their study.
  other.close()
  board = begin(3, retries=2)
  assert states(board) == ["complete", "waiting", "complete"] and board.rows()[0].value == 1.0
  assert board._study.study_name != name
  assert work(board, finish) and states(board) == ["complete"] * 3


def test_a_metric_that_no_result_has_ends_the_worker(begin):
  board, message = begin(3, metric="eval_los"), "eval_los, of which trial 0 has no number; did you mean 'eval_loss'"
  with pytest.raises(UserError, match=message):
    work(board, finish)
  assert states(board) == ["running", "waiting", "waiting"]
  with pytest.raises(UserError, match=message):  # The driver asks this before it starts anything.
    begin(3, metric="eval_los").is_over()
  seen = []
  board = begin(3, metric="eval_loss")
  work(board, lambda settings, *more: (seen.append(settings[BATCH]), finish(settings, *more))[1])
  assert seen == [2, 3] and [row.value for row in board.rows()] == [1.0, 2.0, 3.0]


def test_a_stack_without_the_metric_is_told_with_another_one(begin):
  board = begin(3, metric="eval_los")
  with pytest.raises(UserError, match="has no number"):
    work(board, None, together=Together(lambda _: "", 9, 1, lambda trials: [finish(*one) for one in trials]))
  board = begin(3)
  assert work(board, never) and [row.value for row in board.rows()] == [1.0, 2.0, 3.0]


def test_metric_and_mode_may_change(begin):
  board = begin(3)
  work(board, finish)
  board = begin(3, metric="train_loss", mode="max")
  assert work(board, never) and [row.value for row in board.best_first()] == [-1.0, -2.0, -3.0]
  assert board._study.direction.name == "MAXIMIZE" and board._study.metric_names == ["train_loss"]
  with pytest.raises(Refused, match="is being worked on with metric = 'train_loss', but now it is 'eval_loss'; wait"):
    Board(resolve(Sweep(values(BATCH, [1, 2, 3]))), board.workdir)


def test_what_has_diverged_stays_so_with_another_metric(begin):
  def run(settings, folder, report):
    result = finish(settings, folder, report)
    if settings[BATCH] == 2:
      (folder / "result.json").write_text('{"status": "stopped"}')
      raise Refused("Not finite.")
    return result
  work(begin(3), run)
  board = begin(3, metric="train_loss")
  assert work(board, never) and states(board) == ["complete", "diverged", "complete"]


@pytest.mark.parametrize("metric, pruner, message", [
    ("validation/acuracy", "none", r"have not; did you mean 'validation/accuracy'\?"),
    ("bits_per_byte", "asha", "metric is bits_per_byte, which evaluations in the loop have not; known are:")])
def test_a_metric_that_no_evaluation_has_ends_the_worker_at_the_first(begin, metric, pruner, message):
  def run(settings, folder, report):
    report(1, {"validation/loss": 1.0, "validation/accuracy": 0.5})
    raise AssertionError
  with pytest.raises(UserError, match=message):
    work(begin(3, metric=metric, pruner=pruner), run)
  together = Together(lambda settings: "", 9, 1, lambda trials: [run(*one) for one in trials])
  board = begin(3, metric=metric, pruner=pruner)
  with pytest.raises(UserError, match=message):
    work(board, never, together=together)
  assert board._study.user_attrs["refused"]
