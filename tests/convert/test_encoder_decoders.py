"""Tests that converted encoder-decoders compute what transformers computes, in both directions."""

import dataclasses
import json
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
import tokenizers
import torch
import transformers

import lmjax
from lmjax import convert
from lmjax.commands import cli
from lmjax.config import ModelConfig, UserError
from lmjax.convert import hf_config
from lmjax.models import attention, families
from lmjax.models.layers import Norm
from lmjax.models.transformer import Block, init_params, make_model

T5 = dict(num_layers=2, num_decoder_layers=3, d_model=48, num_heads=4, d_kv=16, d_ff=64, vocab_size=98)
BART = dict(encoder_layers=2, decoder_layers=3, d_model=48, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=98, max_position_embeddings=600,
            bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=None)
MARIAN = dict(BART, pad_token_id=97, decoder_start_token_id=97, eos_token_id=0)
SIZES = {"T5": T5, "Bart": BART, "Marian": MARIAN}
VARIANTS = {
    "t5": ("T5", {}),
    "t5_1_1": ("T5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5_buckets_silu": ("T5", dict(feed_forward_proj="gated-silu", relative_attention_num_buckets=20,
                                   relative_attention_max_distance=300, layer_norm_epsilon=1e-3)),
    "bart": ("Bart", {}),
    "bart_scaled_gelu_tanh": ("Bart", dict(scale_embedding=True, activation_function="gelu_new", decoder_layers=1)),
    "marian": ("Marian", dict(scale_embedding=True, activation_function="swish")),
}
# Odd lengths, and padding at the end of one row of each side.
SOURCE = np.random.default_rng(0).integers(3, 98, (2, 515))
TARGET = np.random.default_rng(1).integers(3, 98, (2, 131))
SOURCE_MASK, TARGET_MASK = (np.ones_like(x) for x in (SOURCE, TARGET))
SOURCE_MASK[1, 402:] = 0
TARGET_MASK[0, 97:] = 0


def make(kind, **settings):
  """Returns a small transformers model with random values everywhere."""
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(**{**SIZES[kind], **settings}, attn_implementation="eager")
  model = transformers.AutoModelForSeq2SeqLM.from_config(config)
  if settings.get("tie_word_embeddings") is False:
    # The class ties whatever it is told, and keeps apart what differs in a file.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * config.d_model ** -0.5)
  with torch.no_grad():
    trained = [x for name, x in model.named_parameters() if kind != "Marian" or "embed_positions" not in name]
    for parameter in [*trained, *([] if kind == "T5" else [model.final_logits_bias])]:
      parameter.add_(0.2 * torch.randn_like(parameter))
    for name, parameter in model.named_parameters():
      if name.endswith(".q.weight"):
        # T5 does not scale scores. Of large ones one key wins everywhere, and which it is is a matter of rounding:
        # transformers in float32 would then differ by more from itself in float64 than is asked for here.
        parameter.mul_(config.d_kv ** -0.5)
  return model.eval()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Returns a function from the name of a variant to (model, the folder that it is saved in)."""
  made = {}

  def get(name):
    if name not in made:
      kind, settings = VARIANTS[name]
      model, folder = make(kind, **settings), tmp_path_factory.mktemp(name)
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return get


@pytest.fixture(params=VARIANTS)
def variant(request, folder_of):
  return folder_of(request.param)


@pytest.fixture
def copy_of(folder_of, tmp_path):
  """Returns a function from a variant and changes of its config.json to a copy of its folder."""

  def copy(name, **changes):
    folder = tmp_path / name
    shutil.copytree(folder_of(name)[1], folder)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder

  return copy


def outputs_of(reference):
  """Returns transformers' logits and encoded text."""
  with torch.no_grad():
    out = reference(torch.tensor(SOURCE), torch.tensor(SOURCE_MASK), torch.tensor(TARGET), torch.tensor(TARGET_MASK))
  return out.logits.numpy(), out.encoder_last_hidden_state.numpy()


def tensors_of(folder):
  """Returns {name: (type, shape, bytes)} of a folder's file."""
  with safe_open(folder / "model.safetensors", "np") as file:
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name in file.keys() for x in [file.get_tensor(name)]}


def apply(model, params, *args, **kwargs):
  return jax.jit(lambda params: model.apply({"params": params}, *args, **kwargs))(params)


def assert_close(got, expected, mask):
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(np.asarray(got)[mask > 0], expected[mask > 0], rtol=0, atol=1e-4)


def test_imported_outputs_are_those_of_transformers(variant):
  reference, folder = variant
  model, params = lmjax.load(folder)
  logits, encoded = outputs_of(reference)
  assert_close(apply(model, params, SOURCE, segment_ids_BS=SOURCE_MASK, method="encode"), encoded, SOURCE_MASK)
  got = apply(model, params, SOURCE, TARGET, encoder_segment_ids_BS=SOURCE_MASK, decoder_segment_ids_BT=TARGET_MASK)
  assert_close(got, logits, TARGET_MASK)


def test_exported_import_is_byte_equal_and_transformers_computes_the_same(variant, tmp_path):
  reference, folder = variant
  lmjax.save_hf(*lmjax.load(folder), tmp_path / "out")
  assert tensors_of(tmp_path / "out") == tensors_of(folder)
  again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  assert type(again) is type(reference)
  np.testing.assert_array_equal(outputs_of(again)[0], outputs_of(reference)[0])


def inside(model, params, monkeypatch):
  """Returns what each block makes, and whom each token attends to [B, N, T, S], the encoder's first."""
  model = make_model(dataclasses.replace(model.cfg, remat_policy="none"))
  plain, states, weights = attention.dot_product_attention, [], []

  def spy(q, k, v, spec, **kwargs):
    if not isinstance(q, jax.core.Tracer):
      eye = jnp.broadcast_to(jnp.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
      # With one-hot values, the output is the weights.
      weights.append(plain(q, k, eye, spec, **kwargs).transpose(0, 2, 1, 3))
    return plain(q, k, v, spec, **kwargs)

  def note(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if isinstance(context.module, Block) and context.method_name == "__call__":
      states.extend(x for x in out[0][:1] if not isinstance(x, jax.core.Tracer))
    return out
  monkeypatch.setattr(attention, "dot_product_attention", spy)
  with jax.disable_jit(), nn.intercept_methods(note):
    model.apply({"params": params}, SOURCE, TARGET, encoder_segment_ids_BS=SOURCE_MASK,
                decoder_segment_ids_BT=TARGET_MASK)
  return states, weights


@pytest.mark.parametrize("name", ["t5", "t5_1_1", "bart", "marian"])
def test_hidden_states_and_attention_are_those_of_transformers(name, folder_of, monkeypatch):
  reference, folder = folder_of(name)
  with torch.no_grad():
    out = reference(torch.tensor(SOURCE), torch.tensor(SOURCE_MASK), torch.tensor(TARGET), torch.tensor(TARGET_MASK),
                    output_hidden_states=True, output_attentions=True)
  model, params = lmjax.load(folder)
  states, weights = inside(model, params, monkeypatch)
  pairs = [pair for layer in zip(out.decoder_attentions, out.cross_attentions) for pair in layer]
  assert len(weights) == len(out.encoder_attentions) + len(pairs) == 8
  for got, expected in zip(weights, [*out.encoder_attentions, *pairs]):
    mask = SOURCE_MASK if got.shape[2] == SOURCE.shape[1] else TARGET_MASK
    rows = lambda x: np.moveaxis(np.asarray(x), 1, 2)[mask > 0]  # noqa: B023
    np.testing.assert_allclose(rows(got), rows(expected), rtol=0, atol=1e-5)
  # Where norms come first, states are compared as the next part reads them; transformers' last is normed already.
  for side, got, expected, mask in (("encoder", states[:2], out.encoder_hidden_states, SOURCE_MASK),
                                    ("decoder", states[2:], out.decoder_hidden_states, TARGET_MASK)):
    norm = lambda x: Norm(model.cfg).apply({"params": params[side]["final_norm"]}, jnp.asarray(x))  # noqa: B023
    assert len(got) == len(expected) - 1
    for number, (one, other) in enumerate(zip(got, expected[1:]), 1):
      if model.cfg.block == "pre":
        one, other = norm(one), other if number == len(got) else torch.tensor(np.array(norm(other.numpy())))
      assert_close(one, other.numpy(), mask)


def test_padding_on_the_left_is_counted_as_bart_does(folder_of):
  reference, folder = folder_of("bart")
  mask = np.ones_like(SOURCE)
  mask[0, :9] = 0
  with torch.no_grad():
    expected = reference(torch.tensor(SOURCE), torch.tensor(mask), torch.tensor(TARGET)).logits.numpy()
  got = apply(*lmjax.load(folder), SOURCE, TARGET, encoder_segment_ids_BS=mask)
  assert_close(got, expected, np.ones_like(TARGET))


# As released with T5 and T5 1.1, before transformers had more names for what feed_forward_proj says.
RELEASED = dict(d_ff=64, d_kv=16, d_model=48, decoder_start_token_id=0, dropout_rate=0.1, eos_token_id=1,
                initializer_factor=1.0, is_encoder_decoder=True, layer_norm_epsilon=1e-6, model_type="t5",
                n_positions=512, num_heads=4, num_layers=2, num_decoder_layers=3, output_past=True, pad_token_id=0,
                relative_attention_num_buckets=32, vocab_size=98)


@pytest.mark.parametrize("name, settings", [
    ("t5", dict(architectures=["T5WithLMHeadModel"], task_specific_params={"summarization": {"num_beams": 4}})),
    ("t5_1_1", dict(architectures=["T5ForConditionalGeneration"], feed_forward_proj="gated-gelu",
                    tie_word_embeddings=False))])
def test_config_files_of_the_released_models_are_read(name, settings, folder_of, tmp_path):
  (tmp_path / "model.safetensors").symlink_to(folder_of(name)[1] / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({**RELEASED, **settings}))
  (model, params), (expected_model, expected) = lmjax.load(tmp_path), lmjax.load(folder_of(name)[1])
  assert model.cfg == expected_model.cfg
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected))


PRESETS = {"t5": (families.t5(), "t5", {}), "t5_1_1": (families.t5_1_1(), "t5", {}),
           "bart": (families.bart(), "bart", dict(max_positions=40)),
           "transformer": (families.transformer(), "marian", dict(qkv_bias=True, out_bias=True))}


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_of_ours_goes_out_and_comes_back(name, tmp_path):
  preset, model_type, changes = PRESETS[name]
  model = make_model(ModelConfig(**{**preset, "num_layers": 1, "num_decoder_layers": 2, "embed_dim": 32, "num_heads": 4,
                                    "num_kv_heads": 4, "head_dim": 8, "mlp_dim": 48, "vocab_size": 98, **changes}))
  init = jax.jit(lambda key: nn.unbox(init_params(model, key)), compiler_options={"xla_backend_optimization_level": 0})
  params = init(jax.random.key(0))
  lmjax.save_hf(model, params, tmp_path / "hf")
  again, got = lmjax.load(tmp_path / "hf")
  family, _ = hf_config.to_hf(model.cfg)
  assert family.model_type == model_type and hf_config.differences(family, model.cfg, again.cfg) == []
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, params))
  reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
  with torch.no_grad():
    expected = reference(torch.tensor(SOURCE[:, :33]), decoder_input_ids=torch.tensor(TARGET[:, :35])).logits.numpy()
  np.testing.assert_allclose(apply(again, got, SOURCE[:, :33], TARGET[:, :35]), expected, rtol=0, atol=1e-4)


def test_the_first_transformer_needs_biases_to_go_out():
  with pytest.raises(UserError, match="marian would need another config.model.qkv_bias than False, "
                                      "config.model.out_bias than False"):
    hf_config.to_hf(make_model(ModelConfig(**families.transformer())).cfg)


@pytest.mark.parametrize("name, changes, told", [
    ("t5", dict(feed_forward_proj="gated-tanh"), "has feed_forward_proj = 'gated-tanh', which lmjax does not do"),
    ("t5", dict(architectures=["T5EncoderModel"]), "'T5EncoderModel'"),
    ("t5", dict(num_decoder_layers=4), "has no tensor decoder.block.3.layer.0.SelfAttention.q.weight"),
    ("t5", dict(is_encoder_decoder=False), "has is_encoder_decoder = False, which lmjax does not do"),
    ("t5", dict(prefix_tuning=True), "has prefix_tuning = True, which lmjax does not know in t5"),
    ("bart", dict(normalize_before=True), "has normalize_before = True, which lmjax does not do"),
    ("bart", dict(decoder_attention_heads=8), "has decoder_attention_heads = 8 but encoder_attention_heads = 4, which"),
    ("marian", dict(share_encoder_decoder_embeddings=False), "has share_encoder_decoder_embeddings = False, which"),
    ("marian", dict(d_model=52), "but its config.json makes it")])
def test_what_is_not_supported_is_named(name, changes, told, copy_of):
  with pytest.raises(UserError) as error:
    lmjax.load(copy_of(name, **changes))
  assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t5", "t5_1_1", "bart", "marian"])
def test_greedy_decoding_is_that_of_transformers(name, folder_of):
  reference, folder = folder_of(name)
  start = {"T5": 0, "Bart": 2, "Marian": 97}[VARIANTS[name][0]]
  model, params = lmjax.load(folder)
  prompts = [SOURCE[0, :23].tolist(), SOURCE[1, :9].tolist()]
  ids, mask = np.ones((2, 23), int), np.ones((2, 23), int)
  ids[0], ids[1, :9], mask[1, 9:] = prompts[0], prompts[1], 0
  with torch.no_grad():
    expected = reference.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, num_beams=1, max_new_tokens=20,
        min_new_tokens=20, decoder_start_token_id=start, forced_eos_token_id=None, eos_token_id=None,
        use_cache=False)[:, 1:]
  got = lmjax.generate(model, params, prompts, max_new_tokens=20, temperature=0, decoder_start_token_id=start)
  assert got == expected.tolist()
  # Each by itself is what it is beside the other.
  assert lmjax.generate(model, params, prompts[1:], max_new_tokens=20, temperature=0,
                        decoder_start_token_id=start) == got[1:]


def test_what_a_run_begins_texts_with_is_told_to_transformers(folder_of, tmp_path):
  _, folder = folder_of("bart")
  convert.convert(folder, tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["objective"]["start_token"] = 7
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  for name in ("hf_names.json", "generation_config.json"):  # A run that is not made of such a folder has none.
    (tmp_path / "run" / name).unlink()
  convert.convert(tmp_path / "run", tmp_path / "hf")
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["decoder_start_token_id"] == 7


def test_the_command_answers_a_text_as_transformers_does(folder_of, tmp_path, capsys):
  reference, folder = folder_of("t5")
  shutil.copytree(folder, tmp_path / "hf")
  words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 98))]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "w2"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
  fast.save_pretrained(tmp_path / "hf")
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 0}))
  prompt = "w9 w41 w3 w77 w12"
  with torch.no_grad():
    expected = reference.generate(**fast(prompt, return_tensors="pt", return_token_type_ids=False), do_sample=False,
                                  num_beams=1, max_new_tokens=12, decoder_start_token_id=0, use_cache=False)[0, 1:]
  flags = [f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=12"]
  assert cli.run(["generate", str(tmp_path / "hf"), *flags]) == 0
  expected = fast.decode(expected, skip_special_tokens=True)
  assert capsys.readouterr().out.strip() == expected and len(expected.split()) > 3
  # Another start gives another text.
  assert cli.run(["generate", str(tmp_path / "hf"), *flags, "--decoder_start_token_id=50"]) == 0
  assert capsys.readouterr().out.strip() != expected
  # Without one, it is asked for.
  (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
  assert cli.run(["generate", str(tmp_path / "hf"), *flags]) == 2
  assert "decoder_start_token_id is None, but the text of an encoder_decoder begins with" in capsys.readouterr().err
