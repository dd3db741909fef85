"""Inside a converted model: what stands between its layers, and whom each token attends to, as transformers has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

import lmjax
from lmjax.models import attention
from lmjax.models.attention import Attention, Context
from lmjax.models.layers import Norm
from lmjax.models.transformer import make_model

TOKENS = np.random.default_rng(1).integers(0, 98, (2, 131))


def inside(reference):
  """Returns the hidden states before each layer and the attention weights [B, N, T, S] of each."""
  reference.set_attn_implementation("eager")
  with torch.no_grad():
    out = reference(torch.tensor(TOKENS), output_hidden_states=True, output_attentions=True)
  reference.set_attn_implementation("sdpa")
  return [x.numpy() for x in out.hidden_states], [x.numpy() for x in out.attentions]


def test_hidden_states_are_those_of_transformers(variant):
  reference, folder = variant
  model, params = lmjax.load(folder)
  hidden, _ = inside(reference)
  norm = lambda x: Norm(model.cfg).apply({"params": params["final_norm"]}, jnp.asarray(x))
  for count in range(1, model.cfg.num_layers + 1):
    first = make_model(dataclasses.replace(model.cfg, num_layers=count))
    own = {**params, "layers": jax.tree.map(lambda x: x[:count], params["layers"])}  # noqa: B023
    got, _ = first.apply({"params": own}, TOKENS, method="features")
    # The last that transformers gives has been through the final norm.
    expected = hidden[count] if count == model.cfg.num_layers else norm(hidden[count])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_attention_weights_are_those_of_transformers(variant, monkeypatch):
  reference, folder = variant
  model, params = lmjax.load(folder)
  hidden, expected = inside(reference)
  plain, seen = attention.dot_product_attention, []

  def spy(q, k, v, spec, **kwargs):
    eye = jnp.broadcast_to(jnp.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
    seen.append(plain(q, k, eye, spec, **kwargs))  # With one-hot values, the output is the weights.
    return plain(q, k, v, spec, **kwargs)
  monkeypatch.setattr(attention, "dot_product_attention", spy)
  for layer in range(model.cfg.num_layers):
    own = jax.tree.map(lambda x: x[layer], params["layers"])  # noqa: B023
    x = Norm(model.cfg).apply({"params": own["attention_norm"]}, jnp.asarray(hidden[layer]))
    Attention(model.cfg).apply({"params": own["attention"]}, x, Context(), None, jnp.asarray(layer))
    np.testing.assert_allclose(seen[-1].transpose(0, 2, 1, 3), expected[layer], rtol=0, atol=1e-5)
