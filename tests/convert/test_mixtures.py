"""Tests that each mixture of experts computes what transformers does, in both directions and with ties in routing."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
import torch
import transformers

import lmjax
from lmjax import config as config_lib
from lmjax.config import ModelConfig, UserError
from lmjax.convert import hf_config
from lmjax.models import families
from lmjax.models.transformer import make_model

SMALL = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=98, max_position_embeddings=640, bos_token_id=None, eos_token_id=None, pad_token_id=None)
MIXTRAL = dict(num_local_experts=6, num_experts_per_tok=2)
QWEN2 = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=40)
QWEN3 = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16)
SLIDING, FULL = "sliding_attention", "full_attention"
VARIANTS = {
    "mixtral": ("mixtral", dict(MIXTRAL, sliding_window=100)),
    "mixtral_one": ("mixtral", dict(MIXTRAL, num_experts_per_tok=1, head_dim=16, tie_word_embeddings=True)),
    "qwen2_moe": ("qwen2_moe", QWEN2),
    "qwen2_moe_window": ("qwen2_moe", dict(QWEN2, norm_topk_prob=True, qkv_bias=False, use_sliding_window=True,
                                           sliding_window=70, layer_types=[FULL, SLIDING])),
    "qwen3_moe": ("qwen3_moe", dict(QWEN3, norm_topk_prob=True)),
    "qwen3_moe_window": ("qwen3_moe", dict(QWEN3, attention_bias=True, use_sliding_window=True, sliding_window=50)),
}
LENGTH = 515
TOKENS = np.random.default_rng(0).integers(0, 98, (2, LENGTH))
# The second row is padded on both sides.
MASK = np.ones((2, LENGTH), np.int64)
MASK[1, :37] = MASK[1, 400:] = 0
REAL = MASK == 1
FAST = {"xla_backend_optimization_level": 0}  # Compiling fast is worth more here than running fast.


def make(kind, **settings):
  """Returns a random transformers model in float32 with its plain attention."""
  torch.manual_seed(0)
  # A config keeps the objects it is given, and fills them in.
  config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SMALL, **settings}))
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model.eval()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Returns a function from a variant to (the model, its folder)."""
  made = {}

  def get(name):
    if name not in made:
      kind, settings = VARIANTS[name]
      model, folder = make(kind, **settings), tmp_path_factory.mktemp(name)
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return get


def reference_outputs(reference):
  """Returns the logits, and what the final norm makes of the residual stream after the first of two layers."""
  with torch.no_grad():
    out = reference(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), output_hidden_states=True)
    return out.logits.numpy(), reference.model.norm(out.hidden_states[1]).numpy()


def run(function, *args):
  """Compiles and calls a function."""
  return np.asarray(jax.jit(function, compiler_options=FAST)(*args))


def logits_of(model, params):
  """Returns the logits of a model of ours."""
  return run(lambda params, ids: model.apply({"params": params}, TOKENS, None, ids), params, MASK)


def hidden_of(model, params):
  """Returns what its final norm makes of the residual stream after the first layer."""
  short = make_model(dataclasses.replace(model.cfg, num_layers=1))
  params = dict(params, layers=jax.tree.map(lambda x: x[:1], params["layers"]))
  return run(lambda params, ids: short.apply({"params": params}, TOKENS, None, ids, method="features")[0], params, MASK)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(folder_of, name):
  reference, folder = folder_of(name)
  got, expected = logits_of(*lmjax.load(folder)), reference_outputs(reference)[0]
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(got[REAL], expected[REAL], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_hidden_states_are_those_of_transformers(folder_of, name):
  reference, folder = folder_of(name)
  got, expected = hidden_of(*lmjax.load(folder)), reference_outputs(reference)[1]
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(got[REAL], expected[REAL], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_exported_import_is_byte_equal_and_transformers_computes_the_same(folder_of, name, tmp_path):
  reference, folder = folder_of(name)
  model, params = lmjax.load(folder)
  lmjax.save_hf(model, params, tmp_path / "out")
  ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
  assert ours.keys() == theirs.keys() and any(".experts.5." in key for key in ours)
  for key in ours:
    assert ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes(), key
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  assert type(again) is type(reference)
  np.testing.assert_array_equal(reference_outputs(again)[0], reference_outputs(reference)[0])
  assert lmjax.load(tmp_path / "out")[0].cfg == model.cfg


def first_of_equals(x, k, dim):
  """torch.topk, but sure to take the first of equal values: which it takes itself depends on sizes and devices."""
  values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
  return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_ties_in_routing(name, tmp_path, monkeypatch):
  kind, settings = VARIANTS[name]
  reference = make(kind, **settings)
  mixtures = [layer.mlp for layer in reference.model.layers]
  with torch.no_grad():
    for mixture in mixtures:
      mixture.gate.weight[[1, 3]] = 0  # Their logits are zero, which is the same in any order of adding up.
  reference.save_pretrained(tmp_path / "tied")
  model, params = lmjax.load(tmp_path / "tied")
  logits = jax.jit(lambda params, ids: model.apply({"params": params}, TOKENS, None, ids), compiler_options=FAST)
  ours, theirs = np.asarray(logits(params, MASK)), reference_outputs(reference)[0]
  # Often one of the two is chosen and the other not, and not the one that is chosen here.
  assert (np.abs(ours - theirs)[REAL].max(-1) > 1e-2).sum() > 100
  with monkeypatch.context() as patch:
    patch.setattr(torch, "topk", first_of_equals)
    np.testing.assert_allclose(ours[REAL], reference_outputs(reference)[0][REAL], rtol=0, atol=1e-4)
  with torch.no_grad():
    for mixture in mixtures:
      for experts in (mixture.experts.gate_up_proj, mixture.experts.down_proj):
        experts[3] = experts[1]
  # As in a mixture that begins with copies of one MLP: then it is all the same which is chosen.
  reference.save_pretrained(tmp_path / "copies")
  ours, theirs = np.asarray(logits(lmjax.load(tmp_path / "copies")[1], MASK)), reference_outputs(reference)[0]
  np.testing.assert_allclose(ours[REAL], theirs[REAL], rtol=0, atol=1e-4)


def model_of(kind, **settings):
  hf = dict(model_type=kind, num_hidden_layers=3, hidden_size=64, intermediate_size=48, num_attention_heads=16,
            vocab_size=64, **settings)
  return hf_config.from_hf(hf, "config.json")[1].model


@pytest.mark.parametrize("kind, settings", [
    ("mixtral", {}), ("qwen2_moe", {}), ("qwen3_moe", {}),
    ("qwen2_moe", dict(use_sliding_window=True)),
    ("qwen2_moe", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    ("qwen3_moe", dict(use_sliding_window=True))])
def test_what_a_config_lacks_is_what_transformers_takes(kind, settings):
  sizes = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=48, num_attention_heads=16, vocab_size=64)
  full = transformers.AutoConfig.for_model(kind, **sizes, **settings).to_dict()
  assert len(full) > len(settings) + 20
  assert model_of(kind, **settings) == hf_config.from_hf(full, "config.json")[1].model


# The released config.json, without what tells nothing about the model.
RELEASED = {
    "mixtral": (families.mixtral("8x7B"), dict(
        architectures=["MixtralForCausalLM"], attention_dropout=0.0, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32,
        num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8,
        output_router_logits=False, rms_norm_eps=1e-05, rope_theta=1000000.0, router_aux_loss_coef=0.02,
        sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=32000)),
    "qwen2_moe": (families.qwen2_moe("A2.7B"), dict(
        architectures=["Qwen2MoeForCausalLM"], attention_dropout=0.0, hidden_act="silu", hidden_size=2048,
        initializer_range=0.02, intermediate_size=5632, max_position_embeddings=8192, max_window_layers=21,
        num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-06, rope_theta=1000000.0,
        sliding_window=32768, tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
        decoder_sparse_step=1, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts_per_tok=4,
        num_experts=60, norm_topk_prob=False, output_router_logits=False, router_aux_loss_coef=0.001)),
    "qwen3_moe": (families.qwen3_moe("30B-A3B"), dict(
        architectures=["Qwen3MoeForCausalLM"], attention_bias=False, attention_dropout=0.0, decoder_sparse_step=1,
        head_dim=128, hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=6144,
        max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768,
        norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
        num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000.0,
        router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False, use_sliding_window=False,
        vocab_size=151936)),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_a_preset_is_the_released_model_with_the_numbers_of_parameters_there(kind):
  preset, released = RELEASED[kind]
  family, config = hf_config.from_hf(dict(released, model_type=kind), "config.json")
  cfg = config_lib.fill_sizes(ModelConfig(**{**preset, "max_positions": released["max_position_embeddings"]}))
  assert hf_config.differences(family, cfg, config.model) == []
  written_as, hf = hf_config.to_hf(cfg)
  assert written_as.model_type == kind
  with torch.device("meta"):
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
  shapes = jax.eval_shape(lambda: make_model(cfg).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(x.numel() for x in reference.parameters())


@pytest.mark.parametrize("kind, settings, told", [
    ("qwen2_moe", dict(decoder_sparse_step=2), "decoder_sparse_step = 2, which lmjax does not do; it does 1 only"),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers = [0], which lmjax does not do; it does [] only"),
    ("mixtral", dict(num_local_experts=0), "num_local_experts = 0, which lmjax does not do; it does 1 and more"),
    ("qwen2_moe", dict(num_experts=0), "num_experts = 0, which lmjax does not do"),
    ("qwen3_moe", dict(num_local_experts=0), "num_local_experts = 0, which lmjax does not do"),
    ("qwen3_moe", dict(num_experts=4, num_local_experts=8), "num_experts = 4 but num_local_experts = 8; make"),
    ("qwen2_moe", dict(shared_expert_intermediate_size=0), "shared_expert_intermediate_size = 0, which lmjax does not"),
    ("qwen2_moe", dict(layer_types=[SLIDING, FULL, FULL]), "config.model.attention_window is None"),
    ("qwen3_moe", dict(layer_types=[SLIDING, FULL, FULL]), "layer_types = ['sliding_attention', 'full_attention', "),
    ("qwen3_moe", dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size = 8, which lmjax does not "
                                                           "know in qwen3_moe"),
    ("mixtral", dict(num_experts_per_tok=9), "experts_per_token is 9, but there are only 8 experts"),
    ("mixtral", dict(norm_topk_prob=True), "norm_topk_prob = True, which lmjax does not know in mixtral")])
def test_what_is_not_supported_is_refused_by_name(kind, settings, told):
  with pytest.raises(UserError) as error:
    model_of(kind, **settings)
  assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes, told", [
    (dict(expert_capacity_factor=1.25), "mixtral would need another config.model.expert_capacity_factor than 1.25"),
    (dict(gated_mlp=False), "mixtral would need another config.model.gated_mlp than False"),
    (dict(normalize_expert_weights=False), "mixtral would need another config.model.normalize_expert_weights")])
def test_a_mixture_that_no_family_expresses_is_told(changes, told):
  with pytest.raises(UserError) as error:
    hf_config.to_hf(ModelConfig(**{**families.mixtral(), "max_positions": 64, **changes}))
  assert told in str(error.value)
