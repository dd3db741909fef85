"""Tests that each decoder computes what transformers computes, at odd lengths and with padding, in both directions."""

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

SMALL = dict(num_hidden_layers=3, hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=98, max_position_embeddings=640, bos_token_id=None, eos_token_id=None, pad_token_id=None)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=3.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=3.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=80)
YARN_FULL = dict(YARN, beta_fast=12.0, beta_slow=0.5, attention_factor=1.2)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=128)
SLIDING, FULL = "sliding_attention", "full_attention"
VARIANTS = {
    "llama_dynamic": ("llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=300)),
    "llama_yarn": ("llama", dict(rope_parameters=YARN_FULL, head_dim=32)),
    "llama_llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "mistral": ("mistral", dict(sliding_window=100, head_dim=16)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=70, max_window_layers=1)),
    "qwen2_yarn": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3": ("qwen3", dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=50,
                            layer_types=[SLIDING, FULL, SLIDING])),
    "gemma": ("gemma", dict(head_dim=16, num_key_value_heads=1)),
    "gemma2": ("gemma2", dict(head_dim=16, sliding_window=60, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
                              final_logit_softcapping=6.0)),
    "gemma3": ("gemma3_text", dict(
        head_dim=16, sliding_window=60, query_pre_attn_scalar=20, layer_types=[SLIDING, SLIDING, FULL],
        rope_parameters={FULL: dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                         SLIDING: dict(rope_type="default", rope_theta=1e4)})),
    "gpt_neox": ("gpt_neox", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                       partial_rotary_factor=1 / 3))),
    "gpt_neox_sequential": ("gpt_neox", dict(
        use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new",
        rope_parameters=dict(LINEAR, partial_rotary_factor=0.5))),
    "olmo2": ("olmo2", dict(attention_bias=True, rms_norm_eps=1e-6)),
}
LENGTH = 515
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 98, (2, LENGTH))
# The second row is padded on both sides.
MASK = np.ones((2, LENGTH), np.int64)
MASK[1, :37] = MASK[1, 400:] = 0


def make(name, **changes):
  """Returns a random transformers model in float32 with its plain attention."""
  torch.manual_seed(0)
  kind, settings = VARIANTS[name]
  small = {key: value for key, value in SMALL.items() if kind != "gpt_neox" or key != "num_key_value_heads"}
  # A config keeps the objects it is given, and fills them in.
  config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**small, **settings, **changes}))
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
      model, folder = make(name), tmp_path_factory.mktemp(name)
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return get


def reference_outputs(reference):
  with torch.no_grad():
    out = reference(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), output_hidden_states=True)
    final_norm = getattr(reference.base_model, "norm", None) or reference.base_model.final_layer_norm
    # What the final norm makes of the residual stream after two of the three layers.
    return out.logits.numpy(), final_norm(out.hidden_states[2]).numpy()


def hidden_after_two(model, params):
  """Returns the same of a model of ours: it with its first two layers only, up to the head."""
  short = make_model(dataclasses.replace(model.cfg, num_layers=2, attention_impl="xla"))
  params = dict(params, layers=jax.tree.map(lambda x: x[:2], params["layers"]))
  return run(lambda params, ids: short.apply({"params": params}, TOKENS, None, ids, method="features")[0], params, MASK)


def run(function, *args):
  """Compiles and calls a function; compiling fast is worth more here than running fast."""
  return np.asarray(jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*args))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_hidden_states_are_those_of_transformers(folder_of, name):
  reference, folder = folder_of(name)
  model, params = lmjax.load(folder)
  logits, hidden = reference_outputs(reference)
  got = run(lambda params, ids: model.apply({"params": params}, TOKENS, None, ids), params, MASK)
  real = MASK == 1
  assert np.abs(logits).max() > 1 and np.abs(hidden).max() > 1
  np.testing.assert_allclose(got[real], logits[real], rtol=0, atol=1e-4)
  np.testing.assert_allclose(hidden_after_two(model, params)[real], hidden[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_exported_import_is_byte_equal_and_transformers_computes_the_same(folder_of, name, tmp_path):
  reference, folder = folder_of(name)
  lmjax.save_hf(*lmjax.load(folder), tmp_path / "out")
  ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
  assert ours.keys() == theirs.keys()
  for key in ours:
    assert ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes(), key
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  assert type(again) is type(reference)
  np.testing.assert_array_equal(reference_outputs(again)[0], reference_outputs(reference)[0])
  assert lmjax.load(tmp_path / "out")[0].cfg == lmjax.load(folder)[0].cfg


def model_of(kind, **settings):
  hf = dict(model_type=kind, num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            vocab_size=64, **({} if kind == "gpt_neox" else dict(num_key_value_heads=2)), **settings)
  return hf_config.from_hf(hf, "config.json")[1].model


@pytest.mark.parametrize("kind, settings, expected", [
    ("llama", dict(rope_theta=5e5, rope_scaling=None), dict(rope_theta=5e5)),
    ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), dict(rope_scaling="linear", rope_factor=2.0)),
    ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=99),
     dict(rope_scaling="dynamic", rope_factor=2.0, rope_original_positions=99)),
    ("llama", dict(rope_theta=5e5, rope_scaling={key: value for key, value in LLAMA3.items() if key != "rope_theta"}),
     dict(rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0, rope_original_positions=128, rope_low_frequency=1.0,
          rope_high_frequency=4.0)),
    ("qwen2", dict(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
     dict(rope_scaling="yarn", rope_factor=4.0, rope_original_positions=32, rope_high_frequency=32.0,
          rope_low_frequency=1.0, rope_attention_factor=None)),
    ("qwen3", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=70),
     dict(rope_original_positions=70, head_dim=128)),
    ("mistral", dict(sliding_window=None), dict(attention_window=None)),
    ("mistral", {}, dict(attention_window=4096)),
    ("qwen2", dict(use_sliding_window=False, sliding_window=16, max_window_layers=0),
     dict(attention_window=None, attention_pattern=())),
    ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=0),
     dict(attention_window=16, attention_pattern=())),
    ("qwen3", dict(use_sliding_window=True, sliding_window=16, max_window_layers=2),
     dict(attention_window=16, attention_pattern=("global", "global", "local"))),
    ("gemma", dict(hidden_act="gelu"), dict(activation="gelu_tanh", tie_embeddings=True)),
    ("gemma2", dict(sliding_window=16, head_dim=8), dict(
        attention_window=16, attention_pattern=("local", "global"), attention_softcap=50.0, logit_softcap=30.0,
        attention_scale=1 / 16)),
    ("gemma3_text", dict(sliding_window=16, sliding_window_pattern=2, rope_theta=1e6, rope_local_base_freq=2e4,
                         rope_scaling={"rope_type": "linear", "factor": 8.0}),
     dict(attention_pattern=("local", "global"), rope_theta=1e6, local_rope_theta=2e4, rope_scaling="linear",
          rope_factor=8.0, attention_scale=None)),
    ("gemma3_text", {}, dict(attention_pattern=(), attention_window=4096, rope_theta=1e6, local_rope_theta=1e4)),
    ("gpt_neox", dict(rotary_pct=0.5, rotary_emb_base=5e4), dict(rotary_fraction=0.5, rope_theta=5e4,
                                                                block="parallel_two")),
])
def test_old_names_and_defaults_are_read(kind, settings, expected):
  cfg = model_of(kind, **settings)
  assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize("kind, settings, told", [
    ("llama", dict(rope_scaling={"type": "longrope", "factor": 2.0}), "rope_scaling.type = 'longrope', which lmjax"),
    ("llama", dict(rope_parameters=dict(YARN, truncate=False)), "rope_parameters.truncate = False, which lmjax"),
    ("llama", dict(rope_parameters=dict(YARN, mscale=0.7)), "rope_parameters.mscale = 0.7, which lmjax does not know"),
    ("llama", dict(rope_parameters=dict(LINEAR, factor=0.5)), "rope_factor is 0.5, but it must be at least 1"),
    ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=dict(LINEAR, rope_type="default")),
     "rope_parameters.rope_type = 'default' but rope_scaling.type = 'linear'; make them equal"),
    ("mistral", dict(attention_bias=True), "attention_bias = True, which lmjax does not know in mistral"),
    ("qwen2", dict(layer_types=["full_attention", "chunked_attention", "full_attention"]), "'chunked_attention'"),
    ("qwen2", dict(layer_types=[SLIDING, FULL, FULL]), "config.model.attention_window is None"),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True, which lmjax does not do"),
    ("gemma", dict(hidden_activation="gelu"), "hidden_activation = 'gelu', which lmjax does not do"),
    ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0, which lmjax does not do"),
    ("gemma3_text", dict(rope_parameters={SLIDING: dict(rope_type="linear", factor=2.0)}),
     "rope_parameters.sliding_attention.rope_type = 'linear', which lmjax does not do"),
    ("gpt_neox", dict(hidden_act="mish"), "hidden_act = 'mish', which lmjax does not do"),
    ("olmo2", dict(clip_qkv=8.0), "clip_qkv = 8.0, which lmjax does not know in olmo2"),
    ("gemma3", {}, "model_type 'gemma3', which lmjax cannot convert; did you mean"),
])
def test_what_is_not_supported_is_refused_by_name(kind, settings, told):
  with pytest.raises(UserError) as error:
    model_of(kind, **settings)
  assert told in str(error.value) and "\n" not in str(error.value)


PRESETS = {"smollm": ("llama", families.smollm()), "mistral": ("mistral", families.mistral()),
           "qwen2": ("qwen2", families.qwen2()), "qwen3": ("qwen3", families.qwen3()),
           "gemma": ("gemma", families.gemma("2b")), "gemma2": ("gemma2", families.gemma("2-27b")),
           "gemma3": ("gemma3_text", families.gemma("3-1b")), "gemma3_4b": ("gemma3_text", families.gemma("3-4b")),
           "pythia": ("gpt_neox", families.pythia()), "olmo2": ("olmo2", families.olmo2())}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_as_its_own_family_with_the_numbers_of_parameters_there(name):
  kind, preset = PRESETS[name]
  cfg = config_lib.fill_sizes(ModelConfig(**{"max_positions": 2048, **preset}))
  family, hf = hf_config.to_hf(cfg)
  assert family.model_type == kind
  theirs = transformers.AutoConfig.for_model(**hf)
  with torch.device("meta"):
    reference = transformers.AutoModelForCausalLM.from_config(theirs)
  shapes = jax.eval_shape(lambda: make_model(cfg).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(x.numel() for x in reference.parameters())


# Windows and positions that the texts below go far beyond. With a tied head a random Gemma repeats one token.
SHORT = {"llama_dynamic": dict(max_position_embeddings=24), "mistral": dict(sliding_window=7),
         "gemma2": dict(sliding_window=7, tie_word_embeddings=False),
         "gemma3": dict(sliding_window=7, tie_word_embeddings=False)}


@pytest.mark.parametrize("name", SHORT)
def test_greedy_decoding_gives_the_tokens_of_transformers(name, tmp_path):
  reference = make(name, **SHORT[name])
  reference.save_pretrained(tmp_path)
  prompts = TOKENS[:, :20]
  expected = reference.generate(torch.tensor(prompts), attention_mask=torch.ones_like(torch.tensor(prompts)),
                                do_sample=False, max_new_tokens=16).numpy()[:, 20:]
  got = lmjax.generate(*lmjax.load(tmp_path), prompts.tolist(), max_new_tokens=16, temperature=0)
  assert got == expected.tolist() and len({*got[0]}) > 3


EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)


@pytest.mark.parametrize("name, settings", [
    ("Mistral", {}), ("Qwen2", {}), ("Qwen3", dict(head_dim=16)), ("Gemma", dict(head_dim=16)),
    ("Gemma2", dict(head_dim=16)), ("Gemma3Text", dict(head_dim=16)), ("GPTNeoX", dict(num_attention_heads=3)),
    ("Olmo2", {}), ("Mixtral", dict(num_local_experts=4)),
    ("Qwen2Moe", dict(EXPERTS, num_experts=4, shared_expert_intermediate_size=40)),
    ("Qwen3Moe", dict(EXPERTS, num_experts=4))])
def test_labels_of_a_sequence_both_ways(name, settings, tmp_path):
  torch.manual_seed(0)
  cls = getattr(transformers, f"{name}ForSequenceClassification")
  settings = {**SMALL, "num_hidden_layers": 1, "num_labels": 3, "pad_token_id": 0, **settings}
  settings = {key: value for key, value in settings.items() if key != "num_key_value_heads" or name != "GPTNeoX"}
  reference = cls(cls.config_class(**settings, attn_implementation="eager")).eval()
  reference.save_pretrained(tmp_path / "in")
  mask = np.arange(31) < np.array([[31], [20]])
  tokens = np.where(mask, TOKENS[:, :31] % 97 + 1, 0)  # By the padding transformers finds the last token.
  with torch.no_grad():
    expected = reference(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
  model, params = lmjax.load(tmp_path / "in")
  got = run(lambda params, ids: model.apply({"params": params}, tokens, None, ids), params, mask.astype(np.int32))
  assert got.shape == (2, 3) and np.abs(expected).max() > 0.01
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
  lmjax.save_hf(model, params, tmp_path / "out")
  ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "in"))
  assert ours.keys() == theirs.keys() and all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
  assert cls.from_pretrained(tmp_path / "out").num_labels == 3
