"""A folder of sentence-transformers is a model with the pooled head, and comes back as one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import lmjax
from lmjax.config import UserError
from lmjax.convert.sentence_modules import write_modules

FAMILIES = {
    "Bert": dict(num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=40),
    "DistilBert": dict(n_layers=1, dim=16, hidden_dim=24, n_heads=2, vocab_size=40)}


def made(kind, folder):
  """Returns a model of transformers, saved as sentence-transformers saves its own."""
  torch.manual_seed(0)
  cls = getattr(transformers, f"{kind}Model")
  model = cls(cls.config_class(**FAMILIES[kind])).eval()
  model.save_pretrained(folder)
  write_modules(folder, 16)
  return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_vectors_are_means_of_real_tokens_in_both_directions(tmp_path, kind):
  reference = made(kind, tmp_path / "theirs")
  tokens = np.random.default_rng(0).integers(1, 40, (3, 9))
  mask = np.array([[1] * 9, [1] * 5 + [0] * 4, [0] * 4 + [1] * 5])
  with torch.no_grad():
    hidden = reference(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
  expected = np.stack([row[real == 1].mean(0) for row, real in zip(hidden, mask)])
  expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
  model, params = lmjax.load(tmp_path / "theirs")
  apply = lambda model, params: model.apply({"params": params}, tokens, None, jnp.asarray(mask))
  np.testing.assert_allclose(apply(model, params), expected, rtol=0, atol=1e-5)

  lmjax.save_hf(model, params, tmp_path / "ours")
  for name in ("modules.json", "1_Pooling/config.json"):
    assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
  assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [f"{kind}Model"]
  np.testing.assert_array_equal(apply(*lmjax.load(tmp_path / "ours")), apply(model, params))
  again = type(reference).from_pretrained(tmp_path / "ours").eval()
  with torch.no_grad():
    back = again(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
  np.testing.assert_allclose(back, hidden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change, words", [
    (dict(pooling_mode_cls_token=True), "with pooling_mode_cls_token, pooling_mode_mean_tokens, which lmjax does not"),
    (dict(pooling_mode_mean_tokens=False), "Transformer, Pooling, Normalize with no pooling, which lmjax does not do")])
def test_another_pooling_is_refused(tmp_path, change, words):
  made("Bert", tmp_path)
  path = tmp_path / "1_Pooling" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match="remove modules.json to have the model without them") as error:
    lmjax.load(tmp_path)
  assert words in str(error.value) and str(tmp_path / "modules.json") in str(error.value)
  (tmp_path / "modules.json").unlink()
  assert lmjax.load(tmp_path)[0].cfg.head == "none"


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"type": "x"}, {"type": "models.Pooling"}]'])
def test_damaged_modules_are_refused(tmp_path, text):
  made("Bert", tmp_path)
  (tmp_path / "modules.json").write_text(text)
  with pytest.raises(UserError, match="modules.json"):
    lmjax.load(tmp_path)
