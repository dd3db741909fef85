"""The forms against values worked out by hand and with scipy."""

import numpy as np
import pytest
from scipy import optimize

from lmjax.scaling import laws
from lmjax.scaling.laws import LAWS, Center, Points

POINTS = Points(np.array([1e8, 1e8, 4e9, 3e7]), np.array([2e9, 3e10, 1e11, 1e9]), np.array([1e18, 2e19, 3e21, 2e17]))
CENTER = Center(np.log(2e8), np.log(3e9), np.log(1e19))
# Each form's inner parameters, and what it is by its formula with the values that `values` tells.
FORMULAS = {
    "chinchilla": ([0.5, -0.3, 0.2, 0.34, 0.28],
                   lambda v, p: v["E"] + v["A"] / p.size ** v["alpha"] + v["B"] / p.tokens ** v["beta"]),
    "shared": ([0.5, -0.3, 0.2, 0.31],
               lambda v, p: v["E"] + v["A"] / p.size ** v["alpha"] + v["B"] / p.tokens ** v["beta"]),
    "no_floor": ([0.3, 0.2, 0.1, 0.05], lambda v, p: v["A"] / p.size ** v["alpha"] + v["B"] / p.tokens ** v["beta"]),
    "kaplan": ([11.0, 10.0, 0.8, 0.095], lambda v, p: (
        (v["N_c"] / p.size) ** (v["alpha_N"] / v["alpha_D"]) + v["D_c"] / p.tokens) ** v["alpha_D"]),
    "compute": ([0.5, 0.1, 0.1], lambda v, p: v["E"] + v["K"] / p.flops ** v["gamma"]),
}


def test_every_form_is_here():
  assert FORMULAS.keys() == LAWS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_what_the_formula_says(name):
  theta, formula = FORMULAS[name]
  law, theta = LAWS[name], np.array([theta])
  assert theta.shape[1] == law.num_params()
  values = {key: value[0] for key, value in law.values(theta, CENTER).items()}
  found = np.exp(law.log_loss(theta, CENTER.relative(POINTS))[0][0])
  np.testing.assert_allclose(found, formula(values, POINTS), rtol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_derivatives_are_right(name):
  law, theta, logs = LAWS[name], np.array(FORMULAS[name][0]), CENTER.relative(POINTS)
  numeric = optimize.approx_fprime(theta, lambda t: law.log_loss(t[None], logs)[0][0], 1e-7)
  np.testing.assert_allclose(law.log_loss(theta[None], logs)[1][0], numeric, rtol=1e-4, atol=1e-6)


def test_hoffmanns_law_has_the_published_values():
  # Hoffmann et al. 2022, equation 10 and table 2: a = 0.46, b = 0.54 from alpha = 0.34, beta = 0.28, which they round.
  values = {"alpha": np.array([0.34]), "beta": np.array([0.28]), "A": np.array([406.4]), "B": np.array([410.7])}
  best = laws.optimal(LAWS["chinchilla"], values, 6.0)
  assert best["a"][0] == pytest.approx(0.28 / 0.62) and best["b"][0] == pytest.approx(0.34 / 0.62)
  assert best["a"][0] == pytest.approx(0.46, abs=0.01)
  # G = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) = 1.20156 ** 1.6129 = 1.3447
  assert best["N_coefficient"][0] * 6 ** best["a"][0] == pytest.approx(1.3447, rel=1e-3)


@pytest.mark.parametrize("name", ["chinchilla", "shared", "no_floor", "kaplan"])
def test_the_optimum_is_the_least_loss_at_a_compute(name):
  law, theta = LAWS[name], np.array([FORMULAS[name][0]])
  best = laws.optimal(law, law.values(theta, CENTER), 6.0)

  def log_loss(log_size, flops):
    size = np.exp([log_size])
    return law.log_loss(theta, CENTER.relative(Points(size, flops / 6 / size, np.array([flops]))))[0][0, 0]
  for flops in (1e18, 1e21):
    size = optimize.minimize_scalar(log_loss, bounds=(5, 40), method="bounded", args=(flops,),
                                    options={"xatol": 1e-9}).x
    assert np.log(best["N_coefficient"][0] * flops ** best["a"][0]) == pytest.approx(size, abs=1e-4)
    assert best["N_coefficient"][0] * best["D_coefficient"][0] == pytest.approx(1 / 6)
