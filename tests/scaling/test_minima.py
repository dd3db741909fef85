"""Tests of parabolas, power laws, envelopes and gradient noise."""

import numpy as np
import pytest

from lmjax.scaling import minima, noise


def test_groups_are_of_nearly_the_same_value():
  np.testing.assert_array_equal(minima.groups(np.array([1e18, 3e18, 1.02e18, 9.9e20, 0.99e18])), [0, 1, 0, 2, 0])
  # A chain of small steps is not one group.
  assert minima.groups(np.exp(np.arange(10) * 0.06)).max() == 4


def curves(budgets, exponent, spread, noise_scale=0.0, rng=None):
  at = np.repeat(budgets, 7)
  best = 0.1 * at ** exponent
  shift = np.tile(np.linspace(-spread, spread * 0.8, 7), len(budgets))
  loss = 3 - 0.05 * np.log(at) + 0.08 * shift ** 2
  return at, best * np.exp(shift), loss + (rng.standard_normal(len(at)) * noise_scale if rng else 0)


def test_a_parabola_has_its_minimum_where_it_was_put():
  found, degrees = minima.find_minima(*curves(np.geomspace(1e18, 1e21, 4), 0.5, 1.5))
  assert degrees == 4 * (7 - 3) and [m.num_runs for m in found] == [7] * 4
  for minimum in found:
    assert minimum.best == pytest.approx(0.1 * minimum.at ** 0.5, rel=1e-6)
    assert minimum.loss == pytest.approx(3 - 0.05 * np.log(minimum.at))
    assert minimum.curvature == pytest.approx(0.08)
  law = minima.minimum_law(found, degrees)
  assert law.exponent == pytest.approx(0.5) and law.coefficient == pytest.approx(0.1, rel=1e-5)


def test_a_minimum_beyond_the_runs_is_none():
  x = np.exp(np.array([1.0, 2.0, 3.0]))
  at = np.full(3, 1e18)
  rising, _ = minima.find_minima(at, x, np.array([1.0, 1.4, 2.0]))
  hill, _ = minima.find_minima(at, x, np.array([1.0, 2.0, 1.0]))
  assert rising[0].best is None and hill[0].best is None and hill[0].curvature < 0
  assert minima.minimum_law(rising, 0) is None


def test_intervals_of_minima_and_of_their_law_cover():
  inside_minimum, inside_law = [], []
  for seed in range(300):
    found, degrees = minima.find_minima(*curves(np.geomspace(1e18, 1e21, 5), 0.5, 1.5, 0.01,
                                                np.random.default_rng(seed)))
    law = minima.minimum_law(found, degrees)
    low, high = found[2].interval
    inside_minimum.append(low <= 0.1 * found[2].at ** 0.5 <= high)
    inside_law.append(law.exponent_interval[0] <= 0.5 <= law.exponent_interval[1])
  # The standard error of 95% of 300 is 1.3%.
  assert 0.91 <= np.mean(inside_minimum) <= 0.99 and 0.91 <= np.mean(inside_law) <= 0.995


def test_a_power_law_is_the_line_through_logarithms():
  stats = pytest.importorskip("scipy.stats")
  x = np.geomspace(1, 1e4, 8)
  y = 3 * x ** 0.7 * np.exp(0.1 * np.random.default_rng(1).standard_normal(8))
  law, line = minima.power_law(x, y), stats.linregress(np.log(x), np.log(y))
  reach = stats.t.ppf(0.975, 6) * np.array([line.stderr, line.intercept_stderr])
  assert law.exponent == pytest.approx(line.slope) and law.coefficient == pytest.approx(np.exp(line.intercept))
  assert law.exponent_interval == pytest.approx([line.slope - reach[0], line.slope + reach[0]])
  assert law.coefficient_interval == pytest.approx([np.exp(line.intercept - reach[1]),
                                                    np.exp(line.intercept + reach[1])])


def test_two_points_give_a_law_without_intervals():
  law = minima.power_law(np.array([1.0, 100.0]), np.array([2.0, 20.0]))
  assert law.exponent == pytest.approx(0.5) and law.coefficient == pytest.approx(2.0)
  assert law.exponent_interval is None


def test_the_frontier_and_its_hull():
  flops = np.array([1e3, 1e1, 1e2, 1e4, 1e2, 1e5])
  loss = np.array([3.9, 8.0, 4.0, 1.0, 5.0, 1.5])
  # By compute: 8, then 4 (and 5 at the same), 3.9, 1, and 1.5 which a cheaper run beats.
  np.testing.assert_array_equal(minima.frontier(flops, loss), [1, 2, 0, 3])
  # Logarithms over decades: 2.08, 1.39, 1.36, 0. From the second to the last a straight line is at 0.69 where the third
  # is, so that one is no corner; from the first to the last it is at 1.39 where the second is: exactly 8, 4, 1.
  loss[2] = 3.9
  loss[0] = 3.8
  np.testing.assert_array_equal(minima.lower_hull(flops, loss), [1, 2, 3])
  loss[2] = 4.1
  np.testing.assert_array_equal(minima.lower_hull(flops, loss), [1, 3])


def gradients(num_steps, batch, big, true_gradient, spread, rng):
  """Returns squared norms of the means of `batch` and of `big` examples' gradients, the first part of the second."""
  examples = true_gradient + spread * rng.standard_normal((num_steps, big, len(true_gradient)))
  square = lambda mean: (mean ** 2).sum(axis=-1)
  return square(examples[:, :batch].mean(axis=1)), square(examples.mean(axis=1))


def test_gradient_noise_of_gaussian_gradients():
  gradient = np.full(20, 0.1)  # |G|^2 = 0.2; tr(Sigma) = 20 * 0.5^2 = 5, so the critical batch size is 25.
  small, big = gradients(4000, 4, 32, gradient, 0.5, np.random.default_rng(0))
  found = noise.gradient_noise(small, big, 4, 32)
  assert found.squared_norm == pytest.approx(0.2, rel=0.03) and found.noise == pytest.approx(5.0, rel=0.03)
  assert found.critical_batch_size == pytest.approx(25, rel=0.05)
  inside = []
  for seed in range(200):
    low, high = noise.gradient_noise(*gradients(60, 4, 32, gradient, 0.5, np.random.default_rng(seed)), 4, 32).interval
    inside.append(low <= 25 <= high)
  assert 0.9 <= np.mean(inside) <= 0.99


def test_gradient_noise_by_hand():
  # |G|^2 = (4 * 2 - 1 * 5) / 3 = 1 and tr(Sigma) = (5 - 2) / (1 - 1/4) = 4.
  found = noise.gradient_noise(np.array([5.0]), np.array([2.0]), 1, 4)
  assert (found.squared_norm, found.noise, found.critical_batch_size) == pytest.approx((1.0, 4.0, 4.0))
  assert found.interval == (None, None)


def test_gradients_that_are_all_noise_have_no_critical_batch_size():
  small, big = gradients(50, 1, 8, np.zeros(5), 1.0, np.random.default_rng(1))
  found = noise.gradient_noise(small, big, 1, 8)
  assert found.squared_norm < 0 and found.critical_batch_size is None and found.interval == (None, None)


@pytest.mark.parametrize("small, big, sizes", [([1.0], [1.0], (8, 8)), ([1.0], [1.0, 2.0], (1, 8)), ([], [], (1, 8))])
def test_norms_that_do_not_belong_together(small, big, sizes):
  with pytest.raises(ValueError, match="must"):
    noise.gradient_noise(np.array(small), np.array(big), *sizes)
