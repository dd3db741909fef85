"""FLOPs of training follow the rows that an objective makes: what is predicted, what is written, what is read twice."""

import pytest

from lmjax import metrics, objectives
from lmjax.config import electra_parts

T = 64


@pytest.mark.parametrize("family, name, settings", [
    (("bert", dict(head="lm", pooler="none")), "masked_lm", dict(mask_rate=0.3)),
    ("bert", "masked_lm", dict(sentence_pairs="next")),
    (("electra_pretraining", dict(generator_fraction=0.5)), "replaced_tokens", {})])
def test_logits_are_of_the_hidden_tokens_alone(task, family, name, settings):
  made = task(family, seq_len=T, name=name, **settings)
  cfg, places = made.config.model, len(made.row(0)["places"])
  # The generator of an ELECTRA alone projects to the vocabulary.
  head = electra_parts(cfg)[0] if name == "replaced_tokens" else cfg
  product = 6 * head.embedding_dim * (head.embed_dim + head.vocab_size)
  fewer = metrics.flops_per_token(cfg, T) - objectives.flops_per_token(made.config)
  assert places < T / 2 and fewer == pytest.approx(product * (1 - places / T))


def test_xlnet_has_a_second_stream_of_what_is_predicted(task):
  made = task("xlnet", seq_len=T, name="permutation_lm")
  cfg, share = made.config.model, len(made.row(0)["places"]) / T
  D, V, width = cfg.embed_dim, cfg.vocab_size, cfg.num_heads * cfg.head_dim
  # A query, what attention makes, and the MLP; scores of contents and of distances, and the sum of values.
  stream = 6 * cfg.num_layers * (2 * D * width + 2 * D * cfg.mlp_dim + 3 * T * width)
  assert objectives.flops_per_token(made.config) - metrics.flops_per_token(cfg, T) == pytest.approx(
      share * stream - (1 - share) * 6 * D * V)


@pytest.mark.parametrize("name", ["span_corruption", "mixture_of_denoisers"])
def test_a_decoder_writes_what_is_missing(task, name):
  made = task("t5", seq_len=T, name=name)
  row = made.row(0)
  S, written = len(row["encoder_inputs"]), len(row["inputs"])
  assert S == T != written
  assert objectives.flops_per_token(made.config) == metrics.flops_per_example(made.config.model, S, written) / T
  linear = objectives.linear_flops_per_token(made.config)
  assert linear < objectives.flops_per_token(made.config)
  assert (linear < metrics.linear_flops_per_token(made.config.model)) == (written < T)


def test_a_text_is_written_as_long_as_its_task_has_it(labelled):
  task = dict(name="write", kind="text_to_text", text="{text}", target="{text}", max_target_tokens=6)
  made = labelled(("t5", {}), [task], [[dict(text="abc")] * 20], seq_len=T, name="text_to_text")
  assert len(made.row(0)["targets"]) == 6
  assert objectives.flops_per_token(made.config) == metrics.flops_per_example(made.config.model, T, 6) / T


def test_each_choice_is_read_with_the_text(labelled):
  task = dict(name="choose", kind="multiple_choice", text="{text}", choices=("{text}", "b", "c"), label="label")
  made = labelled(("bert", dict(head="choice")), [task], [[dict(text="a", label=1)] * 20], seq_len=T,
                  name="multiple_choice")
  assert made.row(0)["inputs"].shape == (3, T)
  assert objectives.flops_per_token(made.config) == 3 * metrics.flops_per_token(made.config.model, T)


@pytest.mark.parametrize("name", ["causal_lm", "prefix_lm"])
def test_all_tokens_of_a_decoder_are_projected(task, name):
  made = task("llama", seq_len=T, name=name)
  assert objectives.flops_per_token(made.config) == metrics.flops_per_token(made.config.model, T)
