"""Tests that converted encoder-decoders compute what transformers computes, in both directions."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
import torch
import transformers

import lmjax

T5 = dict(num_layers=2, num_decoder_layers=3, d_model=48, num_heads=4, d_kv=16, d_ff=64, vocab_size=98)
BART = dict(encoder_layers=2, decoder_layers=3, d_model=48, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=98, max_position_embeddings=600,
            bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=None)
VARIANTS = {
    "t5": ("T5", {}),
    "t5_1_1": ("T5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5_buckets_silu": ("T5", dict(feed_forward_proj="gated-silu", relative_attention_num_buckets=20,
                                   relative_attention_max_distance=300, layer_norm_epsilon=1e-3)),
    "bart": ("Bart", {}),
    "bart_scaled_gelu_tanh": ("Bart", dict(scale_embedding=True, activation_function="gelu_new", decoder_layers=1)),
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
  sizes = T5 if kind == "T5" else BART
  config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings}, attn_implementation="eager")
  model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
  if settings.get("tie_word_embeddings") is False:
    # The class ties whatever it is told, and keeps apart what differs in a file.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * config.d_model ** -0.5)
  with torch.no_grad():
    for parameter in [*model.parameters(), *([model.final_logits_bias] if kind == "Bart" else [])]:
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
