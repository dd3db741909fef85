"""Decoding with a five-line stand-in for a model, and with a real one."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import ModelConfig, UserError
from lmjax.generation import generate
from lmjax.generation.sampling import Sampler, decode
from lmjax.models.transformer import init_params, make_model


def counts_up(tokens, positions, cache):
  """The likeliest token after t is t + 1; the cache counts calls."""
  return jax.nn.one_hot(tokens[:, -1] + 1, 10) * 5.0, cache + 1


def run(prompts, lengths, num_tokens=4, **kwargs):
  out = decode(counts_up, jnp.int32(0), jnp.array(prompts), jnp.array(lengths), num_tokens=num_tokens,
               sampler=Sampler(temperature=0), key=jax.random.key(0), **kwargs)
  return out.tolist()


def test_greedy_follows_the_likeliest():
  assert run([[0, 2], [4, 5]], [1, 2]) == [[3, 4, 5, 6], [6, 7, 8, 9]]


def test_a_finished_sequence_stays_finished():
  assert run([[2], [6]], [1, 1], eos_id=5) == [[3, 4, 5, 5], [7, 8, 9, 0]]


def test_tokens_beyond_the_tokenizer_are_never_chosen():
  assert run([[3]], [1], num_tokens=3, vocab_size=5) == [[4, 0, 1]]


def counts(sampler, logits, draws=4000):
  keys = jax.random.split(jax.random.key(1), draws)
  tokens = jax.vmap(lambda key: sampler(jnp.array([logits]), key)[0])(keys)
  return np.bincount(tokens, minlength=len(logits)) / draws


LOGITS = np.log([0.5, 0.25, 0.15, 0.1]).tolist()


@pytest.mark.parametrize("sampler, expected", [
    (Sampler(), [0.5, 0.25, 0.15, 0.1]),
    (Sampler(temperature=0.5), [0.725, 0.181, 0.065, 0.029]),
    (Sampler(top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (Sampler(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
    (Sampler(top_p=0.76), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
    (Sampler(top_p=0.01), [1, 0, 0, 0]),
    (Sampler(top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
])
def test_samplers_draw_from_the_distribution_they_name(sampler, expected):
  # Four standard deviations of a frequency near one half over 4000 draws.
  np.testing.assert_allclose(counts(sampler, LOGITS), expected, atol=4 * (0.25 / 4000) ** 0.5)


CFG = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, vocab_size=50,
                  max_positions=40, dtype="float32", init_std=0.3, position="rotary")


def make(**changes):
  model = make_model(dataclasses.replace(CFG, **changes))
  return model, nn.unbox(init_params(model, jax.random.key(0)))


@pytest.mark.parametrize("position", ["rotary", "learned", "alibi"])
def test_prompts_of_different_lengths_equal_each_alone_and_the_plain_loop(position):
  model, params = make(position=position)
  prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [30, 31]]
  together = generate(model, params, prompts, max_new_tokens=8, temperature=0)
  logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens[None])[0])
  for prompt, tokens in zip(prompts, together):
    text = np.zeros(15, np.int32)  # What comes after a token does not change its logits.
    text[:len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + 8):
      text[end] = logits(text)[end - 1].argmax()
    assert tokens == text[len(prompt):len(prompt) + 8].tolist()


@pytest.mark.parametrize("changes", [
    dict(position="rotary"), dict(position="relative"), dict(position="learned", attention_window=6)],
                         ids=lambda changes: changes["position"])
def test_a_prompt_may_be_seen_from_both_sides(changes):
  """Padding comes before the shorter one, and nothing of what is made is seen by the prompt."""
  model, params = make(**changes)
  prompts = [[1, 2, 3, 4, 5, 6, 7], [30, 31]]
  together = generate(model, params, prompts, max_new_tokens=6, temperature=0, both_sides=True)
  logits = jax.jit(lambda tokens, prefix: model.apply(
      {"params": params}, tokens, prefix_BT=prefix, method=lambda model, tokens, prefix_BT: model.logits(
          model.features(tokens, prefix_BT=prefix_BT)[0])))
  for prompt, tokens in zip(prompts, together):
    text, prefix = np.zeros((1, 13), np.int32), np.arange(13)[None] < len(prompt)
    text[0, :len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + 6):
      text[0, end] = logits(text, prefix)[0, end - 1].argmax()
    assert tokens == text[0, len(prompt):len(prompt) + 6].tolist()
  assert generate(model, params, prompts, max_new_tokens=6, temperature=0) != together


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
  model, params = make()
  texts = [generate(model, params, [[1, 2]], max_new_tokens=20, seed=seed)[0] for seed in (0, 0, 1)]
  assert texts[0] == texts[1] != texts[2]


def test_the_end_of_text_token_ends_and_is_not_returned():
  model, params = make()
  tokens = generate(model, params, [[1]], max_new_tokens=12, temperature=0)[0]
  eos = tokens[5]
  assert generate(model, params, [[1]], max_new_tokens=12, temperature=0, eos_id=eos)[0] == tokens[:tokens.index(eos)]


@pytest.mark.parametrize("prompts, settings, told", [
    ([[]], {}, "A prompt is empty"),
    ([], {}, "A prompt is empty"),
    ([[50]], {}, "token 50, but the model's vocabulary has 50"),
    ([[1]], dict(temperature=-1.0), "temperature is -1.0, but it must be 0 or more"),
    ([[1]], dict(top_p=0.0), "top_p is 0.0"),
    ([[1]], dict(top_k=-1), "top_k is -1"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
    ([[1] * 39], dict(max_new_tokens=2), "41 tokens, but the model has 40 learned positions"),
])
def test_bad_requests_are_refused_in_a_sentence(prompts, settings, told):
  model, params = make(position="learned")
  with pytest.raises(UserError, match=told):
    generate(model, params, prompts, **settings)
