"""Tests of search spaces: against lists written by hand, and the sentences for mistakes."""

import math
import re

import numpy as np
import pytest

from lmjax.config_checks import UserError
from lmjax.sweeps import Sweep, chain, conditional, grid, integer, log_uniform, product, uniform, values, zipped
from lmjax.sweeps.space import Cube, as_flags, dimensions, draw, fields, is_list, points
from lmjax.sweeps.sweep import cubes, planned, planned_settings, resolve

RATE, BATCH, DEPTH, NAME = "optim.learning_rate", "train.batch_size", "model.num_layers", "optim.name"


def rows(*names):
  return lambda *lines: [dict(zip(names, line)) for line in lines]


@pytest.mark.parametrize("space, expected", [
    (values("seed", [3, 1]), rows("seed")((3,), (1,))),
    (grid({RATE: [0.1, 0.2], BATCH: [4, 8]}), rows(RATE, BATCH)((0.1, 4), (0.1, 8), (0.2, 4), (0.2, 8))),
    (zipped(values(RATE, [0.1, 0.2]), values(BATCH, [4, 8])), rows(RATE, BATCH)((0.1, 4), (0.2, 8))),
    (chain(values(RATE, [0.1]), grid({RATE: [0.2], BATCH: [4]})), [{RATE: 0.1}, {RATE: 0.2, BATCH: 4}]),
    (product(values("seed", [0, 1]), chain(values(DEPTH, [2]), values(BATCH, [4]))),
     [{"seed": 0, DEPTH: 2}, {"seed": 0, BATCH: 4}, {"seed": 1, DEPTH: 2}, {"seed": 1, BATCH: 4}]),
    (conditional(NAME, {"adamw": None, "muon": values("optim.momentum", [0.9, 0.95])}),
     [{NAME: "adamw"}, {NAME: "muon", "optim.momentum": 0.9}, {NAME: "muon", "optim.momentum": 0.95}]),
    (product(zipped(values(RATE, [0.1, 0.2]), grid({BATCH: [4], DEPTH: [2, 3]})), values("seed", [7])),
     rows(RATE, BATCH, DEPTH, "seed")((0.1, 4, 2, 7), (0.2, 4, 3, 7))),
    (values("data.weights", [[0.5, 0.5], (0.9, 0.1)]), [{"data.weights": (0.5, 0.5)}, {"data.weights": (0.9, 0.1)}]),
])
def test_a_list_is_as_written_by_hand(space, expected):
  assert is_list(space) and points(space) == expected


def test_every_point_of_a_list_is_drawn_at_its_place():
  space = product(values("seed", [0, 1]), chain(values(DEPTH, [2]), conditional(NAME, {
      "adamw": None, "muon": zipped(values(BATCH, [4, 8]), values(RATE, [0.1, 0.2]))})))
  # Choices: the seed, the chain's part, the depth, the name, the pair.
  assert len(list(dimensions(space))) == 5
  assert draw(space, Cube(space, [0.0, 0.4, 0, 0, 0])) == {"seed": 0, DEPTH: 2}
  assert draw(space, Cube(space, [0.9, 0.6, 0, 0.2, 0])) == {"seed": 1, NAME: "adamw"}
  assert draw(space, Cube(space, [0.9, 0.6, 0, 0.5, 1.0])) == {"seed": 1, NAME: "muon", BATCH: 8, RATE: 0.2}


def test_ranges_reach_from_end_to_end():
  at = lambda of, *shares: [of.at(share) for share in shares]
  assert at(uniform("model.dropout", 0.1, 0.5), 0, 0.5, 1) == pytest.approx([0.1, 0.3, 0.5])
  assert at(log_uniform(RATE, 1e-4, 1e-2), 0, 0.5, 1) == pytest.approx([1e-4, 1e-3, 1e-2])
  assert at(integer(DEPTH, 2, 9, step=3), 0, 0.34, 0.67, 1) == [2, 5, 8, 8]
  assert at(integer(DEPTH, 1, 3), 0, 0.32, 0.34, 0.66, 0.67, 1) == [1, 1, 2, 2, 3, 3]
  log = integer(BATCH, 1, 1024, log=True)
  # By halves: from 1/2 to 1024.5 in equal factors, the middle of which is the root of 0.5 * 1024.5.
  assert at(log, 0, 0.5, 1) == [1, round(math.sqrt(0.5 * 1024.5)), 1024]
  assert all(isinstance(number, int) for number in at(log, 0, 0.3, 1))


@pytest.mark.parametrize("make, message", [
    (lambda: values("optim.learning_rat", [1]), "'optim.learning_rat' that does not exist; did you mean "
     "'optim.learning_rate'?"),
    (lambda: values("learning_rate", [1]), "did you mean 'optim.learning_rate'?"),
    (lambda: uniform("qqq", 0, 1), "'qqq' that does not exist; lmjax train --help_config lists them all."),
    (lambda: values(RATE, []), "gives optim.learning_rate no values"),
    (lambda: values(RATE, [1, 2, 1]), "gives optim.learning_rate the value 1 twice"),
    (lambda: product(), "has an empty product()"),
    (lambda: chain(), "has an empty chain()"),
    (lambda: product(values(RATE, [1]), log_uniform(RATE, 1, 2)), "Two parts of the search space set "
     "optim.learning_rate at once"),
    (lambda: product(values(RATE, [1]), chain(values(BATCH, [1]), values(RATE, [2]))), "set optim.learning_rate at"),
    (lambda: conditional(NAME, {"muon": values(NAME, ["adamw"])}), "set optim.name at once"),
    (lambda: zipped(values(RATE, [1]), values(BATCH, [1, 2])), "which have 1 and 2 choices"),
    (lambda: zipped(values(RATE, [1]), uniform("model.dropout", 0, 1)), "has a range for model.dropout"),
    (lambda: uniform("model.dropout", 0.5, 0.5), "from 0.5 to 0.5, but a range goes from"),
    (lambda: log_uniform(RATE, 0, 1), "goes from a number above 0 to a larger one"),
    (lambda: integer(BATCH, 1, 2.5), "must be whole"),
    (lambda: integer(BATCH, "1", 2), "integer('train.batch_size', '1', 2, step=1), but its numbers must be whole"),
    (lambda: uniform(RATE, "1e-4", "1e-2"), "from '1e-4' to '1e-2', but a range goes from a number to a larger one"),
    (lambda: values(RATE, 1e-3), "gives optim.learning_rate 0.001, but it must be a list of values"),
    (lambda: values(NAME, "adamw"), "gives optim.name 'adamw', but it must be a list of values"),
    (lambda: values([1e-3], RATE), "a setting [0.001] that does not exist"),
    (lambda: grid([RATE, BATCH]), "grid() of the search space is given a list, but it must be settings with"),
    (lambda: product({RATE: [1]}, values("seed", [0])), "A part of product() is of type dict, but it must be a search "
     "space, such as values(...) or grid({...})."),
    (lambda: chain([values(RATE, [1]), values("seed", [0])]), "A part of chain() is of type list, but it must be"),
    (lambda: zipped({RATE: [1]}), "A part of zipped() is of type dict"),
    (lambda: conditional(NAME, ["adamw"]), "gives conditional('optim.name') a list, but it must be values with"),
    (lambda: conditional(NAME, {"muon": {}}), "What conditional('optim.name') has for 'muon' is of type dict"),
    (lambda: resolve(Sweep({RATE: [1e-3]})), "The sweep's space is of type dict, but it must be a search space"),
    (lambda: integer(BATCH, 1, 9, step=2, log=True), "both a step and log"),
    (lambda: resolve(Sweep(values(RATE, [1]), driver="sobel")), "driver is 'sobel', which it does not know; did you "
     "mean 'sobol'?"),
    (lambda: resolve(Sweep(values(RATE, [1]), pruner="media")), "did you mean 'median'?"),
    (lambda: resolve(Sweep(uniform("model.dropout", 0, 1), driver="grid")), "has a range for model.dropout"),
    (lambda: resolve(Sweep(uniform("model.dropout", 0, 1))), "driver is sobol, which needs to know how many"),
    (lambda: resolve(Sweep(values(RATE, [1]), num_trials=0)), "num_trials is 0, but it must be a whole number of at "
     "least 1"),
])
def test_a_mistake_is_one_sentence(make, message):
  with pytest.raises(UserError, match=re.escape(message)) as e:
    make()
  assert "\n" not in str(e.value) and str(e.value).endswith((".", "?"))


def test_numbers_of_numpy_are_numbers():
  rates, depths = values(RATE, np.logspace(-4, -2, 3)), values(DEPTH, list(np.arange(1, 3)))
  assert as_flags(points(zipped(values(RATE, [1e-4, 1e-2]), depths))[1]) == [
      "--config.optim.learning_rate=0.01", "--config.model.num_layers=2"]
  assert [as_flags(point) for point in points(rates)] == [
      [f"--config.optim.learning_rate={rate}"] for rate in ("0.0001", "0.001", "0.01")]
  assert points(values("data.weights", np.array([[0.5, 0.5], [0.9, 0.1]])))[1] == {"data.weights": (0.9, 0.1)}
  assert repr(integer(DEPTH, np.int64(2), np.int64(8))) == repr(integer(DEPTH, 2, 8))
  assert repr(uniform(RATE, np.float64(0.1), np.float32(0.5))) == repr(uniform(RATE, 0.1, 0.5))
  assert repr(conditional(DEPTH, {np.int64(2): None})) == repr(conditional(DEPTH, {2: None}))


def test_flags_say_the_settings():
  assert as_flags({RATE: 1e-3, NAME: "muon", "model.use_bias": False, "data.weights": (0.5, 0.5),
                   "model.mlp_dim": None}) == [
      "--config.optim.learning_rate=0.001", "--config.optim.name=muon", "--config.model.use_bias=false",
      "--config.data.weights=(0.5, 0.5)", "--config.model.mlp_dim=None"]


def test_drivers_by_default():
  assert resolve(Sweep(grid({RATE: [1, 2], BATCH: [1, 2]}))) == Sweep(
      grid({RATE: [1, 2], BATCH: [1, 2]}), driver="grid", num_trials=4)
  assert resolve(Sweep(uniform("model.dropout", 0, 1), num_trials=3)).driver == "sobol"


def test_what_a_chain_holds_twice_is_tried_once():
  sweep = resolve(Sweep(chain(values(RATE, [1, 2]), values(RATE, [2, 3]))))
  assert sweep.num_trials == 3 and [point[RATE] for point in planned_settings(sweep)] == [1, 2, 3]


@pytest.mark.parametrize("driver", ["random", "sobol", "halton"])
def test_a_longer_sweep_begins_with_a_shorter_one(driver):
  space = product(log_uniform(RATE, 1e-4, 1e-1), integer(DEPTH, 2, 100))
  of = lambda count, seed=0: planned_settings(resolve(Sweep(space, driver=driver, num_trials=count, seed=seed)))
  assert of(11)[:6] == of(6) and len(of(11)) == 11 and of(6) != of(6, seed=1)


@pytest.mark.parametrize("driver", ["random", "sobol", "halton"])
def test_of_a_list_as_many_are_drawn_as_asked_for(driver):
  space = grid({RATE: [0.1 * 2 ** i for i in range(8)], "seed": [0, 1, 2]})
  of = lambda count: planned_settings(resolve(Sweep(space, driver=driver, num_trials=count)))
  whole = of(24)
  assert sorted(map(str, whole)) == sorted(map(str, points(space)))
  assert of(8) == whole[:8] and of(16) == whole[:16]
  # Of those that are too many there are none.
  assert of(100) == whole and resolve(Sweep(space, driver=driver, num_trials=100)).num_trials == 24
  assert len(planned_settings(resolve(Sweep(integer(DEPTH, 1, 3), driver=driver, num_trials=5)))) == 3


@pytest.mark.parametrize("driver", ["sobol", "halton"])
def test_quasi_random_draws_fill_the_space_evenly(driver):
  space = product(uniform("model.dropout", 0, 1), uniform("optim.weight_decay", 0, 1))
  drawn = [draw(space, cube) for cube in cubes(space, driver, 64, seed=3)]
  for field in fields(space):
    counts = [sum(i / 8 <= point[field] < (i + 1) / 8 for point in drawn) for i in range(8)]
    # Random numbers, 64 in 8 parts, are 8 +- 2.6 in each; these must be far closer.
    assert sum(counts) == 64 and all(6 <= count <= 10 for count in counts)


def test_a_bayesian_sweep_begins_with_a_sobol_sequence():
  space = product(log_uniform(RATE, 1e-4, 1e-1), integer(DEPTH, 2, 100))
  tpe = planned(resolve(Sweep(space, driver="tpe", num_trials=30)))
  sobol = planned(resolve(Sweep(space, driver="sobol", num_trials=8)))
  assert [draw(space, cube) for cube in tpe] == sobol
