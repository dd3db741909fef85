"""What permutation language modelling predicts and sees, and its loss against transformers'."""

import collections

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.config import UserError, base_config, from_config_dict
from lmjax.config_checks import check_objective
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import permutation_lm


def permuted(task, changes=None, **settings):
  return task(("xlnet", changes or {}), name="permutation_lm", **settings)


def text_of(row):
  """Returns what a row says, in the order of the text."""
  text = row["inputs"][row["segment_ids"] > 0]
  if row.get("has_before"):
    text = np.concatenate([row["before"], text])
  return text[::-1] if row.get("reversed") else text


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("reverse_half", [False, True])
def test_a_row_rebuilds_the_text_and_its_targets_are_tokens_of_it(task, memory, reverse_half):
  made = permuted(task, dict(reverse_half=reverse_half), memory=memory)
  backwards = 0
  for number in range(64):
    row, example = made.row(number), made.texts[number]
    assert text_of(row).tolist() == example["targets"][example["weights"] > 0].tolist()
    real = row["weights"] > 0
    places = row["places"][real]
    assert (row["places"][~real] == -1).all() and (row["segment_ids"][places] > 0).all()
    np.testing.assert_array_equal(row["inputs"][places], row["targets"][real])
    np.testing.assert_array_equal(row["order"][places], np.arange(1, len(places) + 1))
    assert np.count_nonzero(row["order"]) == len(places)
    assert ("before" in row) == memory and ("reversed" in row) == reverse_half
    backwards += int(row.get("reversed", 0))
  assert 16 < backwards < 48 if reverse_half else backwards == 0


def test_an_example_too_short_for_two_texts_has_none_before(task):
  made = permuted(task, memory=True)
  for length, before in ((1, 0), (32, 0), (33, 1), (64, 1)):
    example = made.texts[0] | {"weights": (np.arange(64) < length).astype(np.float32)}
    row = made.make(example, (0, 0))
    assert row["has_before"] == before and row["weights"].sum() >= 1
    assert text_of(row).tolist() == example["targets"][:length].tolist()


def test_shares_and_lengths_are_those_asked_for(task):
  made = permuted(task, dict(max_positions=512), seq_len=512)
  lengths, places, predicted, tokens, ranks = collections.Counter(), np.zeros(512), 0, 0, []
  for number in range(300):
    row = made.row(number)
    target, real = row["order"] > 0, np.count_nonzero(row["segment_ids"])
    places += target
    predicted, tokens = predicted + np.count_nonzero(target), tokens + real
    ends = np.flatnonzero(np.diff(np.pad(target.astype(int), 1))).reshape(-1, 2)
    lengths += collections.Counter((ends[:, 1] - ends[:, 0]).tolist())
    ranks.append(np.corrcoef(row["places"][row["weights"] > 0], np.arange(np.count_nonzero(target)))[0, 1])
  assert predicted / tokens == pytest.approx(1 / 6, abs=1e-3)
  assert places[:250].min() > 0.5 * 300 / 6 and places[:250].max() < 1.6 * 300 / 6
  # Spans that touch, and single tokens that fill the rest, blur the shares a little.
  total = sum(lengths.values())
  for length in range(1, 6):
    assert lengths[length] / total == pytest.approx(1 / length / sum(1 / k for k in range(1, 6)), abs=0.05)
  assert abs(np.mean(ranks)) < 0.03


@pytest.mark.parametrize("fraction, predicted", [(1.0, 32), (0.7, 22), (0.01, 1)])
def test_any_fraction_is_met(task, fraction, predicted):
  made = permuted(task, predict_fraction=fraction)
  example = made.texts[0] | {"weights": np.ones(32, np.float32)}
  assert made.make(example, (0, 0))["weights"].sum() == predicted


def test_a_target_sees_the_rest_and_the_targets_before_it():
  order = jnp.array([[0, 2, 0, 1, 3]])  # The places 3, 1 and 4 are predicted, in that order.
  hidden = permutation_lm.hidden(order)[0]
  rows = ["".join("01"[int(x)] for x in row) for row in hidden]
  assert rows == ["01011", "01001", "01011", "01011", "00001"]


def test_a_loss_depends_on_no_token_that_it_may_not_see(task):
  made = permuted(task, predict_fraction=0.3, memory=True)
  model = make_model(made.config.model)
  params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape),
                        nn.unbox(init_params(model, jax.random.key(0))))
  batch = {name: value[:1] for name, value in made.batch().items()}
  row = {name: value[0] for name, value in batch.items()}
  count = int(row["weights"].sum())
  assert count > 2 and row["has_before"]

  @jax.jit
  def losses(inputs, before):  # Of each target by itself.
    one = lambda weights: permutation_lm.loss(
        model, params, {**batch, "inputs": inputs, "before": before, "weights": weights}, made.config.objective)[0]
    return jax.lax.map(one, jnp.eye(len(row["places"]))[:count, None])

  start = losses(batch["inputs"], batch["before"])

  def changed(place, name="inputs"):
    given = {"inputs": batch["inputs"].copy(), "before": batch["before"].copy()}
    given[name][0, place] = (given[name][0, place] + 1) % 128
    return (np.abs(losses(**given) - start) > 1e-6).tolist()

  for number, place in enumerate(row["places"][:count]):
    assert changed(place) == [later > number for later in range(count)]
  rest = np.flatnonzero((row["order"] == 0) & (row["segment_ids"] > 0))[0]
  assert changed(rest) == [True] * count == changed(3, "before")
  padding = np.flatnonzero(row["segment_ids"] == 0)
  assert not len(padding) or changed(padding[0]) == [False] * count


@pytest.mark.parametrize("memory", [False, True])
def test_loss_is_that_of_transformers(task, tmp_path, memory):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  made = permuted(task, seq_len=64, memory=memory)
  torch.manual_seed(0)
  reference = transformers.XLNetLMHeadModel(transformers.XLNetConfig(
      vocab_size=384, d_model=64, n_layer=2, n_head=4, d_inner=128, mem_len=40)).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  reference.save_pretrained(tmp_path)
  model, params = lmjax.load(tmp_path)
  batch = made.batch()
  _, sums = permutation_lm.loss(model, params, {name: jnp.asarray(value) for name, value in batch.items()},
                                made.config.objective)
  floats = lambda x: torch.tensor(np.array(x, np.float32))
  integers = lambda x: torch.tensor(np.array(x, np.int64))
  mems = None
  with torch.no_grad():
    if memory:
      assert batch["has_before"].all()
      mems = reference(integers(batch["before"])).mems
    expected = reference(
        integers(batch["inputs"]), attention_mask=floats(batch["segment_ids"]), mems=mems,
        perm_mask=floats(permutation_lm.hidden(batch["order"])),
        target_mapping=floats(jax.nn.one_hot(batch["places"], 64)),
        labels=integers(np.where(batch["weights"] > 0, batch["targets"], -100))).loss.item()
  assert float(sums["loss"] / sums["weight"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model, data, told", [
    (dict(unidirectional=True), {}, "config.model.unidirectional is True"),
    (dict(memory_reuse_len=8), {}, "config.model.memory_reuse_len is 8, which leaves a gap"),
    ({}, dict(document_mask=True), "set them to concat and False"),
    ({}, dict(packing="best_fit"), "set them to concat and False"),
    (dict(head="none"), {}, "config.model.head is none; set it to lm")])
def test_what_does_not_go_together_is_told(model, data, told):
  config = base_config()
  config.model.update({**families.debug(families.xlnet()), **model})
  config.train.num_steps = 1
  config.data.update(data)
  config.objective.update(name="permutation_lm", memory=True)
  with pytest.raises(UserError) as error:
    check_objective(from_config_dict(config))
  assert told in str(error.value)
