"""Learning rates at named steps, computed by hand."""

import dataclasses

import pytest

from lmjax.config import OptimConfig
from lmjax.optim.schedules import make_schedule

BASE = OptimConfig(learning_rate=2.0, final_learning_rate_ratio=0.1, warmup_steps=10)


@pytest.mark.parametrize("schedule, expected", [
    ("constant", {10: 2.0, 60: 2.0, 109: 2.0}),
    ("linear", {10: 2.0, 109: 0.2}),
    ("cosine", {10: 2.0, 109: 0.2}),
    ("inverse_sqrt", {10: 2.0, 40: 2.0 * (10 / 40) ** 0.5, 90: 2.0 * (10 / 90) ** 0.5}),
    ("wsd", {10: 2.0, 80: 2.0, 99: 2.0 * (1 - 0.9 * 0.5), 109: 0.2}),
])
def test_shapes(schedule, expected):
  cfg = dataclasses.replace(BASE, schedule=schedule, decay_steps=20)
  rate = make_schedule(cfg, 110)
  for step, value in (expected | {0: 0.2, 4: 1.0, 9: 2.0}).items():
    assert rate(step) == pytest.approx(value), step


def test_cosine_and_linear_are_halfway_in_the_middle():
  for schedule in ("cosine", "linear"):
    rate = make_schedule(dataclasses.replace(BASE, schedule=schedule, warmup_steps=None), 101)
    assert rate(50) == pytest.approx((2.0 + 0.2) / 2)


def test_wsd_decays_over_a_fifth_of_the_run_unless_told():
  rate = make_schedule(dataclasses.replace(BASE, schedule="wsd", warmup_steps=0), 100)
  assert rate(79) == 2.0 > rate(80) and rate(99) == pytest.approx(0.2)


def test_a_step_past_the_end_keeps_the_last_rate():
  assert make_schedule(BASE, 50)(10_000) == pytest.approx(0.2)
