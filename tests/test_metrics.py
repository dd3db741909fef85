"""Counts against arithmetic done by hand, and figures that must not depend on how they are held."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from lmjax import metrics, partitioning
from lmjax.config import MeshConfig, ModelConfig

CFG = ModelConfig(num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=3, mlp_dim=16, vocab_size=10)


def test_flops_are_those_counted_by_hand():
  # Forward, a token: a layer's query 2*8*12, key and value 2*2*8*6, out 2*12*8, MLP 2*2*8*16; logits 2*8*10.
  matrices = 2 * (192 + 192 + 192 + 512) + 160
  # Four positions see 1, 2, 3, 4 keys: 2.5 on average, each 2*12 for the score and 2*12 for the value.
  assert metrics.flops_per_token(CFG, 4) == 3 * (matrices + 2 * 2.5 * 48)
  # A window of 2: 1, 2, 2, 2 keys.
  windowed = dataclasses.replace(CFG, attention_window=2)
  assert metrics.flops_per_token(windowed, 4) == 3 * (matrices + 2 * 1.75 * 48)
  gated = dataclasses.replace(CFG, gated_mlp=True)
  assert metrics.flops_per_token(gated, 4) - metrics.flops_per_token(CFG, 4) == 3 * 2 * 256


def test_of_a_mixture_only_the_experts_of_a_token_count():
  mixture = dataclasses.replace(CFG, num_experts=6, experts_per_token=2, expert_dim=5, gated_mlp=True)
  dense = dataclasses.replace(CFG, gated_mlp=True)
  # In place of an MLP's 3*8*16 weights: two experts' 3*8*5 each, and the router's 8*6.
  difference = 2 * (2 * 120 + 48 - 384)
  assert metrics.flops_per_token(mixture, 4) - metrics.flops_per_token(dense, 4) == 3 * 2 * difference
  shared = dataclasses.replace(mixture, shared_expert_dim=7)
  assert metrics.flops_per_token(shared, 4) - metrics.flops_per_token(mixture, 4) == 3 * 2 * 2 * (3 * 8 * 7 + 8)
  params = {"mlp": {"gate": {"kernel": np.zeros((2, 6, 8, 5))}, "router": {"kernel": np.zeros((2, 8, 6))},
                    "shared": {"gate": {"kernel": np.zeros((2, 8, 7))}}}}
  assert metrics.count_active({"layers": params}, shared) == 2 * 2 * 40 + 96 + 112
  assert metrics.count_active({"layers": params}, dense) == metrics.count_params(params)


def test_embeddings_and_the_head_are_counted_apart():
  params = {"embed": {"embedding": np.zeros((10, 8)), "position": np.zeros((4, 8))},
            "head": {"kernel": np.zeros((10, 8))}, "layers": {"k": np.zeros((2, 8, 8))}}
  assert metrics.count_params(params) == 80 + 32 + 80 + 128
  assert metrics.count_non_embedding(params) == 128


def test_bits_per_byte():
  sums = {"loss": 20.0, "accuracy": 5.0, "weight": 10.0}
  values = metrics.evaluation(sums, tokens_per_byte=0.25)
  assert values == {"loss": 2.0, "perplexity": pytest.approx(math.e ** 2), "accuracy": 0.5,
                    "bits_per_byte": pytest.approx(2.0 / math.log(2) / 4)}


def test_the_digest_depends_on_values_types_and_names_but_not_on_sharding():
  mesh = partitioning.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
  x = jnp.arange(64.0).reshape(8, 8)
  split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
  assert metrics.digest({"a": x}) == metrics.digest({"a": split}) == metrics.digest({"a": np.asarray(x)})
  others = [{"b": x}, {"a": x.at[3, 3].add(1e-3)}, {"a": x.astype(jnp.bfloat16)}, {"a": x.reshape(4, 16)}]
  assert len({metrics.digest(tree) for tree in [{"a": x}, *others]}) == 5


def test_an_unknown_device_has_no_peak():
  class Device:
    device_kind = "NVIDIA H100 80GB HBM3"
  class Unknown:
    device_kind = "cpu"
  assert metrics.peak_flops([Device(), Device()]) == 2 * 989e12
  assert metrics.peak_flops([Device(), Unknown()]) is None


def test_the_clock_divides_all_time(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(metrics.time, "time", lambda: now[0])

  def passes(seconds, inside=contextlib.nullcontext):
    with inside():
      now[0] += seconds

  clock = metrics.Clock(100, 2.0, None, begun=7.0, before={"step": 20.0, "start": 3.0})
  passes(4.0, clock.waiting_for_data)  # Of the first step, which is all start.
  passes(30.0)
  assert clock.standing() == 0.0
  clock.tick()
  assert clock.of_step() == {}
  for _ in range(2):
    passes(1.0, clock.waiting_for_data)
    passes(2.0)
    passes(5.0, clock.waiting_for_devices)
    assert clock.standing() == 8.0
    clock.tick()
  assert clock.rates() == {"tokens_per_second": 12.5, "data_wait": 0.125}
  assert clock.of_step() == {"step_seconds": 8.0, "host_seconds": 3.0, "data_seconds": 1.0}
  passes(11.0, lambda: clock.paused("evaluation"))
  with clock.paused("saving"):
    passes(13.0)
    assert clock.standing() == 0.0
  # It was first started at 0, stood still until 93 but for 23 s, and this part of it began at 93.
  seconds, goodput = clock.shares(since=0.0)
  assert seconds == {"seconds_start": 44.0, "seconds_data": 2.0, "seconds_step": 34.0, "seconds_evaluation": 11.0,
                     "seconds_saving": 13.0, "seconds_other": 70.0}
  assert goodput == pytest.approx(36 / 174)


def test_the_clock_leaves_out_compiling_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  clock = metrics.Clock(tokens_per_step=100, flops_per_token=2.0, peak=1000.0)
  assert clock.rates() == {}
  for seconds in (30.0, 1.0, 1.0):  # The first step compiles.
    now[0] += seconds
    clock.tick()
  assert clock.rates() == {"tokens_per_second": 100.0, "mfu": 0.2, "data_wait": 0.0}
  with clock.paused("saving"):
    now[0] += 50.0
  clock.restart()
  now[0] += 0.5
  clock.tick()
  assert clock.rates()["tokens_per_second"] == 200.0
  assert clock.overall()["tokens_per_second"] == pytest.approx(300 / 2.5)
