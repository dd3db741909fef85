"""Tests that a converted model computes what transformers computes, in both directions."""

import copy
import dataclasses
import json
import os

from flax import linen as nn
import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
import torch
import transformers

import lmjax
from lmjax import convert, partitioning
from lmjax.checkpoint import Checkpointer
from lmjax.config import CheckpointConfig, MeshConfig, ModelConfig, from_json, to_json
from lmjax.convert import hf_config, llama, tensor_files
from lmjax.convert import params as params_lib
from lmjax.data.tokenizer import byte_tokenizer
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model

TOKENS = np.random.default_rng(0).integers(0, 98, (2, 512))


def logits_of(reference):
  with torch.no_grad():
    return reference(torch.tensor(TOKENS)).logits.numpy()


def tensors_of(folder):
  """Returns {name: (type, bytes)} over all safetensors files of a folder."""
  found = {}
  for path in folder.glob("*.safetensors"):
    with safe_open(path, "np") as file:
      for name in file.keys():
        tensor = file.get_tensor(name)
        assert name not in found
        found[name] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
  return found


def random_params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), params_lib.abstract_params(model))


def same(one, other):
  return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, one, other))


def test_imported_logits_are_those_of_transformers(variant):
  reference, folder = variant
  model, params = lmjax.load(folder)
  expected, got = logits_of(reference), np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_exported_import_is_byte_equal_and_transformers_computes_the_same(variant, tmp_path):
  reference, folder = variant
  lmjax.save_hf(*lmjax.load(folder), tmp_path / "out")
  assert tensors_of(tmp_path / "out") == tensors_of(folder)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  assert type(again) is type(reference)
  np.testing.assert_array_equal(logits_of(again), logits_of(reference))


def test_a_file_of_the_model_without_head_prefix_loads(folder_of, tmp_path):
  reference, folder = folder_of("gpt2")
  reference.transformer.save_pretrained(tmp_path / "base")
  assert "wte.weight" in tensors_of(tmp_path / "base")
  assert same(lmjax.load(tmp_path / "base")[1], lmjax.load(folder)[1])


def test_buffers_and_an_equal_copy_of_tied_weights_are_passed_over(folder_of, copy_of):
  folder = copy_of("gpt2")
  tensors = load_file(folder / "model.safetensors")
  tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 512, 512), np.uint8)
  tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
  save_file(tensors, folder / "model.safetensors")
  assert same(lmjax.load(folder)[1], lmjax.load(folder_of("gpt2")[1])[1])


def test_half_precision_files_are_read_as_float32(folder_of, tmp_path):
  reference, _ = folder_of("llama")
  copy.deepcopy(reference).bfloat16().save_pretrained(tmp_path)
  _, params = lmjax.load(tmp_path)
  got = params["layers"]["mlp"]["up"]["kernel"]
  expected = reference.model.layers[1].mlp.up_proj.weight.bfloat16().float().T.detach().numpy()
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got[1], expected)


def test_old_and_new_names_of_rope_settings_agree(folder_of, copy_of):
  folder = copy_of("llama", rope_parameters=None, rope_theta=5e5, rope_scaling=None)
  assert lmjax.load(folder)[0].cfg == lmjax.load(folder_of("llama")[1])[0].cfg
  assert lmjax.load(folder)[0].cfg.rope_theta == 5e5


def test_shards_and_their_index_are_written_and_read(folder_of, tmp_path):
  reference, folder = folder_of("llama")
  model, params = lmjax.load(folder)
  family, settings = hf_config.to_hf(model.cfg)
  (tmp_path / "config.json").write_text(json.dumps(settings))
  sizes, tensors = params_lib.hf_tensors(family, model.cfg, params)
  tensor_files.write_tensors(tmp_path, sizes, tensors, shard_bytes=40_000)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
  assert tensors_of(tmp_path) == tensors_of(folder)
  assert same(lmjax.load(tmp_path)[1], params)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  np.testing.assert_array_equal(logits_of(again), logits_of(reference))


def test_shards_of_transformers_are_read(folder_of, tmp_path):
  reference, folder = folder_of("llama")
  reference.save_pretrained(tmp_path, max_shard_size="40KB")
  assert not (tmp_path / "model.safetensors").exists()
  assert same(lmjax.load(tmp_path)[1], lmjax.load(folder)[1])


def test_a_model_of_ours_goes_out_and_comes_back(tmp_path):
  cfg = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=128,
                    max_positions=64, dtype="float32", param_dtype="bfloat16", dropout=0.1,
                    **{**families.llama_style(), "tie_embeddings": True})
  model = make_model(cfg)
  params = random_params(model)
  lmjax.save_hf(model, params, tmp_path / "hf")
  again, got = lmjax.load(tmp_path / "hf")
  assert hf_config.differences(llama.FAMILY, model.cfg, again.cfg) == []
  assert same(got, jax.tree.map(lambda x: x.astype(np.float32), params))
  reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
  assert reference.dtype == torch.bfloat16
  mode = lambda name: os.stat(tmp_path / "hf" / name).st_mode
  assert mode("model.safetensors") == mode("config.json")


def test_import_onto_a_mesh_reads_each_tensor_once(folder_of, monkeypatch):
  _, folder = folder_of("llama_heads")
  model, params = lmjax.load(folder)
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  shardings = partitioning.param_shardings(mesh, boxed)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, np.dtype("bfloat16"), sharding=s), nn.unbox(boxed),
                          shardings)
  read = []
  monkeypatch.setattr(tensor_files.TensorFiles, "read",
                      lambda self, name: read.append(name) or self._files[name].get_tensor(name))
  cfg = dataclasses.replace(model.cfg, dropout=0.1, max_positions=7, remat_policy="full")
  got = convert.import_params(folder, make_model(cfg), abstract)
  assert sorted(read) == sorted(tensors_of(folder))
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, got, shardings))
  kernel = got["layers"]["attention"]["query"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 24, 2, 16)
  assert same(jax.device_get(got), jax.device_get(jax.tree.map(lambda x: x.astype("bfloat16"), params)))


def test_a_workdir_made_of_a_folder_holds_the_same_model(folder_of, tmp_path):
  _, folder = folder_of("gpt2")
  told = convert.convert(folder, tmp_path / "run")
  assert "gpt2" in told and "step 0" in told
  model, params = lmjax.load(tmp_path / "run")
  expected_model, expected = lmjax.load(folder)
  assert model.cfg == expected_model.cfg and same(params, expected)
  config = from_json((tmp_path / "run" / "config.json").read_text())
  assert config.train.num_steps == 1 and config.model.vocab_size == 98 and config.model.max_positions == 512
  assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_workdir_becomes_a_folder(folder_of, tmp_path):
  reference, folder = folder_of("llama_biases")
  convert.convert(folder, tmp_path / "run")
  told = convert.convert(str(tmp_path / "run"), str(tmp_path / "hf"))
  assert "model_type llama" in told
  assert tensors_of(tmp_path / "hf") == tensors_of(folder)


def test_of_a_run_with_averaged_weights_those_are_taken(tmp_path):
  config = hf_config.from_hf(dict(model_type="gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8),
                             "x")[1]
  params = random_params(make_model(config.model))
  ema = jax.tree.map(lambda x: jax.numpy.ones_like(x), params)
  checkpointer = Checkpointer(tmp_path, CheckpointConfig())
  checkpointer.save(3, {"params": params, "ema": ema}, {})
  checkpointer.close()
  (tmp_path / "config.json").write_text(to_json(config))
  assert same(lmjax.load(tmp_path)[1], ema)


def test_the_tokenizer_goes_along(tmp_path):
  tokenizer = byte_tokenizer()
  cfg = hf_config.from_hf(dict(model_type="gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=384, n_positions=8),
                          "x")[1].model
  model = make_model(cfg)
  lmjax.save_hf(model, random_params(model), tmp_path / "hf", tokenizer)
  text = "def f(x):\n  return 'é'  # <|endoftext|>?"
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert theirs.eos_token_id == tokenizer.eos_id
  assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.eos_id
  assert theirs(text[:25])["input_ids"] == tokenizer.encode(text[:25]) == list(text[:25].encode())
  assert lmjax.load_tokenizer(tmp_path / "hf").encode(text) == tokenizer.encode(text)

  settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()) | {"chat_template": "{{ x }}"}
  (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
  (tmp_path / "hf" / "special_tokens_map.json").write_text("{}")
  convert.convert(tmp_path / "hf", tmp_path / "run")
  assert lmjax.load_tokenizer(tmp_path / "run").encode(text) == tokenizer.encode(text)
  config = from_json((tmp_path / "run" / "config.json").read_text())
  assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
  convert.convert(tmp_path / "run", tmp_path / "again")
  assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == settings
  for name in ("tokenizer.json", "special_tokens_map.json"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == tokenizer.eos_id
