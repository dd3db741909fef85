"""Tests of what is read from metrics.jsonl: curves, their envelope, and the noise of gradients."""

import json

import numpy as np
import pytest

from lmjax.config_checks import UserError
from lmjax.scaling import curves
from lmjax.scaling.laws import Points
from lmjax.scaling.noise import gradient_noise
from lmjax.scaling.runs import read_table

E, A, ALPHA, B, BETA = 0.0, 40.0, 0.3, 60.0, 0.3
SIZES, LENGTHS = (1e4, 4e4, 1.6e5, 6.4e5), (4e6, 1e7, 3e7, 6e7)
POINTS = Points(np.array(SIZES), np.array(LENGTHS), 12 * np.array(SIZES) * np.array(LENGTHS))


def law(n, d):
  return E + A / n ** ALPHA + B / d ** BETA


def lines_of(size, length, rng, evaluate=True, **more):
  """Returns the lines of a run that is on the law all the time, with noise on its training loss."""
  found = []
  for step in range(10, 2001, 10):
    tokens = length * step / 2000
    noisy = law(size, tokens) * np.exp(0.02 * rng.standard_normal())
    found.append({"step": step, "loss": noisy, "num_tokens": tokens, "train_flops": 6 * size * tokens,
                  **{name: value(rng) for name, value in more.items()}})
    if evaluate and step % 100 == 0:
      found.append({"step": step, "validation/loss": law(size, tokens), "validation/perplexity": 1.0})
  return found


def test_a_curve_is_of_evaluations_or_of_smoothed_training_loss():
  lines = lines_of(1e5, 1e7, np.random.default_rng(0))
  one = curves.curve("run", 1e5, lines, 6e5)
  assert one.evaluated and len(one.loss) == 20 and one.flops[-1] == pytest.approx(6 * 1e5 * 1e7)
  np.testing.assert_allclose(one.loss, law(1e5, one.tokens))
  smooth = curves.curve("run", 1e5, [line for line in lines if "loss" in line], 6e5)
  assert not smooth.evaluated and len(smooth.loss) == 200
  late = smooth.tokens > 1e6
  np.testing.assert_allclose(smooth.loss[late], law(1e5, smooth.tokens[late]), rtol=0.012)  # Lines are off by 2%.
  assert curves.curve("run", 1e5, lines[:2], 6e5) is None


def test_the_envelope_of_curves_has_the_exponents_of_the_law():
  rng = np.random.default_rng(0)
  made = [curves.curve(f"{n:g}", n, lines_of(n, d, rng), 6 * n) for n, d in zip(SIZES, LENGTHS)]
  told = curves.curve_envelope(made)
  # With alpha = beta the best size and tokens grow as the root of compute and the loss falls as C^(-alpha / 2).
  assert told["loss"]["exponent"] == pytest.approx(-ALPHA / 2, abs=0.01)
  assert told["size"]["exponent"] == pytest.approx(0.5, abs=0.08)
  assert told["tokens"]["exponent"] == pytest.approx(0.5, abs=0.08)
  assert told["of"] == "evaluations" and len(told["runs"]) >= 3
  assert curves.curve_envelope(made[:1]) is None


def test_where_some_runs_are_evaluated_the_others_are_left_out():
  rng = np.random.default_rng(0)
  made = [curves.curve(f"{n:g}", n, lines_of(n, d, rng, evaluate=n > 2e4), 6 * n) for n, d in zip(SIZES, LENGTHS)]
  assert "10000" not in curves.curve_envelope(made)["runs"]


def norms(squared, noise, small, big, dimension=400):
  """Returns functions that draw squared norms of mean gradients of small and big batches."""
  mean = np.sqrt(squared / dimension)
  draw = lambda batch: lambda rng: float(
      np.square(mean + np.sqrt(noise / dimension / batch) * rng.standard_normal(dimension)).sum())
  return {"square_small": lambda rng: float(np.mean([draw(small)(rng) for _ in range(big // small)])),
          "square_big": draw(big)}


def test_the_noise_of_synthetic_gradients_is_found_without_bias():
  rng = np.random.default_rng(0)
  made = norms(2.0, 600.0, 4, 16)
  small, big = (np.array([made[name](rng) for _ in range(3000)]) for name in ("square_small", "square_big"))
  found = gradient_noise(small, big, 4, 16)
  assert found.noise == pytest.approx(600, rel=0.03) and found.squared_norm == pytest.approx(2.0, rel=0.1)
  assert found.interval[0] < 300 < found.interval[1]


@pytest.fixture
def sweep(tmp_path):
  rng = np.random.default_rng(0)
  for i, (size, length) in enumerate(zip(SIZES, LENGTHS)):
    folder = tmp_path / f"run{i}"
    folder.mkdir()
    config = {"train": {"batch_size": 16, "grad_accum_steps": 4}, "data": {"seq_len": 100}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({"status": "finished", "num_params": size, "num_tokens": length}))
    lines = lines_of(size, length, rng, **norms(2.0, 20.0 * 2 ** i, 4, 16))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2010, "lo')
  return tmp_path


def test_a_sweep_tells_its_critical_batch_sizes(sweep):
  table = read_table(str(sweep))
  drawn, told = curves.while_training(table, POINTS)
  assert [one.name for one in drawn] == ["run0", "run1", "run2", "run3"] and told["curve_envelope"]
  # They end at the compute of their runs, by whichever convention that is counted.
  np.testing.assert_allclose([one.flops[-1] for one in drawn], POINTS.flops)
  rows = told["critical_batch"]["runs"]
  assert [row["steps"] for row in rows] == [100] * 4
  for i, row in enumerate(rows):  # tr(Sigma) / |G|^2 sequences of 100 tokens.
    assert row["interval"][0] < 10 * 100 * 2 ** i < row["interval"][1]
  assert told["critical_batch"]["law"]["exponent"] == pytest.approx(np.log(8) / np.log(15), rel=0.3)


def test_a_sweep_without_norms_has_no_critical_batch(sweep):
  for path in sweep.glob("*/metrics.jsonl"):
    path.unlink()
  drawn, told = curves.while_training(read_table(str(sweep)), POINTS)
  assert (drawn, told) == ([], {"curve_envelope": None, "critical_batch": None})


def test_a_damaged_line_is_told(sweep):
  (sweep / "run1" / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
  with pytest.raises(UserError, match=r"run1/metrics\.jsonl, line 2, is not a JSON object"):
    curves.while_training(read_table(str(sweep)), POINTS)
