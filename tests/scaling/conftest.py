"""Runs of a known law, with the noise of seeds: what the tests here share, as the fixture `known`."""

import types

import numpy as np
import pytest

from lmjax.scaling.laws import Points

# Hoffmann et al. 2022, equation 10.
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def true_loss(points):
  t = TRUTH
  return t["E"] + t["A"] / points.size ** t["alpha"] + t["B"] / points.tokens ** t["beta"]


def grid(num_sizes=6, num_tokens=6):
  """Sizes and tokens over 2.7 decades each, which makes 36 runs over 5.4 decades of compute."""
  size, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(2e7, 1e10, num_sizes),
                                                 np.geomspace(4e8, 2e11, num_tokens)))
  return Points(size, tokens, 6 * size * tokens)


def isoflop(num_budgets=6, num_sizes=7):
  """Budgets of 1e18 to 1e21, each spent on sizes of a fifth to five times the best guess: 42 runs."""
  flops = np.repeat(np.geomspace(1e18, 1e21, num_budgets), num_sizes)
  size = np.sqrt(flops / 120) * np.tile(np.geomspace(0.2, 5, num_sizes), num_budgets)
  return Points(size, flops / 6 / size, flops)


def noisy_loss(points, noise, seed, outliers=0.0):
  """Returns losses with log-normal noise; a part of them, the outliers, has six times as much."""
  rng = np.random.default_rng(seed)
  z = rng.standard_normal(len(points)) * np.where(rng.random(len(points)) < outliers, 6.0, 1.0)
  return true_loss(points) * np.exp(noise * z)


@pytest.fixture(scope="session")
def known():
  """Returns TRUTH, true_loss, grid, isoflop and noisy_loss."""
  return types.SimpleNamespace(TRUTH=TRUTH, true_loss=true_loss, grid=grid, isoflop=isoflop, noisy_loss=noisy_loss)
