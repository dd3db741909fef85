"""Tests of the whole analysis: what it tells, and what it warns of."""

import json

import numpy as np
import pytest

from lmjax.config_checks import UserError
from lmjax.scaling import analysis
from lmjax.scaling.counts import FlopCount
from lmjax.scaling.laws import Points
from lmjax.scaling.runs import Runs, Table


def make_runs(points, loss):
  return Runs([f"run {i}" for i in range(len(loss))], np.arange(len(loss)), points, loss, Table("sweep", {}, [], []))


def analyse(points, loss, **settings):
  return analysis.analyse(make_runs(points, loss), FlopCount(), analysis.Settings(num_resamples=200, **settings))


def test_a_known_law_is_told_with_its_optimum(known):
  points = known.grid()
  told = analyse(points, known.noisy_loss(points, 0.003, 0), predict=((4e10, 8e11), (1.92e23,)))
  for name, value in known.TRUTH.items():
    assert told["intervals"][name][0] < value < told["intervals"][name][1]
    assert told["intervals"][name][0] < told[name] < told["intervals"][name][1]
  best = told["compute_optimal"]
  assert best["a"] == pytest.approx(0.28 / 0.62, rel=0.05) and best["a"] + best["b"] == pytest.approx(1)
  assert best["intervals"]["a"][0] < 0.28 / 0.62 < best["intervals"]["a"][1]
  assert told["noise"] == pytest.approx(0.003, rel=0.4) and told["warnings"] == []
  given, optimal = told["predictions"]
  held_out = known.true_loss(Points(np.array([4e10]), np.array([8e11]), np.array([1.0])))[0]
  assert given["loss"] == pytest.approx(held_out, rel=0.01) and given["times_largest_run"] == pytest.approx(16)
  assert given["interval"][0] < held_out < given["interval"][1]
  assert optimal["loss"] < given["loss"] and 6 * optimal["size"] * optimal["tokens"] == pytest.approx(1.92e23)
  assert len(told["residuals"]) == 36
  first = told["residuals"][0]
  assert first["residual"] == pytest.approx(np.log(first["loss"] / first["predicted"]))
  json.dumps(told, allow_nan=False)


def test_outliers_are_shown_and_dropped_only_when_asked(known):
  points = known.grid()
  loss = known.noisy_loss(points, 0.003, 0)
  loss[7] *= 1.15
  shown, dropped = analyse(points, loss), analyse(points, loss, drop_outliers=True)
  assert shown["outliers"] == ["run 7"] and shown["num_runs"] == 36 and shown["dropped"] == []
  assert any("run 7" in warning and "--drop_outliers" in warning for warning in shown["warnings"])
  assert [row["run"] for row in shown["residuals"] if row["outlier"]] == ["run 7"]
  assert [row["run"] for row in dropped["dropped"]] == ["run 7"] and dropped["num_runs"] == 35
  assert dropped["outliers"] == [] and "run 7" not in [row["run"] for row in dropped["residuals"]]


def test_runs_on_a_line_do_not_tell_the_terms_apart(known):
  size = np.geomspace(1e7, 1e10, 12)
  points = Points(size, 20 * size, 120 * size ** 2)
  told = analyse(points, known.noisy_loss(points, 0.003, 0))
  assert any("on one line, tokens growing as size^1," in warning for warning in told["warnings"])


def test_one_size_tells_no_exponent_of_it(known):
  tokens = np.geomspace(1e9, 1e12, 10)
  points = Points(np.full(10, 1e8), tokens, 6e8 * tokens)
  told = analyse(points, known.noisy_loss(points, 0.003, 0))
  assert any("fewer than 3 different sizes, so the exponent of size cannot" in warning for warning in told["warnings"])
  assert any("Other values of E, A, alpha fit these runs as well" in warning for warning in told["warnings"])


def test_what_other_values_fit_as_well_has_no_interval(known):
  """Of two sizes E, A and alpha are one number too many, so that what they give elsewhere is not known either."""
  sizes, tokens = (x.ravel() for x in np.meshgrid([1e8, 1e9], np.geomspace(1e9, 1e12, 8)))
  points = Points(sizes, tokens, 6 * sizes * tokens)
  among, beyond = (1e9, 1e13), (1e10, 1e11)
  told = analyse(points, known.noisy_loss(points, 0.003, 0), predict=(among, beyond, (1e22,)), curve=True)
  open_ones = {name for name, interval in told["intervals"].items() if interval is None}
  assert open_ones == {"E", "A", "alpha"} and told["intervals"]["beta"][0] < 0.28 < told["intervals"]["beta"][1]
  assert set(told["compute_optimal"]["intervals"].values()) == {None} and np.isnan(told["curve"]["low"]).all()
  inside, outside, at_best = told["predictions"]
  truth = known.true_loss(Points(*(np.array([value]) for value in (*among, 6e22))))[0]
  assert inside["interval"][0] < truth < inside["interval"][1]
  assert outside["interval"] is outside["law_interval"] is at_best["interval"] is None
  told = analyse(points, known.noisy_loss(points, 0.003, 0), form="shared")  # Here the tokens tell the exponent.
  assert [name for name, interval in told["intervals"].items() if interval is None] == []


def test_a_loss_far_too_low_does_not_hold_the_floor_down(known):
  points = known.grid()
  loss = known.noisy_loss(points, 0.003, 0)
  clean = analyse(points, loss)
  loss[7] *= 0.4
  told = analyse(points, loss)
  assert told["outliers"] == ["run 7"] and told["E"] == pytest.approx(clean["E"], rel=0.02)


def test_bad_settings_among_the_runs_are_told(known):
  points = known.grid()
  loss = known.noisy_loss(points, 0.003, 0)
  twice = Points(*(np.append(values, values[7]) for values in (points.size, points.tokens, points.flops)))
  told, fine = (analyse(twice, np.append(loss, loss[7] * factor)) for factor in (1.2, 1.01))
  said = "differ by up to 20% in loss (run 7 and run 36)"
  assert any(said in warning for warning in told["warnings"])
  assert not any("differ by" in warning for warning in fine["warnings"])


def test_compute_alone_foretells_no_size(known):
  points = known.grid()
  own = Points(points.size, points.tokens, 1.4 * points.flops)  # Counted otherwise than 6 N D.
  loss = 2.0 + 1e3 * own.flops ** -0.2
  told = analyse(own, loss, form="compute", predict=((1e22,), (1e9, 1e11)))
  compute, both = told["predictions"]
  assert compute["size"] is compute["tokens"] is None and compute["loss"] == pytest.approx(2.0 + 1e3 * 1e22 ** -0.2)
  assert both["loss"] == pytest.approx(2.0 + 1e3 * (1.4 * 6e20) ** -0.2)


def test_a_short_range_does_not_reach_the_floor(known):
  size, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 3e7, 4), np.geomspace(2e8, 6e8, 4)))
  points = Points(size, tokens, 6 * size * tokens)
  told = analyse(points, known.noisy_loss(points, 0.01, 0))
  assert any("interval of E includes 0" in warning for warning in told["warnings"])
  assert any("do not identify" in warning for warning in told["warnings"])


def test_few_runs_are_rough(known):
  points = known.grid(3, 3)
  told = analyse(points, known.noisy_loss(points, 0.003, 0))
  assert any("9 runs leave 4 degrees of freedom beside the 5 parameters" in warning for warning in told["warnings"])


def test_too_few_runs(known):
  points = known.grid(2, 2)
  for form, words in (("chinchilla", "4 runs, but the form chinchilla needs at least 6 for its 5"),
                      ("kaplan", "the form kaplan needs at least 5")):
    with pytest.raises(UserError, match=words):
      analyse(points, known.true_loss(points), form=form)


def test_auto_tells_how_each_form_did(known):
  points = known.grid()
  told = analyse(points, known.noisy_loss(points, 0.002, 0), form="auto")
  assert told["form"] == "chinchilla" and len(told["forms"]) == 5
  assert told["forms"][0]["form"] == "chinchilla"
  assert told["forms"][0]["error"] == min(form["error"] for form in told["forms"])


def test_a_law_of_compute_has_no_optimum(known):
  points = known.isoflop()
  told = analyse(points, 1.7 + 60 / points.flops ** 0.09, form="compute", predict=((1e22,),))
  assert told["compute_optimal"] is None and told["gamma"] == pytest.approx(0.09, rel=1e-3)
  assert told["predictions"][0]["loss"] == pytest.approx(1.7 + 60 / 1e22 ** 0.09, rel=1e-4)


def test_isoflop_curves_of_a_known_law(known):
  points = known.isoflop()
  loss = known.noisy_loss(points, 0.001, 0)
  told = analysis.isoflop(make_runs(points, loss))
  # The curves are no parabolas but near enough, as the paper found.
  assert told["size"]["exponent"] == pytest.approx(0.28 / 0.62, abs=0.03)
  assert told["tokens"]["exponent"] == pytest.approx(0.34 / 0.62, abs=0.03)
  assert len(told["groups"]) == 6 and told["groups"][0]["num_runs"] == 7
  assert analysis.isoflop(make_runs(known.grid(1, 4), known.true_loss(known.grid(1, 4)))) is None


def test_the_best_learning_rate_by_size():
  size = np.repeat([1e7, 1e8, 1e9], 5)
  rate = 0.3 * size ** -0.2 * np.tile([0.25, 0.5, 1.0, 2.0, 4.0], 3)
  loss = 3 + 0.1 * np.log(rate / (0.3 * size ** -0.2)) ** 2
  runs = make_runs(Points(size, 20 * size, 120 * size ** 2), loss)
  told = analysis.best_value(runs, rate, "optim.learning_rate", "size")
  assert told["exponent"] == pytest.approx(-0.2) and told["coefficient"] == pytest.approx(0.3, rel=1e-6)
  assert [group["num_runs"] for group in told["groups"]] == [5, 5, 5] and told["warnings"] == []
  with pytest.raises(UserError, match=r"0 groups of equal tokens with a best rate .* needs two"):
    analysis.best_value(make_runs(Points(size, np.arange(1, 16) ** 3.0, size), loss), rate, "rate", "tokens")


def test_the_largest_runs_are_held_out_and_foretold(known):
  points = known.grid()
  loss = known.noisy_loss(points, 0.003, 0)
  told = analyse(points, loss, hold_out=2)
  largest = np.argsort(points.flops, kind="stable")[-2:]
  assert told["num_runs"] == 34 and {row["run"] for row in told["held_out"]} == {f"run {i}" for i in largest}
  for row in told["held_out"]:
    assert row["loss"] == loss[int(row["run"].removeprefix("run "))]
    assert row["error"] == pytest.approx(row["predicted"] / row["loss"] - 1) and abs(row["error"]) < 0.02
    assert row["inside"] == (row["interval"][0] <= row["loss"] <= row["interval"][1])
  # The law has not seen them: it is the same whatever they are.
  loss[largest] *= 2
  assert analyse(points, loss, hold_out=2)["E"] == told["E"]
  with pytest.raises(UserError, match=r"--hold_out is 36, but sweep has only 36 runs"):
    analyse(points, loss, hold_out=36)
