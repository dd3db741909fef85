"""Adapters in PEFT's format: what they add to a family's tensors, and what PEFT itself makes of them."""

import json
import re

from flax import linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from lmjax import convert
from lmjax.config import OptimConfig, UserError, base_config, from_config_dict, resolve_model
from lmjax.convert import hf_config
from lmjax.convert.params import boxed_shapes, hf_tensors
from lmjax.convert.peft import peft_adapter
from lmjax.models import families
from lmjax.models.transformer import make_model
from lmjax.optim import lora

EVERYTHING = r"/kernel$"
ATTENTION = OptimConfig(lora_rank=3).lora_targets
SEQUENCE = dict(head="sequence", num_labels=3)


def made(family, targets, policy=(), **changes):
  """Returns a small model, random parameters with adapters, and the settings."""
  config = base_config()
  config.train.num_steps, config.data.seq_len = 1, 16
  config.model.update({**families.debug(families.preset(family)), **changes})
  config.optim.update(lora_rank=3, lora_alpha=4.5, lora_targets=targets, freeze_policy=policy)
  config = from_config_dict(config)
  model, random = make_model(resolve_model(config, 64).model), np.random.default_rng(0)
  draw = lambda x: (0.2 * random.normal(size=x.shape)).astype(np.float32)
  return model, jax.tree.map(draw, nn.unbox(boxed_shapes(model, config.optim))), config.optim


def tensors_of(model, params):
  return dict(hf_tensors(hf_config.to_hf(model.cfg)[0], model.cfg, params)[1])


# The family, the kernels, and what is changed of the model.
CASES = {
    "llama": ("llama", EVERYTHING, dict(tie_embeddings=False)),
    "gpt2": ("gpt2", ATTENTION, {}),
    "gpt2_all": ("gpt2", EVERYTHING, {}),
    "pythia": ("pythia", r"attention/(key|out)/", {}),
    "gemma": ("gemma", EVERYTHING, {}),
    "bert": ("bert", EVERYTHING, dict(head="lm")),
    "bert_pooled": ("bert", ATTENTION, dict(head="none")),
    "albert": ("albert", EVERYTHING, dict(head="lm")),
    "t5": ("t5", EVERYTHING, {}),
    "t5_decoder": ("t5_1_1", "^decoder/layers/attention/query", {}),
    "bart": ("bart", EVERYTHING, {}),
    "mixtral": ("mixtral", "attention/", {}),
    "qwen2_moe": ("qwen2_moe", "attention/|shared", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_they_add_to_tensors_what_is_merged(name, tmp_path):
  family, targets, changes = CASES[name]
  model, params, cfg = made(family, targets, **changes)
  convert.save_peft(model, params, cfg, tmp_path / "adapter")
  settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  base, merged = (tensors_of(model, tree) for tree in (lora.without(params), lora.merge(params, cfg)))
  modules = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
             for key in tensors if key.endswith("lora_A.weight")}
  # A head's layers start at random, so they learn as a whole beside the adapters.
  whole = ["pooler.dense"] if name == "bert_pooled" else None
  assert settings["modules_to_save"] == whole and len(tensors) == 2 * len(modules) + 2 * len(whole or ())
  for key, tensor in base.items():
    module, change = key.removesuffix(".weight"), merged[key] - tensor
    if module not in modules:
      assert not np.any(change), key
      continue
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    rank = settings["rank_pattern"].get(module, settings["r"])
    product = settings["alpha_pattern"].get(module, settings["lora_alpha"]) / rank * b @ a
    assert a.shape[0] == b.shape[1] == rank and np.any(change)
    np.testing.assert_allclose(product.T if settings["fan_in_fan_out"] else product, change, atol=2e-6, err_msg=key)
  meant = {key.removesuffix(".weight") for key in base if any(
      key.removesuffix(".weight") == target or key.removesuffix(".weight").endswith(f".{target}")
      for target in settings["target_modules"])}
  assert meant == modules


def test_short_names_are_given_where_they_mean_the_same():
  short = lambda *case: hf_settings(*made(*case))["target_modules"]
  assert short("llama", ATTENTION) == ["q_proj", "v_proj"]
  assert short("t5", "attention/query/") == ["q"]
  assert short("t5", "^encoder/.*attention/query/") == [f"encoder.block.{i}.layer.0.SelfAttention.q" for i in range(2)]


def hf_settings(model, params, cfg):
  return peft_adapter(hf_config.to_hf(model.cfg)[0], model, params, cfg)[0]


@pytest.mark.parametrize("family, targets, path", [
    ("mixtral", "mlp/up", "layers/mlp/up/kernel"), ("qwen2_moe", "router", "layers/mlp/router/kernel"),
    ("xlnet", "query", "layers/attention/query/kernel")])
def test_what_has_no_place_is_told(family, targets, path, tmp_path):
  with pytest.raises(UserError, match=f"What {path} has learned has no place in PEFT's format"):
    convert.save_peft(*made(family, targets), tmp_path / "adapter")
  assert not (tmp_path / "adapter").exists()


def test_parameters_without_adapters_are_told(tmp_path):
  model, params, cfg = made("llama", ATTENTION)
  with pytest.raises(UserError, match="The parameters have no adapters; train with config.optim.lora_rank"):
    convert.save_peft(model, lora.merge(params, cfg), cfg, tmp_path / "adapter")
  convert.save_hf(model, lora.merge(params, cfg), tmp_path / "hf")
  with pytest.raises(UserError, match="hf is no run with adapters; convert without --adapter"):
    convert.convert(tmp_path / "hf", tmp_path / "adapter", adapter=True)


@pytest.mark.parametrize("case", [
    ("llama", EVERYTHING, (), dict(tie_embeddings=False)), ("gpt2", ATTENTION, (), {}), ("gpt2", EVERYTHING, (), {}),
    ("pythia", ATTENTION, (), {}), ("bert", EVERYTHING, (), dict(head="lm")), ("t5", ATTENTION, (), {}),
    ("t5", "^encoder/.*query", (), {}), ("albert", ATTENTION, (), dict(head="lm")),
    ("mixtral", ATTENTION, (), {}), ("llama", ATTENTION, (("sequence_head", 0),), SEQUENCE),
    ("bert", ATTENTION, (("sequence_head", 0), ("^layers/attention_norm", 0)), SEQUENCE)],
                         ids=lambda case: f"{case[0]}-{case[1]}-{len(case[2])}")
def test_peft_computes_what_is_merged(case, tmp_path):
  peft = pytest.importorskip("peft")
  family, targets, policy, changes = case
  model, params, cfg = made(family, targets, policy, **changes)
  convert.save_peft(model, params, cfg, tmp_path / "adapter")
  # A base in which what learns as a whole is as it was before.
  base = flax.traverse_util.flatten_dict(lora.without(params), sep="/")
  base = {path: 0.5 * leaf if any(re.search(pattern, path) for pattern, _ in policy) else leaf
          for path, leaf in base.items()}
  convert.save_hf(model, flax.traverse_util.unflatten_dict(base, sep="/"), tmp_path / "base")
  convert.save_hf(model, lora.merge(params, cfg), tmp_path / "merged")
  name = json.loads((tmp_path / "base" / "config.json").read_text())["architectures"][0]
  load = lambda folder: getattr(transformers, name).from_pretrained(tmp_path / folder).eval()
  tokens = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(0))
  inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :5]} if family == "t5" else {})
  inputs["attention_mask"] = torch.ones_like(tokens)
  with torch.no_grad():
    plain, merged = (load(folder)(**inputs).logits for folder in ("base", "merged"))
    adapted = peft.PeftModel.from_pretrained(load("base"), tmp_path / "adapter").eval()(**inputs).logits
  scale = float(merged.abs().max())
  torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-5 * max(1, scale))
  assert (merged - plain).abs().max() > 0.02 * scale
