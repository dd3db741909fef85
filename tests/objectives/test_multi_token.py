"""Which tokens multi-token prediction asks for, its loss by hand, and what its model has more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import metrics
from lmjax.config import UserError
from lmjax.config_checks import check_objective
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import multi_token

FAMILY = ("llama", dict(num_future=3))


@pytest.fixture(scope="module")
def made(task):
  return task(FAMILY, seq_len=16, name="multi_token")


def test_targets_are_the_tokens_further_ahead(made):
  for number in range(20):
    example, row = made.texts[number], made.row(number)
    text = example["targets"][example["weights"] > 0]
    for k in (1, 2):
      counted = row["future_weights"][:, k - 1] > 0
      np.testing.assert_array_equal(row["future_targets"][counted, k - 1], text[k:])
      assert counted.sum() == len(text) - k and counted[:len(text) - k].all()


def test_what_is_ahead_in_another_text_does_not_count(made):
  ids = np.array([1] * 5 + [2] * 8 + [0] * 3)
  example = {"targets": np.arange(16), "weights": (ids > 0).astype(np.float32), "segment_ids": ids}
  weights = made.make(example, (0, 0))["future_weights"]
  assert np.flatnonzero(weights[:, 0]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
  assert np.flatnonzero(weights[:, 1]).tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10]


def test_loss_is_that_of_the_formula_and_reads_nothing_later(made):
  model = make_model(made.config.model)
  params = jax.tree.map(lambda x: x.value, init_params(model, jax.random.key(0)), is_leaf=lambda x: hasattr(x, "value"))
  batch = {name: jnp.asarray(value) for name, value in made.batch(2).items()}
  _, sums = multi_token.loss(model, params, batch, made.config.objective)

  @jax.jit
  def outputs(tokens):
    (x, w, _), further = model.apply({"params": params}, tokens, method="future_outputs")
    return [jax.nn.log_softmax(y @ w.T) for y in (x, *further)]

  log_probs, text = outputs(batch["inputs"]), np.asarray(batch["targets"])
  totals = []
  for k in (1, 2, 3):
    probs = np.asarray(log_probs[k - 1])
    pick = lambda row, t, k=k, probs=probs: -probs[row, t, text[row, t + k - 1]]
    places = [(row, t) for row in range(2) for t in range(16) if t + k - 1 < int(batch["weights"][row].sum())]
    totals.append(sum(float(pick(*place)) for place in places))
  assert float(sums["loss"]) == pytest.approx(totals[0], rel=1e-5)
  assert float(sums["future_loss"]) == pytest.approx(totals[1] + totals[2], rel=1e-5)

  changed = outputs(batch["inputs"].at[:, 9].add(1))
  for before, after in zip(log_probs, changed):
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert float(jnp.abs(before[:, 9:] - after[:, 9:]).max()) > 1e-4


def test_each_further_token_has_a_block_and_counts_its_flops(made, task):
  shapes = lambda cfg: jax.eval_shape(lambda: init_params(make_model(cfg), jax.random.key(0)))
  plain = task("llama", seq_len=16).config.model
  more = metrics.count_params(shapes(made.config.model)) - metrics.count_params(shapes(plain))
  assert more == 2 * metrics.count_params(shapes(plain)["layers"]) / plain.num_layers
  cfg, length = config_lib.fill_sizes(plain), 16
  block = (metrics.flops_per_token(cfg, length) - 6 * cfg.embed_dim * cfg.vocab_size) / cfg.num_layers
  assert metrics.flops_per_token(made.config.model, length) - metrics.flops_per_token(cfg, length) == pytest.approx(
      2 * (block + 6 * cfg.embed_dim * cfg.vocab_size))


@pytest.mark.parametrize("changes, objective, told", [
    (dict(num_future=2), "causal_lm", "num_future is 2 and config.objective.name causal_lm, but multi_token is for 2"),
    (dict(num_future=1), "multi_token", "num_future is 1 and config.objective.name multi_token"),
    (dict(num_future=2, num_experts=2), "multi_token", "multi_token, which does not balance experts")])
def test_what_does_not_go_together_is_told(task, changes, objective, told):
  config = task(("llama", changes), seq_len=16, name=objective).config
  with pytest.raises(UserError, match=told):
    check_objective(config)
