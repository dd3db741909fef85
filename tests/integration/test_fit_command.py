"""`lmjax fit` as a user runs it: what it prints, and what it says to a wrong request."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from lmjax.commands import cli

SIZES, TOKENS = np.geomspace(1e7, 1e10, 5), np.geomspace(4e8, 4e11, 4)


def law(n, d):
  return 1.69 + 406.4 / n ** 0.34 + 410.7 / d ** 0.28


def rows(seed=0):
  rng = np.random.default_rng(seed)
  return [(n, d, law(n, d) * np.exp(0.003 * rng.standard_normal())) for n in SIZES for d in TOKENS]


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "runs.csv"
  lines = [f"{n:.6g},{d:.6g},{6 * n * d:.6g},{loss:.5f}" for n, d, loss in rows()]
  path.write_text("\n".join(["params,toks,flops,final", *lines]) + "\n")
  return path


@pytest.fixture
def sweep(tmp_path):
  for i, (n, d, loss) in enumerate(rows()):
    folder = tmp_path / "sweep" / f"{i:02}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"optim": {"learning_rate": 0.01}}))
    (folder / "result.json").write_text(json.dumps({
        "status": "finished", "num_params": n, "num_params_non_embedding": n / 2, "num_tokens": d,
        "train_flops": 7 * n * d, "eval_loss": loss, "train_loss": loss}))
  return tmp_path / "sweep"


@pytest.fixture
def fit(capsys):
  """Returns a function that runs `lmjax fit` in this process for (its JSON, its stderr)."""
  def fit(*argv):
    capsys.readouterr()
    assert cli.run(["fit", "--bootstrap=200", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err
  return fit


CSV_FLAGS = ("--size=params", "--tokens=toks", "--loss=final")


def test_a_file(fit, file):
  told, err = fit(file, *CSV_FLAGS, "--predict=4e10,1e12; 1e24")
  assert told["intervals"]["alpha"][0] < 0.34 < told["intervals"]["alpha"][1]
  assert told["E"] == pytest.approx(1.69, rel=0.03) and told["compute_optimal"]["a"] == pytest.approx(0.45, abs=0.02)
  assert told["predictions"][0]["loss"] == pytest.approx(law(4e10, 1e12), rel=0.01)
  assert {"A", "B", "beta", "residuals", "outliers", "warnings"} <= told.keys()
  assert told["conventions"]["C"] == "C = 6 N D"
  assert err.splitlines() == [f"lmjax: warning: {warning}" for warning in told["warnings"]]


def test_compute_stands_for_tokens(fit, file):
  by_tokens, by_flops = fit(file, *CSV_FLAGS)[0], fit(file, "--size=params", "--flops=flops", "--loss=final")[0]
  assert by_flops["beta"] == pytest.approx(by_tokens["beta"], rel=1e-3)
  assert by_flops["conventions"]["D"] == "from column flops by C = 6 N D"


def test_a_sweep_and_its_conventions(fit, sweep):
  total, _ = fit(sweep)
  inner, _ = fit(sweep, "--params=non_embedding", "--flops_per_param_token=2")
  assert total["num_runs"] == 20 and total["conventions"]["N"] == "column num_params"
  # Half the size, the same exponent: A / (N/2)^alpha has a smaller A.
  assert inner["alpha"] == pytest.approx(total["alpha"], rel=1e-4)
  assert inner["A"] == pytest.approx(total["A"] / 2 ** total["alpha"], rel=1e-3)
  assert inner["residuals"][0]["flops"] == pytest.approx(2 * SIZES[0] / 2 * TOKENS[0])
  recorded, _ = fit(sweep, "--tokens=num_tokens", "--flops=train_flops")
  assert recorded["residuals"][0]["flops"] == pytest.approx(7 * SIZES[0] * TOKENS[0])


def test_the_largest_run_is_foretold(fit, file):
  # The largest is left out: 10 times the size and tokens of what is left, 100 times the compute.
  lines = file.read_text().splitlines()
  kept = [line for line in lines[1:] if float(line.split(",")[0]) < 9e9 and float(line.split(",")[1]) < 3e11]
  file.write_text("\n".join([lines[0], *kept]) + "\n")
  told, _ = fit(file, *CSV_FLAGS, "--predict=1e10,4e11")
  prediction, = told["predictions"]
  held_out = float(lines[-1].split(",")[-1])
  assert prediction["times_largest_run"] > 8 and prediction["loss"] == pytest.approx(held_out, rel=0.01)
  assert prediction["interval"][0] < held_out < prediction["interval"][1]


def test_held_out_runs_are_foretold_and_drawn(fit, file, tmp_path):
  told, _ = fit(file, *CSV_FLAGS, "--hold_out=2", f"--plot={tmp_path / 'fit.png'}")
  assert told["num_runs"] == 18 and [row["run"] for row in told["held_out"]] == ["line 17", "line 21"]
  assert told["held_out"][1]["times_largest_run"] == pytest.approx(10)  # The next are of ten times less.
  assert (tmp_path / "fit.png").read_bytes()[1:4] == b"PNG"


def test_the_best_value_of_a_setting(fit, tmp_path):
  path = tmp_path / "rates.csv"
  lines = [f"{n},{20 * n},{0.3 * n ** -0.2 * f},{3 + 0.1 * np.log(f) ** 2}" for n in (1e7, 1e8, 1e9)
           for f in (0.25, 0.5, 1, 2, 4)]
  path.write_text("\n".join(["num_params,num_tokens,rate,eval_loss", *lines]) + "\n")
  told, _ = fit(path, "--best=rate")
  assert told["exponent"] == pytest.approx(-0.2, rel=1e-4) and told["against"] == "size"


def test_it_starts_without_jax(file, lmjax_command):
  path = pathlib.Path(file).parent / "check.py"
  path.write_text("import sys\nfrom lmjax.commands import cli\nassert cli.run(sys.argv[1:]) == 0\n"
                  "assert 'jax' not in sys.modules\n")
  root = cli.__file__.removesuffix("/lmjax/commands/cli.py")
  done = subprocess.run([sys.executable, path, "fit", file, *CSV_FLAGS, "--bootstrap=100"], capture_output=True,
                        text=True, env={"PYTHONPATH": root}, timeout=120)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv, message", [
    ([], r"needs --input"),
    (["nowhere"], r"There is no file or folder nowhere"),
    (["{folder}"], r"holds no run"),
    (["{file}"], r"has no column 'num_params' for --size; its columns are params, toks, flops, final\."),
    (["{file}", "--size=params"], r"no column 'eval_loss' for --loss"),
    (["{file}", "--size=params", "--tokens=toks", "--loss=final", "--attention"],
     r"no column 'model\.num_layers' for --attention"),
    (["{file}", "--form=chinchila"], r"--form is 'chinchila', which it does not know; did you mean 'chinchilla'\?"),
    (["{file}", "--params=all"], r"--params is 'all', which it does not know"),
    (["{file}", "--params=total", "--size=params"], r"both say what N counts; give one"),
    (["{file}", "--bootstrap=10"], r"--bootstrap is 10, but an interval of 95% needs at least 100"),
    (["{file}", "--seed=-1"], r"--seed is -1"),
    (["{file}", "--huber_delta=0"], r"--huber_delta is 0\.0, but it must be a finite number above 0"),
    (["{file}", "--flops_per_param_token=nan"], r"--flops_per_param_token is nan"),
    (["{file}", "--hold_out=-1"], r"--hold_out is -1, but it must be at least 0"),
    (["{file}", "--size=params", "--tokens=toks", "--loss=final", "--hold_out=20"], r"--hold_out is 20, but .* has "
     "only 20 runs"),
    (["{file}", "--best=rate", "--plot=fit.png"], r"--plot is about a law of loss"),
    (["{file}", "--size=params", "--tokens=toks", "--loss=final", "--plot=nowhere/fit.png"], r"The picture "
     r"nowhere/fit\.png cannot be written"),
    (["{file}", "--plot=fit"], r"The picture fit cannot be written; give --plot a file that ends in \.png"),
    (["{file}", "--predict=1e9,x"], r"--predict has '1e9,x', but it must be N,D"),
    (["{file}", "--predict=1,2,3"], r"--predict has '1,2,3'"),
    (["{file}", "--best=rate", "--predict=1e20"], r"--predict is about a law of loss"),
    (["{file}", "--best=rate", "--against=width"], r"--against is 'width'"),
    (["{file}", "--best=rate", "--size=params", "--tokens=toks", "--loss=final"], r"no column 'rate' for --best"),
    (["{short}", "--size=params", "--tokens=toks", "--loss=final"], r"gives 3 runs, but the form chinchilla needs at "
     "least 6 for its 5 parameters"),
    (["{broken}", "--size=params", "--tokens=toks", "--loss=final"], r"broken\.csv, line 3, column 'final', is 'NA', "
     "which is not a number"),
])
def test_a_wrong_request(run_wrong, file, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  lines = file.read_text().splitlines()
  (tmp_path / "empty").mkdir()
  (tmp_path / "short.csv").write_text("\n".join(lines[:4]))
  (tmp_path / "broken.csv").write_text("\n".join([*lines[:2], lines[2].rpartition(",")[0] + ",NA", *lines[3:]]))
  paths = {"file": file, "folder": tmp_path / "empty", "short": tmp_path / "short.csv",
           "broken": tmp_path / "broken.csv"}
  before = sorted(tmp_path.rglob("*"))
  status, err, line = run_wrong("fit", *(argument.format(**paths) for argument in argv))
  assert status == 2 and len(err.splitlines()) == 1 and re.search(message, line), err
  assert sorted(tmp_path.rglob("*")) == before
