"""What the intervals promise, held against data sets whose law is known."""

import numpy as np
import pytest

from lmjax.scaling import bootstrap
from lmjax.scaling.fit import fit_law
from lmjax.scaling.laws import LAWS, Points, optimal

NUM_RESAMPLES = 400
NEW = Points(np.array([4e10]), np.array([8e11]), np.array([1.92e23]))  # 16 times the largest run of the grid.


def measure(known, points, noise, outliers, num_data_sets):
  """Fits data sets of the known law.

  Returns:
    (bias as a part of the truth, share of intervals that hold the truth) of each parameter, of the exponent of the best
    size, and the coverage of a new run as `new_run`.
  """
  law = LAWS["chinchilla"]
  truth = {**known.TRUTH, "a": known.TRUTH["beta"] / (known.TRUTH["alpha"] + known.TRUTH["beta"])}
  found, inside, new = [], [], []
  for seed in range(num_data_sets):
    loss = known.noisy_loss(points, noise, seed, outliers)
    fit = fit_law(law, points, loss)
    thetas = bootstrap.resample(fit, points, loss, np.arange(len(loss)), NUM_RESAMPLES, seed)
    drawn = law.values(np.concatenate([fit.theta[None], thetas]), fit.center)
    drawn["a"] = optimal(law, drawn, 6.0)["a"]
    degrees = len(loss) - 5
    intervals = {name: bootstrap.interval(values[1:], degrees) for name, values in drawn.items()}
    found.append([drawn[name][0] for name in truth])
    inside.append([intervals[name][0] <= truth[name] <= intervals[name][1] for name in truth])
    low, high = bootstrap.predict(fit, thetas, NEW, degrees, seed)[0]["interval"]
    new.append(low <= known.noisy_loss(NEW, noise, 10_000 + seed)[0] <= high)
  bias = np.mean(found, axis=0) / np.array(list(truth.values())) - 1
  return (dict(zip(truth, bias.tolist())),
          {**dict(zip(truth, np.mean(inside, axis=0).tolist())), "new_run": float(np.mean(new))})


def test_a_few_data_sets_are_fitted_without_bias(known):
  bias, coverage = measure(known, known.grid(), 0.005, 0.0, 12)
  # The mean of 12 is off by 2.4% / sqrt(12) = 0.7%, which is the standard error of the exponents.
  assert abs(bias["E"]) < 0.02 and abs(bias["alpha"]) < 0.03 and abs(bias["beta"]) < 0.03, bias
  # Chance puts more than three of twelve outside once in 400.
  assert min(coverage.values()) >= 9 / 12, coverage


@pytest.mark.slow
@pytest.mark.parametrize("design, noise, outliers", [
    ("grid", 0.003, 0.0), ("grid", 0.005, 0.0), ("grid", 0.005, 0.05), ("isoflop", 0.005, 0.0)])
def test_bias_and_coverage_of_200_data_sets(known, design, noise, outliers):
  bias, coverage = measure(known, getattr(known, design)(), noise, outliers, 200)
  shown = f"{design} noise {noise} outliers {outliers}: bias {bias}, coverage {coverage}"
  print(shown)
  assert abs(bias["E"]) < 0.01 and max(abs(bias[name]) for name in ("alpha", "beta", "a")) < 0.02, shown
  # Outliers that are drawn twice make intervals a little too wide.
  highest = 0.99 if outliers else 0.98
  assert all(0.92 <= coverage[name] <= highest for name in ("E", "A", "B", "alpha", "beta", "a")), shown
  assert coverage["new_run"] >= 0.9, shown
