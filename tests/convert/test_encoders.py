"""Tests that encoders and their heads compute what transformers computes, with padding, in both directions."""

import dataclasses
import functools
import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
import torch
import transformers

import lmjax
from lmjax import convert, metrics
from lmjax.config import ModelConfig, fill_sizes
from lmjax.convert.hf_config import to_hf
from lmjax.models import attention, families
from lmjax.models.attention import Attention, Context
from lmjax.models.transformer import init_params, make_model

LENGTH, LEFT, RIGHT = 515, 126, 389  # Where the real tokens of one row begin, and those of another end.
BERT = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=98,
            max_position_embeddings=520)
NARROW = dict(BERT, embedding_size=12)
DISTIL = dict(n_layers=2, dim=32, hidden_dim=48, n_heads=4, vocab_size=98, max_position_embeddings=520)
ROBERTA = dict(BERT, max_position_embeddings=522)
GPT2 = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=98, n_positions=520, pad_token_id=0)
LLAMA = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=98, pad_token_id=0)
VARIANTS = {
    "bert_lm": ("BertForMaskedLM", BERT),
    "bert_relu_types": ("BertForMaskedLM", dict(BERT, hidden_act="relu", type_vocab_size=3, layer_norm_eps=1e-5)),
    "bert_pretraining": ("BertForPreTraining", dict(BERT, hidden_act="gelu_new")),
    "bert_sentence": ("BertForNextSentencePrediction", BERT),
    "bert_sequence": ("BertForSequenceClassification", dict(BERT, num_labels=5)),
    "bert_regression": ("BertForSequenceClassification", dict(BERT, num_labels=1)),
    "bert_token": ("BertForTokenClassification", dict(BERT, num_labels=7)),
    "bert_choice": ("BertForMultipleChoice", BERT),
    "bert_span": ("BertForQuestionAnswering", BERT),
    "bert_features": ("BertModel", BERT),
    "roberta_lm": ("RobertaForMaskedLM", ROBERTA),
    "roberta_sequence": ("RobertaForSequenceClassification", dict(ROBERTA, num_labels=3)),
    "roberta_token": ("RobertaForTokenClassification", ROBERTA),
    "roberta_choice": ("RobertaForMultipleChoice", ROBERTA),
    "roberta_span": ("RobertaForQuestionAnswering", ROBERTA),
    "roberta_features": ("RobertaModel", dict(ROBERTA, type_vocab_size=1)),
    "albert_lm": ("AlbertForMaskedLM", NARROW),
    "albert_pretraining": ("AlbertForPreTraining", dict(NARROW, hidden_act="gelu")),
    "albert_sequence": ("AlbertForSequenceClassification", dict(NARROW, num_labels=3)),
    "albert_token": ("AlbertForTokenClassification", NARROW),
    "albert_choice": ("AlbertForMultipleChoice", NARROW),
    "albert_span": ("AlbertForQuestionAnswering", NARROW),
    "albert_features": ("AlbertModel", NARROW),
    "electra_replaced": ("ElectraForPreTraining", NARROW),
    "electra_lm": ("ElectraForMaskedLM", NARROW),
    "electra_untied": ("ElectraForMaskedLM", dict(NARROW, tie_word_embeddings=False)),
    "electra_wide": ("ElectraForMaskedLM", dict(BERT, embedding_size=32)),
    "electra_sequence": ("ElectraForSequenceClassification", dict(NARROW, num_labels=3)),
    "electra_token": ("ElectraForTokenClassification", NARROW),
    "electra_choice": ("ElectraForMultipleChoice", NARROW),
    "electra_span": ("ElectraForQuestionAnswering", NARROW),
    "electra_features": ("ElectraModel", NARROW),
    "distilbert_lm": ("DistilBertForMaskedLM", DISTIL),
    "distilbert_untied": ("DistilBertForMaskedLM", dict(DISTIL, tie_word_embeddings=False, activation="relu")),
    "distilbert_sequence": ("DistilBertForSequenceClassification", dict(DISTIL, num_labels=3)),
    "distilbert_token": ("DistilBertForTokenClassification", DISTIL),
    "distilbert_choice": ("DistilBertForMultipleChoice", DISTIL),
    "distilbert_span": ("DistilBertForQuestionAnswering", DISTIL),
    "distilbert_features": ("DistilBertModel", DISTIL),
    "gpt2_sequence": ("GPT2ForSequenceClassification", dict(GPT2, num_labels=3)),
    "llama_sequence": ("LlamaForSequenceClassification", dict(LLAMA, num_labels=3)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns a function from the name of a variant to (model of transformers, its folder)."""
  found = {}

  def get(name):
    if name not in found:
      kind, settings = VARIANTS[name]
      cls = getattr(transformers, kind)
      torch.manual_seed(0)
      model = cls(cls.config_class(**settings, attn_implementation="eager"))
      with torch.no_grad():
        for parameter in model.parameters():
          parameter.add_(0.2 * torch.randn_like(parameter))
      model.eval().save_pretrained(folder := tmp_path_factory.mktemp(name))
      found[name] = model, folder
    return found[name]

  return get


def inputs_of(model):
  """Returns tokens, mask and token types (None where there are none): a full row, and rows padded on either side.

  Of choices there are two in a row, [3, 2, T].
  """
  rng = np.random.default_rng(0)
  choices = "MultipleChoice" in type(model).__name__
  shape = (3, 2, LENGTH) if choices else (3, LENGTH)
  mask = np.ones(shape, np.int32)
  mask[1, ..., RIGHT:] = 0
  mask[2, ..., :LEFT] = 0
  pad = model.config.pad_token_id
  tokens = np.where(mask == 1, rng.integers(2, 98, shape), 0 if pad is None else pad)
  types = getattr(model.config, "type_vocab_size", 0)
  return tokens, mask, rng.integers(0, types, shape) if types else None


def reference_of(model, **kwargs):
  tokens, mask, types = inputs_of(model)
  kwargs |= {} if types is None else {"token_type_ids": torch.tensor(types)}
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), **kwargs)


def expected_of(model):
  """Returns what transformers makes of the rows.

  Its encoders take the first position of a row for its first token, which on the left is padding; that row's vector is
  therefore made of the real tokens alone, at their positions.
  """
  made = outputs_of(reference_of(model))
  tokens, mask, types = inputs_of(model)
  if model.config.model_type in ("gpt2", "llama"):
    return made
  alone = {"input_ids": torch.tensor(tokens[2:, ..., LEFT:])}
  if types is not None:
    alone["token_type_ids"] = torch.tensor(types[2:, ..., LEFT:])
  if model.config.model_type != "roberta":  # Which counts real tokens.
    alone["position_ids"] = torch.arange(LEFT, LENGTH)[None]
  with torch.no_grad():
    last = model(**alone)
  for whole, row in zip(made, outputs_of(last), strict=True):
    if whole.shape[:2] != mask.shape:
      whole[2] = row[0]
  return made


def outputs_of(made):
  """Returns the arrays that a head of transformers makes, in the order of the heads here."""
  names = ("logits", "prediction_logits", "start_logits", "end_logits", "seq_relationship_logits", "sop_logits",
           "last_hidden_state", "pooler_output")
  return [made[name].numpy() for name in names if made.get(name) is not None]


def ours_of(model, params, reference):
  tokens, mask, types = inputs_of(reference)
  apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})  # Compiling is most of the time.
  out = apply({"params": params}, tokens, None, mask, types)
  return [np.asarray(x) for x in (out if isinstance(out, tuple) else (out,))]


def real(reference, x):
  """Returns the values at real positions, where an array has positions."""
  mask = inputs_of(reference)[1]
  return x[mask == 1] if x.shape[:2] == mask.shape else x


def tensors_of(folder):
  with safe_open(folder / "model.safetensors", "np") as file:
    return {name: (file.get_tensor(name).shape, file.get_tensor(name).tobytes()) for name in file.keys()}


@pytest.mark.parametrize("name", VARIANTS)
def test_both_ways(made, name, tmp_path):
  reference, folder = made(name)
  expected = expected_of(reference)
  model, params = lmjax.load(folder)
  got = ours_of(model, params, reference)
  assert len(got) == len(expected)
  for ours, other in zip(got, expected, strict=True):
    assert ours.shape == other.shape and ours.dtype == np.float32
    other = real(reference, other)
    assert np.abs(other).max() > 0.1
    np.testing.assert_allclose(real(reference, ours), other, rtol=0, atol=1e-4)

  lmjax.save_hf(model, params, tmp_path / "out")
  assert tensors_of(tmp_path / "out") == tensors_of(folder)
  again = type(reference).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  again.config.pad_token_id = reference.config.pad_token_id  # The tokenizer's, by which decoders find the end.
  assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(reference).__name__]
  for one, other in zip(expected_of(again), expected, strict=True):
    # The same numbers but for the last bits, which follow from where in memory torch finds its tensors.
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_names_of_labels_and_special_tokens_come_back(tmp_path):
  names = dict(id2label={0: "bad", 1: "so", 2: "good"}, label2id={"bad": 0, "so": 1, "good": 2}, pad_token_id=7,
               bos_token_id=3, eos_token_id=[4, 5], problem_type="single_label_classification")
  config = transformers.DistilBertConfig(**DISTIL, **names)
  transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
  convert.convert(tmp_path / "theirs", tmp_path / "run")
  convert.convert(tmp_path / "run", tmp_path / "again")
  again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
  assert {name: getattr(again, name) for name in names} == names
  assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "theirs")


ENCODERS = ("bert_features", "roberta_features", "albert_features", "electra_features", "distilbert_features")


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_and_attention_weights_are_those_of_transformers(made, name, monkeypatch):
  reference, folder = made(name)
  theirs = reference_of(reference, output_hidden_states=True, output_attentions=True)
  hidden = [x.numpy() for x in theirs.hidden_states]
  model, params = lmjax.load(folder)
  cfg, (tokens, mask, types) = model.cfg, inputs_of(reference)
  plain, seen = attention.dot_product_attention, []

  def spy(q, k, v, spec, **kwargs):
    eye = jnp.broadcast_to(jnp.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
    seen.append(plain(q, k, eye, spec, **kwargs))  # With one-hot values, the output is the weights.
    return plain(q, k, v, spec, **kwargs)

  for layer in range(cfg.num_layers):
    first = make_model(dataclasses.replace(cfg, num_layers=layer + 1))
    kept = params["layers"] if cfg.share_layers else jax.tree.map(lambda x: x[:layer + 1], params["layers"])  # noqa: B023
    got, _ = jax.jit(functools.partial(first.apply, method="features"))(
        {"params": {**params, "layers": kept}}, tokens, None, mask, types)
    np.testing.assert_allclose(got[mask == 1], hidden[layer + 1][mask == 1], rtol=0, atol=1e-4)

    own = params["layers"] if cfg.share_layers else jax.tree.map(lambda x: x[layer], params["layers"])  # noqa: B023
    with monkeypatch.context() as patch:
      patch.setattr(attention, "dot_product_attention", spy)
      Attention(cfg, causal=False).apply({"params": own["attention"]}, jnp.asarray(hidden[layer]),
                                         Context(segment_ids_BT=jnp.asarray(mask)), None, jnp.asarray(layer))
    weights, expected = seen[-1].transpose(0, 2, 1, 3), theirs.attentions[layer].numpy()
    for row in range(len(mask)):
      real = mask[row] == 1
      np.testing.assert_allclose(weights[row][:, real], expected[row][:, real], rtol=0, atol=1e-5)


# By transformers' own count of the same config, in which nothing is allocated.
@pytest.mark.parametrize("family, size", [
    ("bert", "base"), ("bert", "large"), ("roberta", "base"), ("roberta", "large"), ("albert", "base-v2"),
    ("albert", "large-v2"), ("albert", "xlarge-v2"), ("albert", "xxlarge-v2"), ("electra", "small"),
    ("electra", "base"), ("electra", "large"), ("electra", "small-generator"), ("electra", "base-generator"),
    ("electra", "large-generator"), ("distilbert", "base")])
def test_presets_are_as_large_as_those_of_transformers(family, size, tmp_path):
  cfg = fill_sizes(ModelConfig(**getattr(families, family)(size)))
  written, settings = to_hf(cfg)
  assert written.model_type == family
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with torch.device("meta"):
    theirs = getattr(transformers, settings["architectures"][0])(transformers.AutoConfig.from_pretrained(tmp_path))
  shapes = jax.eval_shape(lambda: init_params(make_model(cfg), jax.random.key(0)))
  ours = metrics.count_params(nn.unbox(shapes))
  assert ours == theirs.num_parameters()
