"""Tests of the pictures: what they draw is what they are given."""

from matplotlib.figure import Figure
import numpy as np
import pytest

from lmjax.config_checks import UserError
from lmjax.scaling import analysis, plots
from lmjax.scaling.counts import FlopCount
from lmjax.scaling.curves import Curve
from lmjax.scaling.laws import Points
from lmjax.scaling.runs import Runs, Table


def told_of(known, **settings):
  size = np.geomspace(1e7, 1e9, 5)
  points = Points(*(np.concatenate([f(c) for c in (1e18, 1e19, 1e20, 1e21)]) for f in (
      lambda c: size, lambda c: c / (6 * size), lambda c: np.full(5, c))))
  loss = known.noisy_loss(points, 0.003, 0)
  runs = Runs([f"run {i}" for i in range(20)], np.arange(20), points, loss, Table("sweep", {}, [], []))
  return runs, analysis.analyse(runs, FlopCount(), analysis.Settings(num_resamples=200, curve=True, **settings))


def drawn(axes):
  return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_a_figure_has_the_runs_the_law_and_what_was_held_out(known):
  runs, told = told_of(known, hold_out=5)
  compute, sizes, residuals = plots.fit_figure(told).axes
  fitted = drawn(compute)["fitted runs"]
  np.testing.assert_allclose(fitted[:, 0], runs.points.flops[:15])
  np.testing.assert_allclose(fitted[:, 1], runs.loss[:15])
  law = drawn(compute)["law at the best size"]
  assert law[-1, 0] == pytest.approx(1e21)  # It reaches as far as what it foretells.
  np.testing.assert_allclose(drawn(compute)["held out"][0], [1e21, told["held_out"][0]["loss"]])
  assert len([label for label in drawn(sizes) if label.startswith("1.0e+")]) == 3
  np.testing.assert_allclose(drawn(residuals)["_child2"][:, 1], [100 * row["residual"] for row in told["residuals"]])


def test_panels_have_axes_of_their_own(known):
  runs, told = told_of(known, hold_out=5)
  long_before = Curve("run", 1e7, np.array([1e14, 1e18]), np.array([1e14, 1e18]), np.array([12.0, 3.0]), False)
  compute, _, residuals = plots.fit_figure(told, [long_before]).axes
  low, high = compute.get_ylim()
  assert 0.9 * runs.loss.min() < low < runs.loss.min() and runs.loss[:15].max() < high < 1.2 * runs.loss[:15].max()
  assert compute.get_xlim()[0] == pytest.approx(5e17) and "training loss" in drawn(compute)
  low, high = residuals.get_ylim()
  assert residuals.get_yscale() == "linear" and low < 0 < high


def test_many_budgets_and_lone_runs_leave_room(known):
  """Lone runs have no parabola and no name, and of many budgets a legend names some."""
  axes = Figure().subplots()
  budgets = np.geomspace(1e18, 1e21, 20)
  flops = np.append(np.repeat(budgets, 4), 1.2 * budgets)
  size = np.append(np.tile([1e7, 1.01e7, 3e7, 1e8], 20), np.full(20, 1e7))
  plots.isoflop(axes, flops, size, np.log(size / 3e7) ** 2 + 3)
  names = [text.get_text() for text in axes.get_legend().get_texts()]
  dots = [len(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"]
  assert 5 <= len(names) <= 8 and dots == [4] * 20


def test_numbers_stand_along_a_short_axis():
  axes = Figure().subplots()
  plots.residuals(axes, np.array([2e20, 4e20, 8e20]), np.array([0.01, -0.01, 0.0]), 0.01)
  ticks = [axes.xaxis.get_major_formatter()(value, 0) for value in axes.get_xticks()]
  assert {"2e20", "5e20"} <= set(ticks) and not axes.xaxis.get_minor_formatter()(3e20, 0)


def test_the_law_drawn_is_the_least_loss_of_a_compute(known):
  _, told = told_of(known)
  size = np.geomspace(1e6, 1e10, 400)
  for flops, loss in list(zip(told["curve"]["flops"], told["curve"]["loss"]))[::10]:
    at = told["E"] + told["A"] / size ** told["alpha"] + told["B"] / (flops / (6 * size)) ** told["beta"]
    assert loss == pytest.approx(at.min(), rel=1e-4)


def test_runs_without_groups_have_two_panels(known):
  points = known.grid()
  runs = Runs([str(i) for i in range(36)], np.arange(36), points, known.noisy_loss(points, 0.003, 0),
              Table("sweep", {}, [], []))
  told = analysis.analyse(runs, FlopCount(), analysis.Settings(num_resamples=100, curve=True))
  assert len(plots.fit_figure(told | {"isoflop": None}).axes) == 2


def test_a_picture_is_written_or_its_place_is_told(tmp_path):
  plots.write(Figure(), tmp_path / "picture.png")
  assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
  for path in ("none/picture.png", "picture.jpeg2000"):
    with pytest.raises(UserError, match="cannot be written"):
      plots.write(Figure(), str(tmp_path / path))
