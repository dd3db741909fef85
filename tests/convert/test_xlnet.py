"""Tests that XLNet computes what transformers computes: permutations, targets, memories, token types and padding."""

import dataclasses
import json

from flax import linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

import lmjax
from lmjax.config import UserError
from lmjax.convert import hf_config
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model

SIZES = dict(n_layer=3, d_model=48, n_head=4, d_inner=80, vocab_size=98, mem_len=None)
VARIANTS = {
    "plain": dict(untie_r=True),
    "two_directions": dict(bi_data=True, clamp_len=50, untie_r=False),
    "short_memory": dict(mem_len=100, reuse_len=200, ff_activation="relu", layer_norm_eps=1e-3),
    "transformer_xl": dict(attn_type="uni", tie_word_embeddings=False),
    "same_length": dict(attn_type="uni", same_length=True, mem_len=64),
}
LENGTH, TARGETS = 515, 7


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Returns a function from the name of a variant to (model, the folder that it is saved in)."""
  made = {}

  def get(name):
    if name not in made:
      torch.manual_seed(0)
      model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**{**SIZES, **VARIANTS[name]})).eval()
      with torch.no_grad():
        for parameter in model.parameters():
          parameter.add_(0.2 * torch.randn_like(parameter))
      model.save_pretrained(tmp_path_factory.mktemp(name) / "hf")
      made[name] = model, tmp_path_factory.getbasetemp() / f"{name}0" / "hf"
    return made[name]

  return get


def inputs():
  """Returns tokens, and what else may be given: ours, then theirs."""
  rng = np.random.default_rng(0)
  x, types = rng.integers(0, 98, (2, LENGTH)), rng.integers(0, 2, (2, LENGTH))
  hidden = rng.random((2, LENGTH, LENGTH)) < 0.3
  hidden[0, 400] = True  # A target that is told nothing.
  targets = np.stack([rng.permutation(LENGTH)[:TARGETS] for _ in range(2)])
  targets[0, 0], targets[1, 1] = 400, -1
  real = np.ones((2, LENGTH), np.int32)
  real[0, :37], real[1, -50:] = 0, 0  # Padding on the left, as XLNet has it, and on the right.
  ours = dict(hidden_BTT=hidden, targets_BP=targets, token_types_BT=types, segment_ids_BT=real)
  theirs = dict(perm_mask=hidden, target_mapping=np.asarray(jax.nn.one_hot(targets, LENGTH)), token_type_ids=types,
                attention_mask=real)
  return x, ours, theirs


OURS_OF = dict(perm_mask="hidden_BTT", target_mapping="targets_BP", token_type_ids="token_types_BT",
               attention_mask="segment_ids_BT")
CASES = {"nothing else": (), "types": ("token_type_ids",), "padding": ("attention_mask",),
         "permutation and targets": ("perm_mask", "target_mapping"), "all": tuple(OURS_OF)}


def reference(model, x, mems=None, **given):
  """Returns logits and memory_LBMD of transformers; it adds masks of a row to those of all in "uni", so by rows."""
  tensor = lambda a: torch.tensor(np.ascontiguousarray(a))
  logits, memories = [], []
  for rows in [slice(0, 2)] if model.config.attn_type == "bi" else [slice(0, 1), slice(1, 2)]:
    own = {name: tensor(a[rows]) if name == "token_type_ids" else tensor(a[rows]).float() for name, a in given.items()}
    own |= {} if mems is None else {"mems": [tensor(m[rows].swapaxes(0, 1)) for m in mems]}
    with torch.no_grad():
      out = model(tensor(x[rows]), output_hidden_states=True, **own)
    logits.append(out.logits.numpy())
    memories.append(np.stack([m.numpy().swapaxes(0, 1) for m in out.mems]))
  return np.concatenate(logits), np.concatenate(memories, 1)


def computed(model, params, x, **given):
  apply = jax.jit(lambda params, x, given: model.apply({"params": params}, x, **given, method="segment"))
  return tuple(map(np.asarray, apply(params, x, given)))


def assert_close(got, expected):
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["plain", "transformer_xl"])
def test_logits_and_hidden_states_are_those_of_transformers(folder_of, variant, case):
  theirs, folder = folder_of(variant)
  x, ours_given, theirs_given = inputs()
  names = CASES[case]
  logits, memory = reference(theirs, x, **{name: theirs_given[name] for name in names})
  got, remembered = computed(*lmjax.load(folder), x, **{OURS_OF[name]: ours_given[OURS_OF[name]] for name in names})
  # With padding too, which sees what it sees there. The memory is what every layer reads of the content stream.
  assert_close(got, logits)
  assert_close(remembered, memory)


def test_attention_weights_are_those_of_transformers(folder_of, monkeypatch):
  theirs, folder = folder_of("plain")
  x, ours_given, theirs_given = inputs()
  with torch.no_grad():
    out = theirs(torch.tensor(x), output_attentions=True,
                 **{name: torch.tensor(a) if name == "token_type_ids" else torch.tensor(a).float()
                    for name, a in theirs_given.items()})
  model, params = lmjax.load(folder)
  softmax, weights = jax.nn.softmax, []

  def spy(scores, **kwargs):
    y = softmax(scores, **kwargs)
    if not isinstance(y, jax.core.Tracer):
      weights.append(np.asarray(y))
    return y
  monkeypatch.setattr(jax.nn, "softmax", spy)
  with jax.disable_jit():
    make_model(dataclasses.replace(model.cfg, remat_policy="none")).apply({"params": params}, x, **ours_given)
  assert len(weights) == 2 * len(out.attentions) == 6
  for layer, expected in enumerate(out.attentions):  # Pairs of the content and the query stream's.
    assert len(expected) == 2
    # Of the query stream only the places of targets are used, and the others are not computed alike.
    np.testing.assert_allclose(weights[2 * layer], expected[0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_segment_reads_the_memory_of_the_first(folder_of, variant):
  theirs, folder = folder_of(variant)
  model, params = lmjax.load(folder)
  x, ours_given, theirs_given = inputs()
  logits, mems = reference(theirs, x, **theirs_given)
  got, memory = computed(model, params, x, **ours_given)
  assert_close(got, logits)
  assert_close(memory, mems)
  next_x, types = x[:, ::-1][:, :201].copy(), theirs_given["token_type_ids"][:, :201]
  logits, mems = reference(theirs, next_x, mems, token_type_ids=types)
  got, memory = computed(model, params, next_x, memory_LBMD=memory, token_types_BT=types)
  assert_close(got, logits)
  assert_close(memory, mems)
  without, _ = computed(model, params, next_x, token_types_BT=types)
  assert np.abs(without - got).max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_import_is_byte_equal_and_transformers_computes_the_same(folder_of, tmp_path, variant):
  theirs, folder = folder_of(variant)
  lmjax.save_hf(*lmjax.load(folder), tmp_path / "out")
  before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
  assert before.keys() == after.keys()
  assert all(before[name].tobytes() == after[name].tobytes() and before[name].shape == after[name].shape and
             before[name].dtype == after[name].dtype for name in before)
  again = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out").eval()
  assert isinstance(again, transformers.XLNetLMHeadModel)
  assert {name: getattr(again.config, name) for name in VARIANTS[variant] if name != "untie_r"} == {
      name: value for name, value in VARIANTS[variant].items() if name != "untie_r"}
  x, _, given = inputs()
  for got, expected in zip(reference(again, x, **given), reference(theirs, x, **given)):
    np.testing.assert_array_equal(got, expected)


def test_a_model_without_head_gives_features(folder_of, tmp_path):
  theirs, folder = folder_of("plain")
  theirs.transformer.save_pretrained(tmp_path / "base")
  model, params = lmjax.load(tmp_path / "base")
  assert model.cfg.head == "none" and "head" not in params
  x, _, _ = inputs()
  with torch.no_grad():
    expected = theirs.transformer(torch.tensor(x)).last_hidden_state.numpy()
  assert_close(np.asarray(jax.jit(model.apply)({"params": params}, x)), expected)
  lmjax.save_hf(model, params, tmp_path / "out")
  again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
  with torch.no_grad():
    np.testing.assert_array_equal(again(torch.tensor(x)).last_hidden_state.numpy(), expected)


def test_a_model_of_ours_goes_out_and_comes_back(tmp_path):
  cfg = lmjax.config.ModelConfig(**{**families.xlnet(), "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48,
                                    "vocab_size": 64, "dropout": 0.1, "memory_len": 7, "unidirectional": True})
  model = lmjax.models.transformer.make_model(cfg)
  init = jax.jit(lambda key: nn.unbox(init_params(model, key)), compiler_options={"xla_backend_optimization_level": 0})
  params = init(jax.random.key(0))
  lmjax.save_hf(model, params, tmp_path / "hf")
  again, got = lmjax.load(tmp_path / "hf")
  family, _ = hf_config.to_hf(model.cfg)
  assert family.model_type == "xlnet" and hf_config.differences(family, model.cfg, again.cfg) == []
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, params))


@pytest.mark.parametrize("changes, told", [
    (dict(attn_type="other"), "has attn_type = 'other', which lmjax does not do; it does bi, uni"),
    (dict(ff_activation="tanh"), "has ff_activation = 'tanh', which lmjax does not do; it does gelu, relu"),
    (dict(same_length=True), "cannot build: config.model.memory_same_len bounds what a token sees before it"),
    (dict(architectures=["XLNetForQuestionAnswering"]), "'XLNetForQuestionAnswering'"),
    (dict(mem_len="many"), "cannot build: config.model.memory_len is 'many'"),
    (dict(two_towers=True), "has two_towers = True, which lmjax does not know in xlnet"),
    (dict(n_layer=4), "has no tensor transformer.layer.3.rel_attn.q, which its config.json asks for"),
    (dict(d_inner=81), "transformer.layer.0.ff.layer_1.weight of shape (80, 48), but its config.json makes it (81"),
    (dict(tie_word_embeddings=False), "has no tensor lm_loss.weight"),
])
def test_what_is_not_supported_is_named(folder_of, tmp_path, changes, told):
  _, folder = folder_of("plain")
  (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))
  with pytest.raises(UserError) as error:
    lmjax.load(tmp_path)
  assert told in str(error.value) and "\n" not in str(error.value)


def test_config_files_of_the_released_models_are_read(folder_of, tmp_path):
  _, folder = folder_of("plain")
  old = dict(architectures=["XLNetLMHeadModel"], attn_type="bi", bi_data=False, bos_token_id=1, clamp_len=-1, d_head=12,
             d_inner=80, d_model=48, dropout=0.1, end_n_top=5, eos_token_id=2, ff_activation="gelu",
             initializer_range=0.02, layer_norm_eps=1e-12, mem_len=None, model_type="xlnet", n_head=4, n_layer=3,
             pad_token_id=5, reuse_len=None, same_length=False, start_n_top=5, summary_activation="tanh",
             summary_last_dropout=0.1, summary_type="last", summary_use_proj=True, untie_r=True, vocab_size=98,
             task_specific_params={"text-generation": {"do_sample": True, "max_length": 250}})
  (tmp_path / "config.json").write_text(json.dumps(old))
  tensors = load_file(folder / "model.safetensors")
  tensors["lm_loss.weight"] = tensors["transformer.word_embedding.weight"].copy()
  save_file(tensors, tmp_path / "model.safetensors")
  model, params = lmjax.load(tmp_path)
  expected_model, expected = lmjax.load(folder)
  assert model.cfg == expected_model.cfg
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected))
