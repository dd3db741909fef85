"""Tests of the tables: layouts against matrices written by hand, and that each setting has its place."""

import dataclasses
import itertools

from flax import linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax.config import ModelConfig, UserError
from lmjax.convert import gpt2, hf_config
from lmjax.convert.family import Field, Key
from lmjax.convert.hf_config import FAMILIES
from lmjax.models.transformer import init_params, make_model

CFG = ModelConfig(embed_dim=2, num_heads=2, num_kv_heads=1, head_dim=3, mlp_dim=4, vocab_size=5, max_positions=6)


def test_rows_of_heads_become_axes():
  key = Key("q.{layer}", "NH,D", "query", "DNH")
  # Rows: head 0's three, then head 1's three. Columns: the model's two.
  tensor = np.array([[0, 10], [1, 11], [2, 12], [3, 13], [4, 14], [5, 15]])
  (got,) = key.split(tensor, CFG)
  assert got.tolist() == [[[0, 1, 2], [3, 4, 5]], [[10, 11, 12], [13, 14, 15]]]
  assert got.base is not None and key.join((got,), CFG).tolist() == tensor.tolist()
  assert key.shape(CFG) == (6, 2)
  assert key.names(dataclasses.replace(CFG, num_layers=2)) == {(0,): "q.0", (1,): "q.1"}


def test_a_fused_tensor_falls_into_its_parts():
  key = Key("qkv", "D,CNH", ("q", "k", "v"), "DNH")
  # Columns: query's six, key's six, value's six.
  tensor = np.arange(36).reshape(2, 18)
  query, key_, value = key.split(tensor, CFG)
  assert query.tolist() == [[[0, 1, 2], [3, 4, 5]], [[18, 19, 20], [21, 22, 23]]]
  assert key_.tolist() == [[[6, 7, 8], [9, 10, 11]], [[24, 25, 26], [27, 28, 29]]]
  assert value[1].tolist() == [[30, 31, 32], [33, 34, 35]]
  assert key.join((query, key_, value), CFG).tolist() == tensor.tolist()
  assert key.names(CFG) == {(): "qkv"} and key.shape(CFG) == (2, 18)


def models_of(family):
  """Yields the letters' sizes, each another where it can be, and small models with all that a family may have."""
  read = {field.ours for field in family.fields}
  own = {name: size for name, size in dict(
      embedding_dim=3, token_types=8, num_experts=10, experts_per_token=1, expert_dim=11, shared_expert_dim=12).items()
      if name in read}
  sizes = {"D": 2, "O": 2, "E": own.get("embedding_dim", 2), "N": 2, "K": 2, "H": 4, "F": 4, "V": 5, "L": 9, "U": 8,
           "P": 6 + family.fixed.get("position_offset", 0), "B": 32, "X": 10, "M": 11, "S": 12, "1": 1, "2": 2}
  sized = dict(num_kv_heads=2, num_layers=7, head_dim=4, num_labels=9, **own)
  for flags in itertools.product((True, False), repeat=2):
    free = dict(zip(("use_bias", "gated_mlp"), flags), tie_embeddings=flags[0])
    for architecture in family.architectures.values():
      settings = {**free, **family.fixed, **architecture, **sized}
      yield sizes, config_lib.fill_sizes(dataclasses.replace(CFG, mlp_dim=4, **settings))


def shapes_of(cfg):
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(make_model(cfg), jax.random.key(0))))
  return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_keys_cover_the_model_with_axes_of_its_shapes(family):
  for sizes, cfg in models_of(family):
    shapes = shapes_of(cfg)
    stacked = lambda key: (7,) * ("{layer}" in key.theirs) + (10,) * ("{expert}" in key.theirs)
    mapped = [(path, stacked(key) + tuple(sizes[letter] for letter in key.axes))
              for key in family.keys if key.exists(cfg, shapes) for path in key.paths]
    assert dict(mapped) == shapes and len(mapped) == len(shapes)


@pytest.mark.slow
def test_no_key_is_of_no_model():
  """Families share lists of keys, of which each uses those that it needs."""
  used, declared = set(), set()
  for family in FAMILIES.values():
    declared |= {*family.keys}
    for _, cfg in models_of(family):
      shapes = shapes_of(cfg)
      used |= {key for key in family.keys if key.exists(cfg, shapes)}
  assert used == declared


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_setting_named_in_a_table_exists(family):
  ours = {field.name for field in dataclasses.fields(ModelConfig)}
  assert {*family.fixed, *family.unused, *(field.ours for field in family.fields)} <= ours
  assert not {*family.fixed} & {field.ours for field in family.fields}


def test_a_setting_may_be_nested_computed_and_left_out():
  halved = Field("inner.half", "num_layers", read=lambda value, flat: 2 * value, write=lambda ours, cfg: ours // 2)
  quiet = Field("inner.eps", "norm_eps", 1e-6, optional=True)
  family = dataclasses.replace(gpt2.FAMILY, fields=(halved, quiet), written={})
  cfg = dataclasses.replace(CFG, num_layers=4, num_labels=2)
  written = lambda **settings: hf_config._written(family, dataclasses.replace(cfg, **settings))["inner"]
  assert written(norm_eps=1e-6) == {"half": 2} and written(norm_eps=1e-5) == {"half": 2, "eps": 1e-5}
  read = hf_config._read_model(family, {"inner": {"half": 3}}, "config.json")
  assert (read["num_layers"], read["norm_eps"]) == (6, 1e-6)


def test_another_class_of_a_family_is_refused():
  hf = dict(model_type="gpt2", architectures=["GPT2DoubleHeadsModel"], n_layer=1, n_embd=8, n_head=2, vocab_size=16)
  with pytest.raises(UserError, match=r"'GPT2DoubleHeadsModel'.*it does GPT2LMHeadModel, GPT2Model"):
    hf_config.from_hf(hf, "config.json")


LLAMA_LIKE = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=64,
                  max_positions=64, norm="rmsnorm", position="rotary", gated_mlp=True, activation="silu",
                  use_bias=False)
GPT2_LIKE = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=48, vocab_size=64,
                 max_positions=64)


@pytest.mark.parametrize("settings, family", [(GPT2_LIKE, "gpt2"), (LLAMA_LIKE, "llama")])
def test_training_settings_do_not_stand_in_the_way(settings, family):
  training = dict(dropout=0.1, init_std=0.1, scale_residual_init=True, remat_policy="full", scan_layers=False,
                  attention_impl="xla", dtype="bfloat16", param_dtype="bfloat16")
  assert hf_config.to_hf(ModelConfig(**settings, **training))[0].model_type == family


@pytest.mark.parametrize("base, change, told", [
    (LLAMA_LIKE, dict(qk_norm="all"), "llama would need another config.model.qk_norm than 'all'"),
    (GPT2_LIKE, dict(attention_window=8), "gpt2 would need another config.model.attention_window than 8"),
    (LLAMA_LIKE, dict(logit_softcap=30.0), "config.model.logit_softcap than 30.0"),
    (LLAMA_LIKE, dict(attention_softcap=50.0), "config.model.attention_softcap than 50.0"),
    (LLAMA_LIKE, dict(scale_embeddings=True), "config.model.scale_embeddings than True"),
    (LLAMA_LIKE, dict(block="parallel"), "config.model.block than 'parallel'"),
    (LLAMA_LIKE, dict(num_heads=6, num_kv_heads=2), "config.model.num_heads than 6"),
    (GPT2_LIKE, dict(position="alibi"), "gpt2 would need another config.model.position than 'alibi'"),
    (GPT2_LIKE, dict(position="sinusoidal"), "config.model.position than 'sinusoidal'"),
    (GPT2_LIKE, dict(block="post"), "config.model.block than 'post'"),
    (GPT2_LIKE, dict(num_kv_heads=2), "gpt2 would need another config.model.num_kv_heads than 2"),
    (GPT2_LIKE, dict(head_dim=16), "gpt2 would need another config.model.head_dim than 16"),
    (GPT2_LIKE, dict(norm_bias=False), "config.model.norm_bias than False"),
    (GPT2_LIKE, dict(use_bias=False), "gpt2 would need another config.model.qkv_bias than False")])
def test_what_no_family_expresses_is_named(base, change, told):
  with pytest.raises(UserError) as error:
    hf_config.to_hf(ModelConfig(**{**base, **change}))
  assert str(error.value).startswith("No Hugging Face family") and told in str(error.value)
  # The two nearest are named, not all.
  assert str(error.value).count("would need another") == 2
