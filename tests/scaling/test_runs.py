"""Tests of reading runs from folders and CSV files."""

import json

import numpy as np
import pytest

from lmjax.config_checks import UserError
from lmjax.scaling import runs
from lmjax.scaling.runs import Columns


def write_run(folder, *, status="finished", num_layers=2, **result):
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({
      "model": {"num_layers": num_layers, "embed_dim": 64}, "data": {"seq_len": 128},
      "optim": {"learning_rate": 0.01}}))
  if status:
    (folder / "result.json").write_text(json.dumps({
        "status": status, "num_params": 1000, "num_params_non_embedding": 600, "num_tokens": 5000,
        "train_flops": 4e7, "eval_loss": 3.5, "train_loss": None, **result}))


@pytest.fixture
def sweep(tmp_path):
  folder = tmp_path / "sweep"
  write_run(folder / "a")
  write_run(folder / "trials" / "b", num_params=2000, num_layers=4)
  write_run(folder / "stopped", status="stopped")
  write_run(folder / "going", status=None)
  write_run(folder / "a" / "exported")  # Lies in a run, so it is none.
  (folder / "notes").mkdir()
  return folder


def test_a_sweep(sweep):
  table = runs.read_table(str(sweep))
  found, count = runs.select(table, Columns("num_params", "eval_loss", "num_tokens"))
  assert found.names == ["a", "trials/b"] and found.num_runs == 2
  np.testing.assert_array_equal(found.points.size, [1000, 2000])
  np.testing.assert_array_equal(found.points.flops, [6 * 1000 * 5000, 6 * 2000 * 5000])
  np.testing.assert_array_equal(found.loss, [3.5, 3.5])
  assert list(table.notes) == ["2 of 4 runs have not finished and are left out: going, stopped."]
  np.testing.assert_array_equal(table.numbers("optim.learning_rate", "best"), [0.01, 0.01])


def test_conventions_change_what_is_compute(sweep):
  table = runs.read_table(str(sweep))
  select = lambda *args, **kwargs: runs.select(table, Columns(*args, **kwargs), 2.0, attention=True)[0].points
  # 2 N and 6 layers width length, for 2 and 4 layers of 64 and a length of 128.
  a_token = np.array([2 * 600 + 6 * 2 * 64 * 128, 2 * 600 + 6 * 4 * 64 * 128])
  np.testing.assert_allclose(select("num_params_non_embedding", "eval_loss", "num_tokens").flops, a_token * 5000)
  np.testing.assert_allclose(
      select("num_params_non_embedding", "eval_loss", flops="train_flops").tokens, 4e7 / a_token)
  recorded = select("num_params", "eval_loss", "num_tokens", "train_flops")
  np.testing.assert_array_equal(recorded.flops, [4e7, 4e7])
  np.testing.assert_array_equal(recorded.tokens, [5000, 5000])


def test_a_file(tmp_path):
  path = tmp_path / "runs.csv"
  path.write_text("\ufeffn, C ,loss,which\n1e3,6e6,3.5,x\n\n2e3,6e6,3.25,x\n2e3,1.2e7,3.0,y\n", encoding="utf-8")
  table = runs.read_table(str(path))
  found, _ = runs.select(table, Columns("n", "loss", flops="C", run="which"))
  assert list(found.names) == ["line 2", "line 4", "line 5"]
  np.testing.assert_array_equal(found.points.tokens, [1000, 500, 1000])
  np.testing.assert_array_equal(found.run, [0, 0, 1])
  kept = found.keep(np.array([False, False, True]))
  assert kept.names == ["line 5"] and kept.num_runs == 1 and kept.loss == [3.0]


def test_copies_count_as_one_run(tmp_path):
  path = tmp_path / "runs.csv"
  path.write_text("n,d,loss,,\n2,2,3,,\n1,2,3,,\n2,2,3,,\n2,2,2.9,,\n")  # Filled up by a spreadsheet.
  found, _ = runs.select(runs.read_table(str(path)), Columns("n", "loss", "d"))
  np.testing.assert_array_equal(found.run, [0, 1, 0, 2])
  assert found.num_runs == 3 and any("1 of 4 runs are copies" in note for note in found.table.notes)


@pytest.mark.parametrize("text, message", [
    ("", r"holds no runs; give a CSV file with a line of column names"),
    ("n,d,loss\n", r"holds no runs"),
    ("n,d,loss\n1,2\n", r"line 2, has 2 cells for 3 columns"),
    ("n,d,loss\n1,2,3,4\n", r"line 2, has 4 cells for 3 columns"),
    ("n;d;loss\n1,5;2;3\n", r"has semicolons between its cells; give a file with commas"),
    ("n\td\tloss\n1\t2\t3\n", r"has tabs between its cells"),
    ("n,n,loss\n1,2,3\n", r"has the column 'n' more than once"),
    ("n,d,l\n1,2,3\n", r"has no column 'loss' for --loss; its columns are n, d, l\."),
    ("n,d,loss\n1,2,3\n1,2,three\n", r"line 3, column 'loss', is 'three', which is not a number; --loss"),
    ("n,d,loss\n1,0,3\n", r"line 2, column 'd', is 0, but --tokens needs a finite number above 0"),
    ("n,d,loss\n-1,2,3\n", r"line 2, column 'n', is -1"),
    ("n,d,loss\n1,2,nan\n", r"line 2, column 'loss', is nan"),
    ("n,d,loss\n1,inf,2\n", r"line 2, column 'd', is inf"),
    ("n,d,loss\n1,,2\n", r"line 2, column 'd', is empty"),
    ('n,d,loss\n1,"2,2\n', r"is not a CSV file"),
])
def test_a_file_that_is_no_good(tmp_path, text, message):
  path = tmp_path / "runs.csv"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    runs.select(runs.read_table(str(path)), Columns("n", "loss", "d"))


def test_a_file_that_is_not_text(tmp_path):
  (tmp_path / "runs.csv").write_bytes(bytes(range(256)))
  with pytest.raises(UserError, match="is not a CSV file in UTF-8"):
    runs.read_table(str(tmp_path / "runs.csv"))


def test_a_sweep_that_is_no_good(sweep, tmp_path):
  for name, message in (("nowhere", "There is no file or folder"), ("sweep/notes", "holds no run"),
                        ("sweep/going", "holds no run")):
    with pytest.raises(UserError, match=message):
      runs.read_table(str(tmp_path / name))
  with pytest.raises(UserError, match=r"result\.json, column 'train_loss', is empty, but --loss needs"):
    runs.select(runs.read_table(str(sweep)), Columns("num_params", "train_loss", "num_tokens"))
  with pytest.raises(UserError, match=r"no column 'eval_los' for --loss; did you mean 'eval_loss'\?"):
    runs.select(runs.read_table(str(sweep)), Columns("num_params", "eval_los", "num_tokens"))
  (sweep / "a" / "result.json").write_text("{")
  with pytest.raises(UserError, match=r"result\.json is not JSON as a run writes it"):
    runs.read_table(str(sweep))
  (sweep / "a" / "result.json").write_text("[]")
  with pytest.raises(UserError, match=r"result\.json is not a JSON object"):
    runs.read_table(str(sweep))


def test_a_sweep_whose_runs_all_go_on(tmp_path):
  write_run(tmp_path / "sweep" / "a", status=None)
  with pytest.raises(UserError, match="None of the 1 runs in .* has finished"):
    runs.read_table(str(tmp_path / "sweep"))
