"""Tests of the fit against truths, scipy and values worked out by hand."""

import numpy as np
import pytest
from scipy import optimize, special

from lmjax.scaling import bootstrap, choice, fit
from lmjax.scaling.laws import LAWS, Center, Points

CHINCHILLA = LAWS["chinchilla"]


def test_hubers_loss():
  np.testing.assert_allclose(fit.huber(np.array([0.0, 0.5, -1.0, 3.0, -4.0]), 1.0), [0, 0.125, 0.5, 2.5, 3.5])


def test_without_noise_the_truth_is_found(known):
  points = known.grid(4, 4)
  found = fit.fit_law(CHINCHILLA, points, known.true_loss(points))
  assert found.values == pytest.approx(known.TRUTH, rel=1e-6)


@pytest.mark.parametrize("name", LAWS)
def test_no_start_of_scipy_ends_lower(known, name):
  law, points, delta = LAWS[name], known.grid(5, 4), 0.004
  loss = known.noisy_loss(points, 0.005, 3, 0.1)
  logs, target, bounds = Center.of(points).relative(points), np.log(loss), law.bounds(loss)
  found = fit.fit_law(law, points, loss, huber_delta=delta)
  objective = fit.huber(found.residuals, delta).sum()

  def by_scipy(theta):
    return special.huber(delta, target - law.log_loss(theta[None], logs)[0][0]).sum() / delta ** 2
  starts = np.clip(law.starts(loss)[::23], bounds[:, 0], bounds[:, 1])
  options = {"maxiter": 1000, "ftol": 1e-12}
  ends = [optimize.minimize(by_scipy, start, method="SLSQP", bounds=bounds, options=options).fun for start in starts]
  assert objective / delta ** 2 <= min(ends) * (1 + 1e-6)
  assert objective / delta ** 2 == pytest.approx(min(ends), rel=0.01)


def test_outliers_move_the_fit_less_than_least_squares(known):
  points = known.grid()
  loss = known.noisy_loss(points, 0.003, 5)
  loss[[3, 20]] *= 1.1
  robust = fit.fit_law(CHINCHILLA, points, loss).values
  squares = fit.fit_law(CHINCHILLA, points, loss, huber_delta=10.0).values
  off = lambda values: abs(values["E"] / known.TRUTH["E"] - 1)
  assert off(robust) < 0.03 < off(squares)


def test_the_scale_of_noise_is_robust():
  z = np.random.default_rng(0).standard_normal(20_000) * 0.01
  assert fit.robust_scale(z, 5) == pytest.approx(0.01, rel=0.02)
  z[:400] = 1.0  # Two of a hundred, a hundred times too far, which a standard deviation takes for 0.14.
  assert fit.robust_scale(z, 5) == pytest.approx(0.01, rel=0.06)
  assert fit.robust_scale(np.zeros(10), 5) == 0


def test_weights_count_rows_as_often(known):
  points = known.grid(5, 4)
  loss = known.noisy_loss(points, 0.005, 0)
  first = fit.fit_law(CHINCHILLA, points, loss)
  times = np.random.default_rng(0).integers(1, 3, len(loss))
  rows = np.repeat(np.arange(len(loss)), times)
  logs, bounds = first.center.relative(points), CHINCHILLA.bounds(loss)
  weighted = fit.solve(CHINCHILLA, logs, np.log(loss), first.theta[None], 0.01, bounds, weights=times[None] * 1.0)[0]
  repeated = fit.solve(CHINCHILLA, tuple(x[rows] for x in logs), np.log(loss)[rows], first.theta[None], 0.01, bounds)[0]
  np.testing.assert_allclose(weighted, repeated, rtol=1e-5)


def test_rows_of_a_run_are_drawn_together(known):
  # Each run's rows carry the same noise: drawn one by one, they look like four times as many runs as there are.
  one = known.grid()
  rng = np.random.default_rng(0)
  repeat = lambda x: np.repeat(x, 4)
  points = Points(repeat(one.size), repeat(one.tokens), repeat(one.flops))
  loss = known.true_loss(points) * np.exp(repeat(0.005 * rng.standard_normal(len(one))))
  found = fit.fit_law(CHINCHILLA, points, loss)
  width = {}
  for name, runs in (("by run", repeat(np.arange(len(one)))), ("by row", np.arange(len(loss)))):
    drawn = bootstrap.resample(found, points, loss, runs, 400, 0)
    width[name] = np.subtract(*bootstrap.interval(drawn[:, 3], 30)[::-1])
  assert width["by run"] == pytest.approx(2 * width["by row"], rel=0.25)


def test_a_bootstrap_follows_its_seed(known):
  points = known.grid(4, 4)
  loss = known.noisy_loss(points, 0.005, 0)
  found = fit.fit_law(CHINCHILLA, points, loss)
  draw = lambda seed: bootstrap.resample(found, points, loss, np.arange(16), 20, seed)
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()


def test_intervals_are_taken_further_out_for_few_runs():
  values = np.linspace(0, 1, 100_001)
  assert bootstrap.interval(values, 10**7) == pytest.approx([0.025, 0.975], abs=1e-4)
  # Student's t with 10 degrees has 2.22814 at 97.5%; beyond that lies 0.012936 of a normal distribution.
  assert bootstrap.interval(values, 10) == pytest.approx([0.012936, 0.987064], abs=1e-4)


def test_a_prediction_holds_the_noise_of_a_run(known):
  points = known.grid()
  loss = known.noisy_loss(points, 0.01, 0)
  found = fit.fit_law(CHINCHILLA, points, loss)
  drawn = bootstrap.resample(found, points, loss, np.arange(36), 200, 0)
  inside = Points(np.array([4e8]), np.array([1e10]), np.array([2.4e19]))
  told, = bootstrap.predict(found, drawn, inside, 31, 0)
  width = lambda name: np.log(told[name][1] / told[name][0])
  assert told["loss"] == pytest.approx(known.true_loss(inside)[0], rel=0.02)
  # In the midst of the runs noise is nearly all there is: 2 * 1.96 * 0.01.
  assert width("law_interval") < 0.02 < 0.03 < width("interval") < 0.06


@pytest.mark.parametrize("name, loss", [
    ("chinchilla", lambda p: 1.69 + 406.4 / p.size ** 0.34 + 410.7 / p.tokens ** 0.28),
    ("shared", lambda p: 1.5 + 500 / p.size ** 0.3 + 900 / p.tokens ** 0.3),
    # Kaplan et al. 2020, table 2.
    ("kaplan", lambda p: ((6.4e13 / p.size) ** (0.076 / 0.103) + 1.8e13 / p.tokens) ** 0.103),
    ("compute", lambda p: 1.6 + 60 / p.flops ** 0.09)])
def test_the_true_form_is_chosen(known, name, loss):
  points = known.grid()
  noisy = loss(points) * np.exp(0.002 * np.random.default_rng(1).standard_normal(len(points)))
  scores = choice.compare(points, noisy, np.arange(len(points)), None, 0)
  # A form that holds the true one with a parameter more foretells nearly as well.
  by_name = {score.form: score for score in scores}
  assert by_name[name].error <= 1.1 * scores[0].error
  others = [score for score in scores if score.num_params < by_name[name].num_params]
  assert all(score.error > by_name[name].error for score in others)


def test_too_few_runs_for_a_form_leave_it_out(known):
  points = known.grid(2, 2)
  names = {score.form for score in choice.compare(points, known.true_loss(points), np.arange(4), None, 0)}
  assert names == {"compute"}
