"""Names of machines, and what stands behind them."""

import pytest

from lmjax.config import UserError
from lmjax.plan.topologies import CHIPS, parse_topology


@pytest.mark.parametrize("name,generation,shape,chips", [
    ("v5e-1", "v5e", (1, 1), 1), ("v5e-16", "v5e", (4, 4), 16), ("v5e-32", "v5e", (4, 8), 32),
    ("v5litepod-256", "v5e", (16, 16), 256), ("v6e-64", "v6e", (8, 8), 64), ("v6e:2x4", "v6e", (2, 4), 8),
    # These count cores, two a chip.
    ("v4-8", "v4", (2, 2, 1), 4), ("v4-16", "v4", (2, 2, 2), 8), ("v5p-128", "v5p", (4, 4, 4), 64),
    ("v5p-512", "v5p", (4, 8, 8), 256), ("v5p:4x4x12", "v5p", (4, 4, 12), 192),
    ("tpu7x-128", "tpu7x", (4, 4, 4), 64),
    ("2xv5e-256", "v5e", (16, 16), 512), ("h100-1", "h100", (1, 1), 1), ("h100-8", "h100", (1, 8), 8),
    ("b200-32", "b200", (4, 8), 32)])
def test_a_name_says_how_many_chips_and_how_they_lie(name, generation, shape, chips):
  topology = parse_topology(name)
  assert (topology.generation, topology.shape, topology.num_chips) == (generation, shape, chips)


def test_a_tpu7x_has_two_devices_a_chip():
  both = parse_topology("2xtpu7x-8")
  assert both.num_devices == 2 * both.num_chips == 2 * both.devices_a_fast_network == 16


@pytest.mark.parametrize("name,told", [
    ("v5e", "is no machine that lmjax knows"), ("", "is no machine"), ("v5x-16", "did you mean 'v5"),
    ("v5e-12", "come in powers of two from v5e-1 on"), ("v5p-2", "powers of two from v5p-8 on"),
    ("v5p:4x4", "a grid of 3 axes"), ("v5e-512", "at most 256 chips"), ("h100-12", "whole hosts, such as h100-8"),
    ("2xh100-8", "GPUs are counted")])
def test_a_machine_that_does_not_exist_is_told(name, told):
  with pytest.raises(UserError, match=told):
    parse_topology(name)


def test_figures_are_plausible():
  for chip in CHIPS.values():
    assert 1e14 < chip.peak_flops < 5e15 and 1e10 < chip.memory < 3e11 and chip.source
    # A product of large matrices is bound by arithmetic: 100 to 400 FLOPs a byte of memory, and far more a byte sent.
    assert 100 < chip.peak_flops / chip.memory_bandwidth < 700
    assert chip.memory_bandwidth > chip.link_bandwidth > chip.network_bandwidth
