"""What masked language modelling hides, and its loss against transformers'."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.config import UserError, base_config, from_config_dict
from lmjax.config_checks import check_objective
from lmjax.models import families
from lmjax.objectives import masked_lm

ENCODER = ("bert", dict(head="lm", pooler="none"))


def original(row):
  """Returns the tokens before any was hidden."""
  tokens = row["inputs"].copy()
  real = row["weights"] > 0
  tokens[row["places"][real]] = row["targets"][real]
  return tokens


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("pairs", ["none", "order"])
def test_input_and_targets_rebuild_the_text(task, unit, pairs):
  made = task("bert" if pairs != "none" else ENCODER, name="masked_lm", mask_unit=unit, sentence_pairs=pairs)
  special = made.tokenizer.add_special(masked_lm.SPECIAL_TOKENS)
  for number in range(40):
    row, example = made.row(number), made.texts[number % 64]
    tokens, text = original(row), example["targets"][example["weights"] > 0]
    tokens = tokens[:np.count_nonzero(row["segment_ids"])]
    framed = [token for token in tokens if token not in (special["cls"], special["sep"])]
    if pairs == "order" and row["sentence_labels"]:
      second = int(np.count_nonzero(row["token_types"])) - 1
      framed = framed[len(framed) - second:] + framed[:len(framed) - second]
    assert framed == text.tolist()
    assert tokens[0] == special["cls"] and tokens[-1] == special["sep"]


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_shares_are_those_asked_for(task, unit):
  made = task(ENCODER, seq_len=128, name="masked_lm", mask_unit=unit, mask_rate=0.2)
  mask = made.tokenizer.add_special(["mask"])["mask"]
  kinds, hidden, ordinary, at_places = collections.Counter(), 0, 0, np.zeros(128)
  for number in range(400):
    row = made.row(number)
    places = row["places"][row["weights"] > 0]
    assert len({*places.tolist()}) == len(places) and (np.diff(places) > 0).all()
    hidden, ordinary = hidden + len(places), ordinary + np.count_nonzero(row["segment_ids"]) - 2
    at_places[places] += 1
    seen, true = row["inputs"][places], row["targets"][:len(places)]
    kinds += collections.Counter(np.where(seen == mask, "mask", np.where(seen == true, "same", "random")).tolist())
  assert hidden / ordinary == pytest.approx(0.2, abs=0.005 if unit == "token" else 0.01)
  # Tokens of a span share their kind, and one is of three words and a space, each of about four letters and a space.
  draws = hidden / 15 if unit == "span" else hidden
  for kind, share in (("mask", 0.8), ("same", 0.1), ("random", 0.1)):
    assert kinds[kind] / hidden == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5 + 0.001)
  assert at_places[0] == 0 and at_places[2:60].min() > 0.5 * at_places[2:60].mean()


def test_words_are_hidden_whole_and_spans_have_the_lengths_of_the_paper(task):
  def runs(unit):
    made = task(("bert", dict(head="lm", pooler="none", max_positions=1024)), seq_len=1024, name="masked_lm",
                mask_unit=unit)
    lengths = []
    for number in range(40):
      row = made.row(number)
      tokens, n = original(row), np.count_nonzero(row["segment_ids"])
      chosen = np.isin(np.arange(n), row["places"][row["weights"] > 0])
      letters = (tokens >= 97) & (tokens < 123)
      for start in (i for i in range(1, n - 1) if letters[i] and not letters[i - 1]):
        stop = next(i for i in range(start, n) if not letters[i])
        assert chosen[start:stop].all() or not chosen[start:stop].any()
      changes = np.flatnonzero(np.diff(np.pad(chosen.astype(int), 1)))
      # A space is a word of its own here.
      lengths += [len("".join(map(chr, tokens[a:b])).replace(" ", " | ").split()) for a, b in changes.reshape(-1, 2)]
    return np.mean(lengths)

  geometric = sum(min(k, 10) * 0.2 * 0.8 ** (k - 1) for k in range(1, 200))
  assert runs("word") < 1.8 and runs("span") == pytest.approx(geometric, rel=0.25)


def test_a_span_is_hidden_alike_and_words_are_not(task):
  def kinds_of_runs(unit):
    made = task(ENCODER, seq_len=128, name="masked_lm", mask_unit=unit, mask_rate=0.05, mask_random=0.0, mask_same=0.5)
    mask, kinds = made.tokenizer.add_special(["mask"])["mask"], []
    for number in range(100):
      row = made.row(number)
      places = row["places"][row["weights"] > 0]
      is_mask = row["inputs"][places] == mask
      kinds += [set(run.tolist()) for run in np.split(is_mask, np.flatnonzero(np.diff(places) > 1) + 1) if len(run) > 2]
    return kinds

  # Where there are few, spans seldom touch.
  of_spans, of_words = kinds_of_runs("span"), kinds_of_runs("word")
  assert np.mean([len(kinds) == 1 for kinds in of_spans]) > 0.7 and {frozenset(kinds) for kinds in of_spans} >= {
      frozenset({True}), frozenset({False})}
  assert np.mean([len(kinds) == 1 for kinds in of_words]) < 0.4


def test_what_is_hidden_is_drawn_anew_each_time_a_text_is_seen(task):
  made = task(ENCODER, seq_len=64, name="masked_lm")
  places = {tuple(made.make(made.texts[3], (0, place))["places"].tolist()) for place in range(0, 640, 64)}
  assert len(places) == 10


def test_pairs_are_of_both_kinds_and_say_so(task):
  made = task("bert", seq_len=64, name="masked_lm", sentence_pairs="next")
  special = made.tokenizer.add_special(masked_lm.SPECIAL_TOKENS)
  labels = []
  for number in range(300):
    row = made.row(number)
    tokens, n = original(row), np.count_nonzero(row["segment_ids"])
    types = row["token_types"][:n]
    first = tokens[1:np.argmax(types) - 1]
    assert tokens[np.argmax(types) - 1] == special["sep"] and (np.diff(types) >= 0).all()
    text = made.texts[number % 64]["targets"][:n - 3]
    follows = np.array_equal(np.concatenate([first, tokens[np.argmax(types):n - 1]]), text)
    assert np.array_equal(first, text[:len(first)]) and follows == (row["sentence_labels"] == 0)
    labels.append(int(row["sentence_labels"]))
  assert 0.4 < np.mean(labels) < 0.6


def test_loss_is_that_of_transformers(task, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  made = task("bert", seq_len=64, name="masked_lm", sentence_pairs="next")
  torch.manual_seed(0)
  reference = transformers.BertForPreTraining(transformers.BertConfig(
      vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
      max_position_embeddings=128)).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  reference.save_pretrained(tmp_path)
  model, params = lmjax.load(tmp_path)
  batch = made.batch()
  _, sums = masked_lm.loss(model, params, {name: jnp.asarray(value) for name, value in batch.items()},
                           made.config.objective)
  labels = np.full((8, 64), -100)
  for row in range(8):
    real = batch["weights"][row] > 0
    labels[row, batch["places"][row][real]] = batch["targets"][row][real]
  as_torch = lambda x: torch.tensor(np.asarray(x, np.int64))
  with torch.no_grad():
    expected = reference(
        as_torch(batch["inputs"]), attention_mask=as_torch(batch["segment_ids"]),
        token_type_ids=as_torch(batch["token_types"]), labels=as_torch(labels),
        next_sentence_label=as_torch(batch["sentence_labels"])).loss.item()
  got = float(sums["loss"] / sums["weight"] + sums["sentence_loss"] / sums["sentence_weight"])
  assert got == pytest.approx(expected, abs=1e-4) and batch["sentence_weights"].all()


@pytest.mark.parametrize("model, objective, told", [
    (dict(head="lm"), dict(sentence_pairs="next"), "config.model.head is lm; set it to pretraining"),
    (dict(), {}, "config.model.head is pretraining; set it to lm"),
    (dict(), dict(mask_random=0.7, mask_same=0.4), "mask_random is 0.7 and mask_same 0.4, but they are shares")])
def test_what_does_not_go_together_is_told(model, objective, told):
  config = base_config()
  config.model.update({**families.debug(families.bert()), **model})
  config.train.num_steps, config.data.seq_len = 1, 64
  config.objective.update(name="masked_lm", **objective)
  with pytest.raises(UserError) as error:
    check_objective(from_config_dict(config))
  assert told in str(error.value)
