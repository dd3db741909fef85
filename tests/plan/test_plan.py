"""Plans, compiled by the machines' own compiler where it is installed."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from lmjax import partitioning, plan, train
from lmjax.commands import cli
from lmjax.config import base_config, from_config_dict
from lmjax.models import families
from lmjax.plan import search
from lmjax.plan.batches import abstract_batch
from lmjax.plan.topologies import described_devices, parse_topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLANS = ROOT / "launch" / "plans"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def config_of(family="llama", batch_size=32, num_layers=3, **groups):
  config = base_config()
  config.model.update({**families.debug(families.preset(family)), "num_layers": num_layers})
  config.objective.update(families.objective_of(config.model))
  config.data.update(tokenizer="bytes", seq_len=64)
  config.train.update(num_steps=1000, batch_size=batch_size)
  config.mesh.update(data=1, fsdp=-1)
  for group, values in groups.items():
    config[group].update(values)
  return from_config_dict(config)


def run(*argv, timeout=300):
  return subprocess.run([sys.executable, "-m", "lmjax", *argv], cwd=ROOT, capture_output=True, text=True,
                        timeout=timeout)


QUICK = ("debug-v5e-4", "debug-2xv5e-4")
# Those of GPUs need a compiler of 4 GB.
KEPT = [pytest.param(path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
        for path in sorted(PLANS.glob("*.json")) if "h100" not in path.stem]


@needs_libtpu
@pytest.mark.parametrize("name", KEPT)
def test_a_kept_plan_is_what_is_compiled_now(name, tmp_path):
  spec = importlib.util.spec_from_file_location("plans", ROOT / "tests" / "benchmarks" / "plans.py")
  plans = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(plans)
  made = run(*plans.command(name, tmp_path / "plan.json"), timeout=300 if name in QUICK else 1800)
  assert made.returncode == 0, made.stderr
  now, kept = (json.loads(path.read_text())[0] for path in (tmp_path / "plan.json", PLANS / f"{name}.json"))
  assert now["fits"] and now["num_params"] == kept["num_params"] and now["model_flops"] == kept["model_flops"]
  assert now["mesh"] == kept["mesh"] and now["memory_bytes"] == kept["memory_bytes"]
  # The compiler may change with its version, but not by much.
  assert now["peak_bytes"] == pytest.approx(kept["peak_bytes"], rel=0.2)
  sent = lambda one: sum(part["sent"] for part in one["collectives"])
  assert sent(now) == pytest.approx(sent(kept), rel=0.2)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_a_kept_plan_fits_and_adds_up(path):
  for one in json.loads(path.read_text()):
    assert one["fits"] and one["peak_bytes"] <= one["memory_bytes"]
    assert sum(one["bytes_by_kind"].values()) >= one["peak_bytes"] * 0.999
    assert one["step_seconds"] == max(one["seconds"].values()) and 0 < one["mfu_bound"] <= 1


@needs_libtpu
def test_norms_and_residuals_are_split_over_tensor():
  """Of sums over tensor each device keeps its part of the length, and products gather them: no all-reduce is left."""
  layers, stream = 4, 32 * 64 * 256 * 2
  model = dict(remat_policy="full", embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=512)
  made = plan.make_plan(config_of(num_layers=layers, mesh=dict(data=1, fsdp=1, tensor=4), model=model),
                        parse_topology("v5e-4"))
  of = lambda kind: [one for one in made.collectives if one.kind == kind and one.axes == ("tensor",)]
  scattered, = of("reduce-scatter")
  # Of a layer the results of attention and the MLP, attention's again, and the gradients of what both read; and of the
  # embedding and the output projection.
  sends = 5 * layers + 2
  assert scattered.count == sends and scattered.sent == pytest.approx(sends * stream * 3 / 4, rel=0.05)
  assert sum(one.sent for one in of("all-reduce")) < stream / 10
  assert sum(one.sent for one in of("all-gather")) >= 5 * layers * stream * 3 / 4


@needs_libtpu
def test_fsdp_gathers_each_layers_parameters_and_adds_up_their_gradients():
  made = plan.make_plan(config_of(num_layers=8, model=dict(remat_policy="full")), parse_topology("v5e-4"))
  fewer = plan.make_plan(config_of(num_layers=4, model=dict(remat_policy="full")), parse_topology("v5e-4"))
  gathers = lambda one: sum(part.count for part in one.collectives if part.kind == "all-gather")
  # Twice the layers, and twice the gathers in the loops over them.
  inside = (gathers(made) - gathers(fewer)) / 4
  assert inside >= 2 * 5 and all(set(part.axes) <= {"fsdp"} for part in made.collectives)
  # Each layer's parameters are gathered in bfloat16, forward and backward.
  of_layers = 2 * (made.num_params - fewer.num_params) / 4
  sent = sum(part.sent for part in made.collectives if part.kind == "all-gather") - sum(
      part.sent for part in fewer.collectives if part.kind == "all-gather")
  assert sent == pytest.approx(4 * 2 * of_layers * 3 / 4, rel=0.35)


@needs_libtpu
def test_replicas_lie_in_different_slices():
  config = config_of(mesh=dict(replica=2))
  made = plan.make_plan(config, parse_topology("2xv5e-4"))
  far = [one for one in made.collectives if one.crosses]
  assert far and {one.axes for one in far} == {("replica",)} and made.seconds["network"] > 0
  # Each device sends its part of the gradients.
  assert sum(one.sent for one in far) == pytest.approx(made.num_params * 4 / 4, rel=0.6)


WIDE = dict(embed_dim=512, num_heads=4, num_kv_heads=4, head_dim=128, mlp_dim=2048)


@needs_libtpu
def test_moments_with_the_host_are_none_of_the_devices_bytes():
  there, here = (plan.make_plan(
      config_of(batch_size=4, num_layers=4, model=dict(WIDE, embed_dim=2048, mlp_dim=8192, remat_policy="full"),
                optim=dict(offload=offload)), parse_topology("v5e-4")) for offload in (True, False))
  moments = 2 * 4 * here.num_params / 4  # Two of four bytes for each parameter, over four devices.
  assert there.bytes_by_kind["host"] == pytest.approx(moments, rel=0.01)
  assert here.bytes_by_kind["optimizer"] == pytest.approx(moments, rel=0.01) and here.bytes_by_kind["host"] == 0
  assert there.bytes_by_kind["optimizer"] == 4  # The number of updates.
  # Those of some parameters are on their way at any time.
  assert 0.6 * moments < here.peak_bytes - there.peak_bytes <= moments
  # 16 GB/s each way.
  assert there.seconds["host"] == pytest.approx(moments / 16e9, rel=0.01) and here.seconds["host"] == 0


@pytest.mark.slow
@needs_libtpu
def test_what_is_saved_with_the_host_is_none_of_the_devices_bytes():
  there, here, least = (plan.make_plan(config_of(batch_size=64, num_layers=2, model=dict(WIDE, remat_policy=policy)),
                                       parse_topology("v5e-4")) for policy in ("offload", "products", "full"))
  tokens, width = 64 * 64 / 4, 2  # Of a device; bytes of bfloat16.
  # Query, key, value, attention and out, up and gate, in two layers; the softmax sums are small.
  saved = 2 * tokens * width * (5 * 512 + 2 * 2048)
  assert there.bytes_by_kind["host"] == pytest.approx(saved, rel=0.02)
  assert there.bytes_by_kind["activations"] == least.bytes_by_kind["activations"]
  assert here.bytes_by_kind["activations"] - least.bytes_by_kind["activations"] == pytest.approx(saved, rel=0.02)
  assert here.peak_bytes - there.peak_bytes > 0.5 * saved
  assert there.seconds["compute"] == here.seconds["compute"] < least.seconds["compute"]


def test_what_is_made_again_is_counted_by_name():
  model = plan.resolved(config_of(model=dict(WIDE))).model
  share = lambda **changes: plan.made_again(dataclasses.replace(model, **changes), 64)
  # By hand, in units of D^2: the four maps of attention 4, up, gate and down 4 each, scores and weighted values of 32
  # keys on average 2 * 32 / 512.
  whole = 4 + 12 + 0.125
  assert share(remat_policy="none") == share(remat_policy="products") == share(remat_policy="offload")
  assert share(remat_policy="full") == 1 and share(remat_policy="attention") == pytest.approx(16 / whole)
  assert share(remat_policy="names", remat_save=("up",), remat_offload=("query",)) == pytest.approx(1 - 5 / whole)


@needs_libtpu
def test_a_program_that_is_too_large_is_refused_and_another_proposed():
  config = config_of(batch_size=8192, model=dict(embed_dim=512, head_dim=128, mlp_dim=2048, remat_policy="none"),
                     data=dict(seq_len=1024), num_layers=2)
  topology = parse_topology("v5e-4")
  made = plan.make_plan(config, topology)
  assert not made.fits and made.peak_bytes > made.memory_bytes and "HBM" in made.message
  proposal, better = next(search.search(config, topology, 4))
  assert better.fits and "train.grad_accum_steps" in proposal.changes and "--config.mesh.fsdp=4" in proposal.flags()


@needs_libtpu
def test_a_tpu_multiplies_in_eight_bits():
  config, topology = config_of(num_layers=2, model=dict(quantization="int8")), parse_topology("v5e-4")
  config = plan.resolved(config)
  mesh = partitioning.make_mesh(config.mesh, described_devices(topology))
  program = plan.lower(train.build(config, mesh), abstract_batch(config, mesh)).compile().as_text()
  # Seven maps of a block, forward and to their inputs; the layers are a loop.
  assert len(re.findall(r"= s32\[[^=]* convolution\(", program)) >= 2 * 7


def test_the_bound_on_arithmetic_knows_eight_bits():
  config = plan.resolved(config_of("gpt2", model=dict(vocab_size=512)))
  seconds = lambda name, topology: plan.arithmetic_seconds(
      dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=name)), parse_topology(topology))
  # Widths 64 and 128, two layers' four maps of attention and two of the MLP and the projection to 512; each token sees
  # 32.5 others.
  maps, others = 6 * 3 * (4 * 64 * 64 + 2 * 64 * 128), 6 * (64 * 512 + 3 * 2 * 32.5 * 64)
  tokens = 32 * 64
  assert seconds("none", "h100-8") == pytest.approx(tokens * (maps + others) / (8 * 989e12))
  assert seconds("fp8", "h100-8") == pytest.approx(tokens * (maps / 1979e12 + others / 989e12) / 8)
  # The gradients of kernels stay in bfloat16.
  assert seconds("int8", "v6e-4") == pytest.approx(
      tokens * (maps * 2 / 3 / 1836e12 + (maps / 3 + others) / 918e12) / 4)
  assert seconds("fp8", "v6e-4") == seconds("none", "v6e-4")


def test_proposals_divide_and_the_fastest_comes_first():
  config, topology = config_of(batch_size=64), parse_topology("v5e-16")
  found = search.proposals(config, topology)
  assert found == sorted(found, key=lambda one: (one.seconds, one.bytes)) and found[0].seconds > 0
  for one in found:
    assert one.changes["mesh.fsdp"] * one.changes["mesh.tensor"] == 16
    assert 64 % (one.changes["mesh.fsdp"] * one.changes["train.grad_accum_steps"]) == 0
  changed = search.changed(config, found[0].changes)
  assert dataclasses.asdict(changed)["mesh"]["fsdp"] == found[0].changes["mesh.fsdp"]


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "xlnet", "electra_pretraining"])
def test_a_batch_is_known_without_data(family):
  from lmjax import objectives
  from lmjax.data import pipeline
  config = config_of(family, mesh=dict(data=-1, fsdp=1))
  mesh = partitioning.make_mesh(config.mesh)
  shapes = abstract_batch(plan.resolved(config), mesh)
  data = pipeline.open_data(config, *objectives.text_needs(config))
  make = objectives.host_function(objectives.recipe_of(plan.resolved(config), data, data.train))
  rows = next(pipeline.train_batches(data, config, start_step=0, make_example=make))
  assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
      name: (x.shape, x.dtype) for name, x in rows.items()}


@pytest.mark.parametrize("task", ["glue/sst2", "squad", "super_glue/copa", "wmt14/en-de", "stdlib/identifiers",
                                  "stdlib/packages,stdlib/answers"])
def test_a_labelled_batch_is_known_without_data(task):
  from lmjax.data.task_specs import set_tasks
  config = base_config()
  set_tasks(config, task)
  config.model.update(families.debug(families.preset("t5" if config.model.head == "lm" else "bert")),
                      head=config.model.head)
  config.data.update(tokenizer="bytes", seq_len=64)
  config.train.update(num_steps=10, batch_size=8)
  config = from_config_dict(config)
  shapes = abstract_batch(plan.resolved(config), partitioning.make_mesh(config.mesh))
  assert all(leaf.shape[0] == 8 for leaf in shapes.values()) and len(shapes) >= 5


def test_the_table_has_every_figure(capsys):
  from lmjax.commands.plan import lines
  from lmjax.plan.collectives import Collective
  made = plan.Plan("v5e-4", 4, {"fsdp": 4}, True, 3 * 2**30, 16 * 2**30, {"parameters": 2.0**30}, 10, 1e12,
                   (Collective("all-gather", ("fsdp",), 7, 2.0**20, False),), {"model": 0.5, "compute": 1.0}, 3.0, 4096,
                   86400)
  text = "\n".join(lines(made))
  for part in ("v5e-4: 4 chips", "fsdp=4", "yes: 3.00 GiB of 16.00 GiB", "1.00 GiB", "7 times, 1.00 MiB sent", "4,096",
               "MFU at most", "50.0%", "1.00"):
    assert part in text, part
  assert cli.COMMANDS.index("plan") >= 0
