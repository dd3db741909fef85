"""Small models made by transformers, with random values everywhere: biases of zero would hide a mistake."""

import json
import shutil

import pytest
import torch
import transformers

GPT2 = dict(n_layer=3, n_embd=48, n_head=4, vocab_size=98, n_positions=512, bos_token_id=None, eos_token_id=None)
LLAMA = dict(num_hidden_layers=3, hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=98, max_position_embeddings=512, bos_token_id=None, eos_token_id=None)
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2_dropout_gelu": ("gpt2", dict(resid_pdrop=0.3, attn_pdrop=0.2, embd_pdrop=0.1, activation_function="gelu")),
    "gpt2_untied_inner": ("gpt2", dict(tie_word_embeddings=False, n_inner=64, layer_norm_epsilon=1e-3)),
    "llama": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama_tied": ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama_heads": ("llama", dict(num_key_value_heads=4, head_dim=16)),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1)),
}


def make(kind: str, **settings):
  """Returns a transformers model of the small size, ready to apply."""
  torch.manual_seed(0)
  if kind == "gpt2":
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **settings}))
  else:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **settings}))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model.eval()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
  """Returns a function from the name of a variant to (model, the folder that it is saved in)."""
  made = {}

  def get(name: str):
    if name not in made:
      kind, settings = VARIANTS[name]
      model, folder = make(kind, **settings), tmp_path_factory.mktemp(name)
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return get


@pytest.fixture(params=VARIANTS)
def variant(request, folder_of):
  """Each variant in turn: (model, the folder that it is saved in)."""
  return folder_of(request.param)


@pytest.fixture
def copy_of(folder_of, tmp_path):
  """Returns a function from a variant and changes of its config.json to a copy of its folder (None removes a name)."""

  def copy(name: str, **changes):
    folder = tmp_path / name
    shutil.copytree(folder_of(name)[1], folder)
    settings = json.loads((folder / "config.json").read_text())
    settings = {key: value for key, value in {**settings, **changes}.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder

  return copy
