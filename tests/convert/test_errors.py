"""Tests that what is wrong with a folder is told in a sentence that names it, and that nothing is left behind."""

import dataclasses
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lmjax
from lmjax import convert
from lmjax.config import UserError
from lmjax.convert import params as params_lib
from lmjax.models.transformer import make_model


def told(call, *args, **kwargs):
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("variant, changes, words", [
    ("gpt2", dict(model_type="gpt3"), "model_type 'gpt3', which lmjax cannot convert; did you mean 'gpt2'?"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights = False, which lmjax does not do; it does True only"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True, which lmjax does"),
    ("gpt2", dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn = True, which lmjax does not do"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention = True, which lmjax does not do"),
    ("gpt2", dict(activation_function="quick_gelu"), "activation_function = 'quick_gelu', which lmjax does not do"),
    ("gpt2", dict(alibi=True), "alibi = True, which lmjax does not know in gpt2"),
    ("gpt2", dict(quantization_config={"quant_method": "gptq"}), "quantization_config.quant_method = 'gptq'"),
    ("gpt2", dict(n_layer=None), "has no n_layer, which lmjax needs"),
    ("gpt2", dict(n_layer="3"), "cannot build: config.model.num_layers is '3'"),
    ("gpt2", dict(n_layer=0), "cannot build: config.model.num_layers is 0"),
    ("gpt2", dict(n_positions="many"), "cannot build: config.model.max_positions is 'many'"),
    ("gpt2", dict(n_head=5), "cannot build: config.model.num_heads = 5 does not divide embed_dim = 48"),
    ("gpt2", dict(n_layer=4), "has no tensor transformer.h.3.ln_1.weight, which its config.json asks for"),
    ("gpt2", dict(n_layer=2), "has a tensor transformer.h.2.attn.c_attn.bias, which a gpt2 model of its config"),
    ("gpt2", dict(vocab_size=99), "transformer.wte.weight of shape (98, 48), but its config.json makes it (99, 48)"),
    ("gpt2", dict(tie_word_embeddings=False), "has no tensor lm_head.weight"),
    ("gpt2_untied_inner", dict(tie_word_embeddings=True), "lm_head.weight that differs from transformer.wte.weight"),
    ("llama", dict(pretraining_tp=2), "pretraining_tp = 2, which lmjax does not do; it does 1 only"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "su", "factor": 2.0}),
     "rope_scaling.type = 'su', which lmjax does not do; it does default, linear, dynamic, yarn, llama3."),
    ("llama", dict(rope_parameters={"rope_type": "longrope", "rope_theta": 5e5, "factor": 32.0}),
     "rope_parameters.rope_type = 'longrope', which lmjax does not do; it does default, linear,"),
    ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}),
     "rope_parameters.partial_rotary_factor = 0.5, which lmjax does not know"),
    ("llama", dict(rope_theta=1e4), "rope_theta = 10000.0 but rope_parameters.rope_theta = 500000.0; make them equal"),
    ("llama", dict(attention_bias=True), "has no tensor model.layers.0.self_attn.q_proj.bias"),
    ("llama", dict(sliding_window=64), "sliding_window = 64, which lmjax does not know in llama"),
    ("llama", dict(hidden_act="relu2"), "hidden_act = 'relu2', which lmjax does not do; it does silu, swish,"),
    ("llama", dict(num_key_value_heads=3), "cannot build: config.model.num_kv_heads = 3 does not divide num_heads = 4"),
    ("llama", dict(num_key_value_heads=4), "k_proj.weight of shape (24, 48), but its config.json makes it (48, 48)"),
])
def test_a_config_that_is_not_supported_is_refused_by_name(copy_of, tmp_path, variant, changes, words):
  folder = copy_of(variant, **changes)
  message = told(lmjax.load, folder)
  assert words in message and str(folder) in message
  assert told(convert.convert, folder, tmp_path / "run") == message
  assert not (tmp_path / "run").exists()


def test_tensors_must_be_known_and_of_a_floating_type(copy_of):
  folder = copy_of("llama")
  path = folder / "model.safetensors"
  tensors = load_file(path)
  name = "model.layers.1.mlp.up_proj.weight"
  save_file({**tensors, "model.extra.weight": np.zeros(2, np.float32)}, path)
  assert "has a tensor model.extra.weight, which a llama model" in told(lmjax.load, folder)
  save_file({key: value for key, value in tensors.items() if key != name}, path)
  assert f"has no tensor {name}" in told(lmjax.load, folder)
  save_file({**tensors, name: tensors[name].astype(np.int8)}, path)
  assert f"has {name} in I8, but lmjax reads F64, F32, F16, BF16" in told(lmjax.load, folder)
  save_file({**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32)}, path)
  lmjax.load(folder)


def test_files_that_are_missing_or_damaged(copy_of):
  folder = copy_of("gpt2")
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  assert "model.safetensors is not a whole safetensors file" in told(lmjax.load, folder)
  path.unlink()
  assert "has a config.json but no model.safetensors" in told(lmjax.load, folder)
  (folder / "pytorch_model.bin").write_bytes(b"anything")
  assert "pytorch_model.bin is not a whole file of torch" in told(lmjax.load, folder)
  (folder / "config.json").write_text("{")
  assert "config.json is not JSON" in told(lmjax.load, folder)
  (folder / "config.json").write_text("[]")
  assert "holds a JSON list" in told(lmjax.load, folder)
  (folder / "config.json").write_text("{}")
  assert "has neither model_type" in told(lmjax.load, folder)
  (folder / "config.json").unlink()
  assert "has no config.json" in told(lmjax.load, folder)
  assert "There is no folder" in told(lmjax.load, folder / "nowhere")


def test_shards_that_are_missing_or_do_not_match_their_index(folder_of, tmp_path):
  folder_of("gpt2")[0].save_pretrained(tmp_path, max_shard_size="60KB")
  index = tmp_path / "model.safetensors.index.json"
  good = json.loads(index.read_text())
  first = sorted(set(good["weight_map"].values()))[0]
  index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], "ghost": first}}))
  assert "has no tensor ghost" in told(lmjax.load, tmp_path)
  index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
  assert "has no weight_map" in told(lmjax.load, tmp_path)
  index.write_text(json.dumps(good))
  (tmp_path / first).unlink()
  assert f"{first} is missing" in told(lmjax.load, tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(vocab_size=128), "config.model.vocab_size is 128, but the model in {} has 98; set config.model.vocab_size to "
     "98"),
    (dict(rope_theta=1e4), "config.model.rope_theta is 10000.0, but the model in {} has 500000.0"),
    (dict(tie_embeddings=True), "config.model.tie_embeddings is True, but the model in {} has False"),
    (dict(num_layers=2), "config.model.num_layers is 2, but the model in {} has 3"),
    (dict(norm_eps=1e-5), "config.model.norm_eps is 1e-05, but the model in {} has 1e-06"),
    (dict(attention_window=4), "config.model.attention_window is 4, but the model in {} has None"),
])
def test_import_refuses_another_model(folder_of, change, words):
  _, folder = folder_of("llama")
  model = make_model(dataclasses.replace(lmjax.load(folder)[0].cfg, **change))
  message = told(convert.import_params, folder, model, params_lib.abstract_params(model))
  assert words.format(folder) in message


def test_import_of_a_workdir_points_to_restore(folder_of, tmp_path):
  _, folder = folder_of("gpt2")
  convert.convert(folder, tmp_path / "run")
  model, _ = lmjax.load(folder)
  message = told(convert.import_params, tmp_path / "run", model, params_lib.abstract_params(model))
  assert "config.checkpoint.restore_from" in message


def test_a_target_in_use_is_left_alone(folder_of, tmp_path):
  _, folder = folder_of("gpt2")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").write_text("mine")
  for target in (tmp_path / "file", tmp_path / "full"):
    assert "exists already and is not an empty folder" in told(convert.convert, folder, target)
    assert "exists already" in told(lmjax.save_hf, *lmjax.load(folder), target)
  assert "not a local folder" in told(convert.convert, folder, "gs://bucket/x")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
  (tmp_path / "empty").mkdir()
  convert.convert(folder, tmp_path / "empty")
  assert lmjax.load(tmp_path / "empty")[0].cfg.num_layers == 3


def test_a_failure_half_way_leaves_nothing(folder_of, tmp_path, monkeypatch):
  model, params = lmjax.load(folder_of("gpt2")[1])
  full = lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
  monkeypatch.setattr("lmjax.convert.folders.write_tensors", full)
  assert "could not be written (No space left on device)" in told(lmjax.save_hf, model, params, tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_model_are_refused(folder_of, tmp_path):
  model, params = lmjax.load(folder_of("gpt2")[1])
  other = make_model(dataclasses.replace(model.cfg, num_layers=2))
  message = told(lmjax.save_hf, other, params, tmp_path / "out")
  assert "layers/attention/key/bias of shape (3, 4, 12), but the model makes it (2, 4, 12)" in message
  assert list(tmp_path.iterdir()) == []


def test_a_folder_without_tokenizer_says_so(folder_of):
  assert "has no tokenizer.json" in told(lmjax.load_tokenizer, folder_of("gpt2")[1])


def test_a_workdir_without_checkpoints_or_with_a_wrong_config(folder_of, tmp_path):
  convert.convert(folder_of("gpt2")[1], tmp_path / "run")
  os.rename(tmp_path / "run" / "checkpoints", tmp_path / "elsewhere")
  assert "has no checkpoints" in told(lmjax.load, tmp_path / "run")
  text = (tmp_path / "run" / "config.json").read_text()
  (tmp_path / "run" / "config.json").write_text(text.replace("num_layers", "num_layer"))
  assert "did you mean 'num_layers'?" in told(lmjax.load, tmp_path / "run")
