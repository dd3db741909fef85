"""What replaced token detection draws and labels, and its loss against transformers'."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.config import UserError, base_config, electra_parts, from_config_dict
from lmjax.config_checks import check_objective
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import masked_lm, replaced_tokens

FAMILY = ("electra_pretraining", dict(generator_fraction=0.5))


@pytest.fixture(scope="module")
def made(task):
  return task(FAMILY, seq_len=64, name="replaced_tokens", mask_random=0.0, mask_same=0.15)


@pytest.fixture(scope="module")
def model(made):
  return make_model(made.config.model)


@pytest.fixture(scope="module")
def params(model):
  return nn.unbox(jax.jit(lambda: init_params(model, jax.random.key(0)))())


@pytest.fixture(scope="module")
def value(made, model):
  """Returns the compiled (params, batch) -> (loss, sums)."""
  return jax.jit(lambda params, batch: replaced_tokens.loss(model, params, batch, made.config.objective))


def on_device(batch):
  return {name: jnp.asarray(value) for name, value in batch.items()}


def test_a_row_is_one_of_masked_lm_with_weights_and_a_key(made):
  mask, keys, same, hidden = made.tokenizer.add_special(["mask"])["mask"], set(), 0, 0
  masked = made.make.keywords["recipe"]
  for number in range(200):
    row = made.row(number)
    plain = masked_lm.make_example(made.texts[number % 64], (0, number), masked)
    assert all(np.array_equal(row[name], value) for name, value in plain.items())
    np.testing.assert_array_equal(row["replaced_weights"], row["segment_ids"] > 0)
    places = row["places"][row["weights"] > 0]
    seen = row["inputs"][places]
    is_same = seen == row["targets"][:len(places)]
    assert ((seen == mask) | is_same).all()  # None is random.
    same, hidden = same + is_same.sum(), hidden + len(places)
    keys.add(int(row["sample_keys"]))
  assert same / hidden == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / hidden) ** 0.5)
  assert len(keys) == 200 and min(keys) < 2 ** 29 and max(keys) > 2 ** 31 + 2 ** 30


def test_tokens_are_drawn_from_the_softmax():
  shares, rows, places = np.array([0.5, 0.3, 0.15, 0.05]), 2000, 6
  scores = jnp.log(jnp.asarray(shares))
  draw = lambda keys, chunk=None, **more: np.asarray(replaced_tokens.draw(
      jnp.ones((len(keys), places, 1)), scores[:, None], keys_B=jnp.asarray(keys, jnp.uint32), chunk=chunk,
      **{"bias_V": None, **more}))
  keys = np.random.default_rng(0).integers(2 ** 32, size=rows, dtype=np.uint32)
  drawn = draw(keys)
  error = 4 * (shares * (1 - shares) / (rows * places)) ** 0.5
  np.testing.assert_array_less(np.abs(np.bincount(drawn.ravel(), minlength=4) / drawn.size - shares), error)
  # Places and rows draw apart from each other: equal as often as chance has it.
  chance = np.sum(shares ** 2)
  for one, other in ((drawn[:, 0], drawn[:, 1]), (drawn[:-1, 2], drawn[1:, 2])):
    assert np.mean(one == other) == pytest.approx(chance, abs=0.06)
  # How places and rows are split changes nothing.
  np.testing.assert_array_equal(draw(keys[:8], chunk=2), drawn[:8])
  np.testing.assert_array_equal(draw(keys[4:8]), drawn[4:8])
  assert (draw(keys[:8], bias_V=jnp.array([0, 0, 99.0, 0])) == 2).all()
  capped = draw(keys, bias_V=jnp.array([0, 0, 99.0, 0]), softcap=1e-3)
  np.testing.assert_allclose(np.bincount(capped.ravel(), minlength=4) / capped.size, 0.25, atol=0.02)


def test_labels_say_which_tokens_are_not_the_original_ones():
  batch = on_device(dict(inputs=[[9, 4, 4, 7, 8, 0]], places=[[1, 2, 4, 0]], targets=[[5, 6, 8, 0]],
                         weights=[[1., 1., 1., 0.]]))
  tokens, labels = replaced_tokens.replace(batch, jnp.array([[5, 3, 2, 1]]))
  assert tokens.tolist() == [[9, 5, 3, 7, 2, 0]] and labels.tolist() == [[0, 0, 1, 0, 1, 0]]


def test_most_of_what_an_untrained_generator_draws_is_replaced(made, params, value):
  batch = made.batch()
  sums = value(params, on_device(batch))[1]
  assert 0.9 * batch["weights"].sum() < sums["replaced_share"] <= batch["weights"].sum()
  assert sums["replaced_weight"] == (batch["segment_ids"] > 0).sum() and sums["weight"] == batch["weights"].sum()
  # A generator that always puts the same token in replaces all that are another.
  bias = jnp.zeros(made.config.model.vocab_size).at[32].set(1e4)
  always = {**params, "generator": {**params["generator"], "head": {"bias": bias}}}
  expected = np.sum((batch["targets"] != 32) * batch["weights"])
  assert value(always, on_device(batch))[1]["replaced_share"] == expected < batch["weights"].sum()


def test_an_evaluation_is_the_same_again_and_a_row_does_not_depend_on_the_others(made, params, value):
  batch = on_device(made.batch())
  first, again = value(params, batch)[1], value(params, batch)[1]
  assert all(first[name] == again[name] for name in first)
  other = value(params, {**batch, "sample_keys": batch["sample_keys"] + jnp.uint32(1)})[1]
  assert other["replaced_loss"] != first["replaced_loss"] and other["loss"] == first["loss"]
  turned = value(params, jax.tree.map(lambda x: x[::-1], batch))[1]
  assert turned["replaced_share"] == first["replaced_share"]


def test_no_gradient_of_the_discriminator_reaches_the_generator(made, model, params):
  batch = on_device(made.batch())
  of = lambda name: jax.jit(jax.grad(lambda params: replaced_tokens.loss(
      model, params, batch, made.config.objective)[1][name]))(params)
  largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
  grads = of("replaced_loss")
  assert largest(grads["generator"]) == 0 and min(largest(grads["discriminator"]), largest(grads["embed"])) > 1e-3


def test_loss_is_that_of_transformers(made, model, value, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  generator_cfg, discriminator_cfg = electra_parts(made.config.model)

  def theirs(kind, cfg):
    torch.manual_seed(0)
    made = kind(transformers.ElectraConfig(
        vocab_size=cfg.vocab_size, embedding_size=cfg.embedding_dim, hidden_size=cfg.embed_dim, num_hidden_layers=2,
        num_attention_heads=cfg.num_heads, intermediate_size=cfg.mlp_dim, max_position_embeddings=128)).eval()
    with torch.no_grad():
      for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return made

  generator = theirs(transformers.ElectraForMaskedLM, generator_cfg)
  discriminator = theirs(transformers.ElectraForPreTraining, discriminator_cfg)
  shared = ("word_embeddings", "position_embeddings", "token_type_embeddings")
  with torch.no_grad():
    generator.generator_lm_head.bias[32] += 8  # So that some of what is drawn is the original token.
    for name in shared:
      getattr(generator.electra.embeddings, name).weight.copy_(
          getattr(discriminator.electra.embeddings, name).weight)
  ours = {}
  for name, part in (("generator", generator), ("discriminator", discriminator)):
    part.save_pretrained(tmp_path / name)
    ours[name] = lmjax.load(tmp_path / name)[1]
  tables = {name: ours["discriminator"]["embed"][name] for name in ("embedding", "position", "token_type")}
  own = lambda part: {**part, "embed": {name: x for name, x in part["embed"].items() if name not in tables}}
  params = {"embed": tables, **{name: own(part) for name, part in ours.items()}}

  batch = made.batch()
  _, sums = value(params, on_device(batch))
  output = model.apply({"params": params}, batch["inputs"], batch["places"], batch["segment_ids"],
                       method="masked_outputs")
  drawn = replaced_tokens.draw(*output, jnp.asarray(batch["sample_keys"]))
  tokens, replaced = replaced_tokens.replace(on_device(batch), drawn)
  labels = np.full((8, 64), -100)
  for row in range(8):
    real = batch["weights"][row] > 0
    labels[row, batch["places"][row][real]] = batch["targets"][row][real]
  as_torch = lambda x: torch.tensor(np.asarray(x, np.int64))
  mask = as_torch(batch["segment_ids"])
  assert (batch["segment_ids"] == 0).any() and 0 < replaced.sum() < batch["weights"].sum()
  with torch.no_grad():
    expected = generator(as_torch(batch["inputs"]), attention_mask=mask, labels=as_torch(labels)).loss.item()
    of_replaced = discriminator(as_torch(tokens), attention_mask=mask, labels=as_torch(replaced)).loss.item()
  assert made.config.objective.replaced_weight == 50
  got = sums["loss"] / sums["weight"], sums["replaced_loss"] / sums["replaced_weight"]
  assert float(got[0] + 50 * got[1]) == pytest.approx(expected + 50 * of_replaced, abs=1e-4)
  assert float(got[0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model, objective, told", [
    (families.electra(), {}, "config.model.architecture is encoder; set it to electra"),
    ({}, dict(sentence_pairs="next"), "config.objective.sentence_pairs is next, which"),
    (dict(head="lm"), {}, "config.model.head is 'lm', which config.model.architecture electra does not do"),
    (dict(architecture="encoder", generator_fraction=0.5), {}, "config.model.generator_fraction is 0.5, which"),
    (dict(tie_embeddings=False), {}, "config.model.tie_embeddings is False, which")])
def test_what_does_not_go_together_is_told(model, objective, told):
  config = base_config()
  config.model.update({**families.debug(families.electra_pretraining()), **model})
  config.train.num_steps, config.data.seq_len = 1, 64
  config.objective.update(name="replaced_tokens", **objective)
  with pytest.raises(UserError) as error:
    check_objective(from_config_dict(config))
  assert told in str(error.value)
