"""What span corruption and UL2's mixture take out of a text, and the loss against transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax import objectives
from lmjax.config import UserError, base_config, from_config_dict
from lmjax.config_checks import check_objective
from lmjax.data.tokenizer import Tokenizer, byte_tokenizer
from lmjax.models import families
from lmjax.objectives import mixture_of_denoisers, span_corruption
from lmjax.objectives.span_corruption import Denoiser, lengths, noise_mask, noise_of


def parts(made, row):
  """Returns what the encoder reads and the decoder writes, without padding and end tokens, which must be there."""
  encoder = row["encoder_inputs"][row["encoder_segment_ids"] > 0].tolist()
  decoder = row["targets"][row["weights"] > 0].tolist()
  assert encoder[-1] == decoder[-1] == made.tokenizer.eos_id
  return encoder[:-1], decoder[:-1]


def rebuilt(made, encoder, decoder):
  """Puts the spans back in their places; every sentinel must stand on both sides, in order."""
  sentinels = {id: number for number, id in enumerate(made.tokenizer.add_special(
      span_corruption.sentinels(sum(token > 256 for token in decoder))).values())}
  spans, text, met = [], [], 0
  for token in decoder:
    if token in sentinels:
      assert sentinels[token] == len(spans)
      spans.append([])
    else:
      spans[-1].append(token)
  for token in encoder:
    if token in sentinels:
      assert sentinels[token] == met
      text, met = text + spans[met], met + 1
    else:
      text.append(token)
  assert met == len(spans)
  return text, spans


def text_of(made, number):
  example = made.texts[number % made.texts.num_examples]
  return example["targets"][example["weights"] > 0].tolist()


def test_input_and_targets_rebuild_the_text_and_spans_are_as_many_as_asked_for(task):
  made = task("t5", seq_len=128, name="span_corruption", noise_density=0.2, mean_span_length=4.0)
  all_spans = []
  for number in range(200):
    row, text = made.row(number), text_of(made, number)
    again, spans = rebuilt(made, *parts(made, row))
    assert again == text and min(map(len, spans)) > 0
    noise = round(len(text) * 0.2)
    assert (sum(map(len, spans)), len(spans)) == (noise, round(noise / 4))
    assert row["inputs"][0] == made.tokenizer.start_id == made.tokenizer.eos_id
    assert np.array_equal(row["inputs"][1:], row["targets"][:-1] * row["segment_ids"][1:])
    assert parts(made, row)[0][0] == text[0]
    all_spans += map(len, spans)
  assert np.mean(all_spans) == pytest.approx(4, rel=0.05) and np.std(all_spans) > 1.5


def test_a_full_text_fills_both_rows(task):
  made = task("t5", seq_len=128, name="span_corruption")
  length, _ = objectives.text_needs(made.config)
  row = made.make({"targets": np.full(length, 97), "weights": np.ones(length)}, (0, 0))
  assert row["encoder_segment_ids"].all() and row["segment_ids"].all() and row["weights"].all()
  assert (len(row["encoder_inputs"]), len(row["targets"])) == (128, 29)


def test_noise_falls_everywhere_alike():
  """Every cut is as likely as any other, so that the share of noise is the same all over but at the two ends."""
  rng, denoiser = np.random.default_rng(0), Denoiser(0.15, 3)
  counts = np.mean([noise_mask(rng, 100, denoiser) for _ in range(4000)], axis=0)
  assert counts[0] == 0 and counts[-1] == 1 and counts.mean() == pytest.approx(0.15)
  np.testing.assert_allclose(counts[20:80], 0.15, atol=0.04)
  lone = [noise_mask(rng, 6, Denoiser(0.5, 1.5)) for _ in range(2000)]  # Two spans each of three tokens, four masks.
  kinds = {"".join(map(str, mask.astype(int))) for mask in lone}
  assert kinds == {"010011", "011001", "001011", "001101"}


# The first are the lengths that T5 was trained with. Of the third its code takes one token less, to make both 512.
@pytest.mark.parametrize("seq_len, density, mean_span, text, decoder", [
    (512, 0.15, 3, 568, 114), (1024, 0.15, 3, 1137, 229), (512, 0.5, 3, 767, 513), (64, 0.15, 10, 73, 13)])
def test_lengths_are_those_of_t5(seq_len, density, mean_span, text, decoder):
  assert lengths((Denoiser(density, mean_span),), seq_len)[:2] == (text, decoder)


def test_noise_is_never_nothing_and_never_all():
  for length in range(2, 60):
    for denoiser in (Denoiser(0.01, 3), Denoiser(0.15, 3), Denoiser(0.99, 1), Denoiser(0.5, 64), Denoiser(0.25, None)):
      noise, spans = noise_of(length, denoiser)
      assert 0 < noise < length and 0 < spans <= min(noise, length - noise)
      mask = noise_mask(np.random.default_rng(length), length, denoiser)
      assert mask.sum() == noise and np.count_nonzero(np.diff(mask.astype(int)) == 1) == spans and not mask[0]


@pytest.mark.parametrize("name", ["span_corruption", "mixture_of_denoisers"])
def test_shapes_are_the_same_for_texts_of_any_length(task, name):
  made = task("t5", seq_len=48, name=name)
  shapes = {key: (value.shape, value.dtype) for key, value in made.row(0).items()}
  whole = made.texts[0]
  for length in (1, 2, 3, 20, objectives.text_needs(made.config)[0]):
    keep = np.arange(len(whole["weights"])) < length
    example = {"inputs": whole["inputs"] * keep, "targets": np.full(len(keep), 97) * keep, "weights": np.float32(keep)}
    for place in range(30):
      row = made.make(example, (0, place))
      assert {key: (value.shape, value.dtype) for key, value in row.items()} == shapes
      encoder, decoder = parts(made, row)
      assert (encoder + decoder).count(97) == length


def test_start_is_the_padding_of_t5_and_else_the_end():
  tokenizers = pytest.importorskip("tokenizers")
  model = lambda *names: tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {name: id for id, name in enumerate(names)}, unk_token=names[-1]))
  assert Tokenizer(model("<pad>", "</s>", "<unk>")).start_id == 0
  assert Tokenizer(model("<s>", "<pad>", "</s>", "<unk>")).start_id == 2
  assert byte_tokenizer().start_id == 256


def test_a_mixture_has_all_its_denoisers_and_says_which(task):
  made = task("t5", seq_len=256, name="mixture_of_denoisers")
  modes = {id: name for name, id in made.tokenizer.add_special(["R", "S", "X"]).items()}
  text_len, _ = objectives.text_needs(made.config)
  seen = {"R": [], "S": [], "X": []}
  for number in range(700):
    (mode, *encoder), decoder = parts(made, made.row(number))
    text, spans = rebuilt(made, encoder, decoder)
    assert text == text_of(made, number)
    seen[modes[mode]].append((sum(map(len, spans)) / len(text), len(text) / len(spans), len(spans)))
    if modes[mode] == "S":
      assert encoder[:-1] + spans[0] == text
  shares = {mode: len(rows) / 700 for mode, rows in seen.items()}
  assert shares == {"R": pytest.approx(2 / 7, abs=0.06), "S": pytest.approx(1 / 7, abs=0.05),
                    "X": pytest.approx(4 / 7, abs=0.06)}
  near = lambda values, shares: all(min(abs(value - share) for share in shares) < 0.01 for value in values)
  assert near([row[0] for row in seen["R"]], [0.15]) and near([row[0] for row in seen["S"]], [0.25])
  assert near([row[0] for row in seen["X"]], [0.15, 0.5]) and {row[2] for row in seen["S"]} == {1}
  assert all(denoiser.mode in seen for denoiser in mixture_of_denoisers.DENOISERS) and text_len < 256 / 0.87


def test_loss_is_that_of_transformers(task, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  made = task("t5", seq_len=64, name="span_corruption")
  torch.manual_seed(0)
  reference = transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
      decoder_start_token_id=made.tokenizer.start_id)).eval()
  reference.save_pretrained(tmp_path)
  model, params = lmjax.load(tmp_path)
  batch = made.batch()
  _, sums = span_corruption.loss(model, params, {name: jnp.asarray(value) for name, value in batch.items()},
                                 made.config.objective)
  as_torch = lambda x: torch.tensor(np.asarray(x, np.int64))
  labels = as_torch(np.where(batch["weights"] > 0, batch["targets"], -100))
  with torch.no_grad():
    # It makes the decoder's input of the labels itself.
    expected = reference(as_torch(batch["encoder_inputs"]), attention_mask=as_torch(batch["encoder_segment_ids"]),
                         labels=labels).loss.item()
  assert len({*batch["weights"].sum(axis=1).tolist()}) > 1
  assert float(sums["loss"] / sums["weight"]) == pytest.approx(expected, abs=1e-4)


def config_of(family="t5", objective="span_corruption", data=None, model=None, **changes):
  config = base_config()
  config.model.update({**families.debug(families.preset(family)), **(model or {})})
  config.data.update({"seq_len": 64, **(data or {})})
  config.train.num_steps = 1
  config.objective.update(name=objective, **changes)
  return from_config_dict(config)


@pytest.mark.parametrize("changes, told", [
    (dict(family="llama"), "span_corruption, which writes what is missing from a text, but config.model.architecture "
     "is decoder; set it to encoder_decoder"),
    (dict(data=dict(packing="best_fit")), "config.data.packing is best_fit, which keeps them apart; set it to concat"),
    (dict(data=dict(document_mask=True), objective="mixture_of_denoisers"), "document_mask is True, which keeps them")])
def test_what_does_not_go_together_is_told(changes, told):
  with pytest.raises(UserError) as error:
    check_objective(config_of(**changes))
  assert told in str(error.value)


def test_too_few_learned_positions_are_told():
  with pytest.raises(UserError, match="config.data.seq_len is 256, more than the 128 learned positions"):
    config_of("bart", data=dict(seq_len=256))
  much = dict(noise_density=0.7, mean_span_length=2.0)
  with pytest.raises(UserError, match="decoder then writes up to 106 tokens, more than the 64 learned positions of"):
    objectives.text_needs(config_of("bart", model=dict(max_positions=64), **much))
  assert objectives.text_needs(config_of("bart", **much))[0] == 105
  with pytest.raises(UserError, match="config.data.seq_len is 2, but a text of two tokens takes 3 once it is"):
    objectives.text_needs(config_of(data=dict(seq_len=2)))
