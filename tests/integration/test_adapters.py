"""Adapters from end to end: trained beside another run's model, evaluated, loaded, written, and trained upon again."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lmjax
from lmjax import config as config_lib
from lmjax import convert, evaluate, train
from lmjax.config import UserError


def settings(folder, **optim):
  config = config_lib.base_config()
  config.model.update(num_layers=2, embed_dim=32, num_heads=4, norm="rmsnorm", position="rotary", activation="silu",
                      gated_mlp=True, use_bias=False, dtype="float32")
  config.data.update(source=str(folder / "text.txt"), tokenizer="bytes", seq_len=32, cache_dir=str(folder / "cache"))
  config.train.update(num_steps=4, batch_size=8, sample_length=4)
  config.optim.update({"learning_rate": 0.03, **optim})
  config.mesh.update(data=2, fsdp=4)
  return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns the folder of two runs: base, and lora, which has adapters beside it."""
  folder = tmp_path_factory.mktemp("adapters")
  (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(300)))
  train.train_and_evaluate(config_lib.from_config_dict(settings(folder)), str(folder / "base"))
  train.train_and_evaluate(with_adapters(folder, folder / "base"), str(folder / "lora"))
  return folder


def with_adapters(folder, restore_from=None, import_from=None, **optim):
  config = settings(folder, **{"lora_rank": 2, "lora_targets": "attention/|mlp/down", **optim})
  text = lambda path: path and str(path)
  config.checkpoint.update(restore_from=text(restore_from), import_from=text(import_from))
  config.train.ema_decay = 0.5
  return config_lib.from_config_dict(config)


result_of = lambda workdir: json.loads((workdir / "result.json").read_text())
same = lambda one, other: jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_was_evaluated_is_what_is_read(runs):
  result, base = result_of(runs / "lora"), result_of(runs / "base")
  assert result["num_params"] == base["num_params"] and result["eval_loss"] < base["eval_loss"]
  again = evaluate.evaluate_workdir(str(runs / "lora"))
  assert again["validation/loss"] == pytest.approx(result["eval_loss"], rel=1e-6)


def test_a_merged_model_is_loaded_and_written(runs, tmp_path):
  (_, base), (_, merged) = lmjax.load(runs / "base"), lmjax.load(runs / "lora")
  assert merged.keys() == base.keys()
  differs = jax.tree.map(lambda one, other: not np.array_equal(one, other), merged, base)
  attention, mlp = differs["layers"]["attention"], differs["layers"]["mlp"]
  assert all(attention[name]["kernel"] for name in ("query", "key", "value", "out")) and mlp["down"]["kernel"]
  assert sum(jax.tree.leaves(differs)) == 5
  convert.convert(runs / "lora", tmp_path / "hf")
  same(lmjax.load(tmp_path / "hf")[1], merged)
  said = convert.convert(runs / "lora", tmp_path / "adapter", adapter=True)
  assert said == f"Wrote {tmp_path / 'adapter'}, the adapters of {runs / 'lora'} in PEFT's format."
  found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  b, a = (found[f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"] for side in "BA")
  kernel = lambda params: params["layers"]["mlp"]["down"]["kernel"][1]
  np.testing.assert_allclose((16.0 / 2 * b @ a).T, kernel(merged) - kernel(base), atol=1e-6)
  with pytest.raises(UserError, match="base is no run with adapters"):
    convert.convert(runs / "base", tmp_path / "none", adapter=True)


@pytest.mark.parametrize("source", ["restore_from", "import_from"])
def test_a_run_with_new_adapters_starts_from_the_merged_model(runs, tmp_path, source):
  path = runs / "lora"
  if source == "import_from":
    path = tmp_path / "hf"
    convert.convert(runs / "lora", path)
  config = with_adapters(runs, **{source: path}, learning_rate=0.0)  # The adapters' b stays zero.
  train.train_and_evaluate(config, str(tmp_path / "run"))
  same(lmjax.load(tmp_path / "run")[1], lmjax.load(runs / "lora")[1])


def test_going_on_with_other_adapters_is_told(runs):
  config = with_adapters(runs, runs / "base", lora_rank=3)
  with pytest.raises(UserError, match="has config.optim.lora_rank = 2, but now it is 3"):
    train.train_and_evaluate(config, str(runs / "lora"))
  config = with_adapters(runs, runs / "base", freeze_policy=(("final_norm", 0),))
  with pytest.raises(UserError, match="has no .*final_norm/scale, which the config asks for; use the config it was"):
    train.train_and_evaluate(config, str(runs / "lora"))
