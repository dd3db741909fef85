"""The coordinate check: slopes of known data, sizes that follow the width, and small models of both kinds."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import partitioning, train
from lmjax.commands import cli
from lmjax.config import ModelConfig, UserError
from lmjax.models import families
from lmjax.scaling import coordinate_check, plots


def test_slopes_are_exponents_of_the_mean_over_seeds():
  sizes = [64, 128, 512]
  values = np.array([[2 * size ** 0.5, 3.0, 0.1 / size] for size in sizes])
  noisy = np.stack([values * 2, values / 2])  # [seeds, sizes, 3]
  np.testing.assert_allclose(coordinate_check.slope(sizes, noisy), [0.5, 0, -1], atol=1e-12)
  runs = [[{"x": {"size": [1.0, size], "change": [size, 1 / size]}}] for size in sizes]
  found = coordinate_check.summarize(sizes, runs)["x"]
  np.testing.assert_allclose([*found["size_slopes"], *found["change_slopes"], found["slope"]], [0, 1, 1, -1, -1])


def test_seeds_count_as_more_heads_of_one_model_do():
  """Root mean squares that vary at the first size only, about the same mean square."""
  few, many = (1.0, 7.0), (5.0, 5.0)
  runs = [[{"x": {"size": [1.0], "change": [change]}} for change in changes] for changes in (few, many)]
  found = coordinate_check.summarize([1, 2], runs)["x"]
  np.testing.assert_allclose(found["change"], [[5], [5]])
  # Without either seed the slope is log2(5 / 7) or log2(5 / 1): half of their difference.
  np.testing.assert_allclose([found["slope"], found["slope_error"]], [0, np.log2(7) / 2], atol=1e-12)
  assert coordinate_check.summarize([1, 2], [seeds[:1] for seeds in runs])["x"]["slope_error"] is None


def test_all_that_grows_with_the_width_does_so_in_proportion():
  model = ModelConfig(embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=160, base_embed_dim=32, vocab_size=128)
  wide = coordinate_check.at_width(model, 256, "heads")
  assert (wide.embed_dim, wide.num_heads, wide.num_kv_heads, wide.head_dim, wide.mlp_dim, wide.embedding_dim) == (
      256, 16, 8, 16, 640, 256)
  wide = coordinate_check.at_width(model, 256, "head_dim")
  assert (wide.num_heads, wide.head_dim, wide.base_head_dim) == (4, 64, 8)
  with pytest.raises(UserError, match="Width 40 would give config.model.num_heads = 2.5, 4 at embed_dim = 64"):
    coordinate_check.at_width(model, 40, "heads")
  two_sided = dataclasses.replace(model, architecture="encoder_decoder", num_decoder_layers=4)
  assert coordinate_check.at_depth(two_sided, 8).num_decoder_layers == 8


@functools.cache
def measured(kind, width=32, depth=1, **optim):
  """Returns what 3 steps of a small Llama on random tokens do to its activations."""
  config = config_lib.base_config()
  config.model.update(families.debug(families.preset("llama")), num_layers=1, tie_embeddings=False, vocab_size=64,
                      parametrization=kind, base_embed_dim=32, base_num_layers=1)
  config.optim.update(learning_rate=3e-3, **optim)
  config.data.update(seq_len=32)
  config.train.update(num_steps=3, batch_size=8)
  config.mesh.update(data=1)
  config = config_lib.resolve_model(config_lib.from_config_dict(config), 64)
  model = coordinate_check.at_depth(coordinate_check.at_width(config.model, width, "heads"), depth)
  tokens = np.random.default_rng(0).integers(0, 64, (3, 8, 33)).astype(np.int32)
  batches = [{"inputs": x[:, :-1], "targets": x[:, 1:], "weights": np.ones((8, 32), np.float32)} for x in tokens]
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  with partitioning.use_mesh(mesh):
    setup = train.build(dataclasses.replace(config, model=model), mesh)
    hparams = {"learning_rate": np.float32(3e-3), "weight_decay": np.float32(0), "seed": np.uint32(0)}
    loss = lambda model, params, batch: setup.objective.loss(model, params, batch, config.objective)
    return coordinate_check.measure(setup.model, loss, [train.init_state(setup)], train.make_train_step(setup), batches,
                                    hparams)


def slopes(base, other, ratio):
  """Returns the slope of every activation's change between a size and one that is `ratio` times as large."""
  return {name: one["slope"] for name, one in coordinate_check.summarize([1, ratio], [base, other]).items()}


def test_activations_grow_with_the_width_under_the_standard_parametrization_alone():
  base = measured("standard")  # There all parametrizations are the same.
  mup, standard = (slopes(base, measured(kind, width=256), 8) for kind in ("mup", "standard"))
  maps = ["layers/attention/query", "layers/attention/value", "layers/mlp/up", "layers/mlp/down", "layers"]
  assert {*maps, "layers/attention/scores", "logits", "embed", "final_norm"} <= mup.keys()
  for name in maps:
    assert abs(mup[name]) < 0.2, name
    assert standard[name] > 0.5, name


def test_the_stream_grows_with_the_depth_but_under_completep():
  base = measured("standard")
  completep, mup = (slopes(base, measured(kind, depth=8), 8) for kind in ("completep", "mup"))
  assert abs(completep["layers"]) < 0.2 and mup["layers"] > 0.5


@pytest.mark.parametrize("optim", [dict(name="muon"), dict(name="lion"), dict(name="adafactor"),
                                   dict(name="sgd", clip_norm=None)])
@pytest.mark.slow
def test_other_optimizers_steps_do_not_grow_with_the_width(optim):
  found = slopes(measured("standard", **optim), measured("mup", width=256, **optim), 8)
  assert {name: value for name, value in found.items() if name != "logits" and abs(value) > 0.3} == {}


@pytest.mark.slow
def test_the_evidence_over_widths_of_64_to_1024(tmp_path):
  """Minutes on a CPU; the picture in docs/ is of this check. Few heads have noisy scores: fewer seeds do not do."""
  debug = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "debug.py"
  status = cli.run(["coordcheck", f"--config={debug}:llama", f"--workdir={tmp_path}", "--seeds=8",
                    "--config.model.parametrization=mup", "--config.model.base_embed_dim=64"])
  assert status == 0
  found = json.loads((tmp_path / "coordcheck.json").read_text())["found"]["width"]
  slopes = {kind: {name: part["slope"] for name, part in one["activations"].items()} for kind, one in found.items()}
  grows = lambda slopes: {name for name, value in slopes.items() if abs(value) > coordinate_check.TOLERANCE}
  assert grows(slopes["mup"]) == set() and grows(slopes["standard"]) == {*slopes["standard"]}


def test_the_pictures_are_small_png_files():
  one = {"sizes": [64, 128], "activations": {
      f"part {i}": {"change": [[0.1, 0.2], [0.1, 0.3 + i]]} for i in range(14)}}
  both = plots.coordinates([("width", {"mup": one, "standard": one})])
  assert plots.coordinates([("width", {"mup": one, "standard": one}), ("depth", {"mup": one})]).startswith(b"\x89PNG")
  loss = plots.transfer([("mup", "width", {64: ([1e-3, 2e-3], [2.0, float("nan")]), 128: ([1e-3, 2e-3], [3.0, 2.0])})])
  for picture in (both, loss):
    assert picture.startswith(b"\x89PNG") and len(picture) < 150_000
