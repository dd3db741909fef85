"""Tests of how a sweep is begun and found again."""

import pytest

from lmjax.config_checks import UserError
from lmjax.sweeps import Sweep, log_uniform, values
from lmjax.sweeps import study as study_lib
from lmjax.sweeps.board import Board
from lmjax.sweeps.sweep import resolve
from lmjax.sweeps.worker import work

RATE = "optim.learning_rate"


def begin(folder, rates=(1.0, 2.0), storage=None):
  return Board(resolve(Sweep(values(RATE, list(rates)))), folder, storage)


def finish(settings, folder, report):
  folder.mkdir(parents=True)
  (folder / "result.json").write_text('{"status": "finished", "eval_loss": %s}' % settings[RATE])
  return {"status": "finished", "eval_loss": settings[RATE]}


def test_a_storage_that_cannot_be_opened_leaves_no_sweep_behind(tmp_path):
  with pytest.raises(UserError, match="--storage=nonsense cannot be opened"):
    begin(tmp_path / "sweep", storage="nonsense")
  assert not (tmp_path / "sweep" / "sweep.json").exists()
  assert work(begin(tmp_path / "sweep"), finish)


def test_a_space_that_cannot_be_noted_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(*_):
    raise ValueError("log of 0")
  with monkeypatch.context() as patched:
    patched.setattr(study_lib, "Noting", fail)
    with pytest.raises(ValueError):
      Board(resolve(Sweep(log_uniform(RATE, 1e-3, 1.0), driver="tpe", num_trials=2)), tmp_path / "sweep")
  assert not (tmp_path / "sweep").exists()


def test_a_start_that_was_killed_before_its_end_is_begun_again(tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(study_lib, "write_whole", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      begin(tmp_path / "sweep")
  board = begin(tmp_path / "sweep", [3.0])
  assert work(board, finish) and [row.value for row in board.rows()] == [3.0]


def test_trials_of_no_known_sweep_are_not_taken_over(tmp_path):
  work(begin(tmp_path / "sweep"), finish)
  (tmp_path / "sweep" / "sweep.json").unlink()
  with pytest.raises(UserError, match="trials has trials, but there is no .*sweep.json, which says of what sweep they"):
    begin(tmp_path / "sweep", [30.0, 40.0])


def test_of_long_spaces_it_is_told_where_they_part(tmp_path):
  begin(tmp_path / "sweep", [float(i) for i in range(1, 100)])
  with pytest.raises(UserError, match=r"has space = \.\.\. .* 49\.0, 50\.0, 51\.0, .* \.\.\., but now it is") as told:
    begin(tmp_path / "sweep", [float(i + (i == 50) * 0.5) for i in range(1, 100)])
  assert "50.5" in str(told.value) and len(str(told.value)) < 500


def test_a_sweep_whose_study_is_gone_is_not_begun_anew(tmp_path):
  work(begin(tmp_path / "sweep"), finish)
  (tmp_path / "sweep" / "optuna.journal").unlink()
  with pytest.raises(UserError, match="sweep has no optuna.journal, where its sweep keeps its trials; put it back"):
    begin(tmp_path / "sweep")
  assert not (tmp_path / "sweep" / "optuna.journal").exists()


def test_a_sweep_is_not_looked_for_in_another_database(tmp_path):
  url = lambda name: f"sqlite:///{tmp_path / name}.db"
  board = begin(tmp_path / "sweep", storage=url("a"))
  with pytest.raises(UserError, match="The database of --storage holds no study sweep-.*, which .*sweep.json names"):
    begin(tmp_path / "sweep", storage=url("b"))
  assert work(board, finish) and [row.value for row in begin(tmp_path / "sweep", storage=url("a")).rows()] == [1.0, 2.0]


def test_a_study_begun_anew_in_a_database_takes_the_place_of_the_old_one(tmp_path):
  url = f"sqlite:///{tmp_path / 'sweep.db'}"
  board = begin(tmp_path / "sweep", storage=url)
  work(board, lambda *_: 1 / 0)
  board.close()
  assert [row.state for row in board.rows()] == ["failed"] * 2
  board = Board(resolve(Sweep(values(RATE, [1.0, 2.0]), retries=5)), tmp_path / "sweep", url)
  assert work(board, finish) and [row.value for row in board.rows()] == [1.0, 2.0]
  assert len(study_lib.optuna.get_all_study_summaries(url)) == 1
