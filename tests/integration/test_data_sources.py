"""Every kind of source trains with every kind of tokenizer, one setting changed; the numbers are those of the text."""

import json
import math

import pytest

from lmjax import train
from lmjax.commands.experiment import apply_overrides, load_experiment
from lmjax.config import from_config_dict
from lmjax.data.tokenizer import Tokenizer

SOURCES = {
    "txt": "{texts}/notes/*.txt",
    "jsonl": "{texts}/records.jsonl",
    "parquet": "{texts}/records.parquet",
    "tfds": "{texts}/lmjax_text/1.0.0",
    "mixture": "{texts}/notes/*.txt,{texts}/records.jsonl",
}
TOKENIZERS = {"bytes": "bytes", "bpe": "bpe", "file": "{texts}/tokenizer.json"}
RESULT_KEYS = {
    "status", "num_params", "num_params_non_embedding", "num_tokens", "train_flops", "train_loss", "eval_loss",
    "bits_per_byte", "tokens_per_second", "mfu", "params_sha256", "versions", "device_kind"}


@pytest.fixture
def run(tmp_path, texts, debug):
  """Returns a function from overrides of experiments/debug.py to (result, final evaluation, workdir)."""
  def run(*overrides):
    config = load_experiment(debug.removeprefix("--config="))
    # One vocabulary for all, so that a compiled program serves all.
    apply_overrides(config, ["model.vocab_size=512", "data.tokenizer_vocab_size=300", "train.num_steps=3",
                             "optim.warmup_steps=1", "train.sample_length=0", "eval.final_num_batches=None",
                             *(override.format(texts=texts) for override in overrides)])
    workdir = tmp_path / "run"
    result = train.train_and_evaluate(from_config_dict(config), str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return result, lines[-1], workdir
  return run


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_trains_with_a_tokenizer(run, source, tokenizer):
  result, evaluation, workdir = run(f"data.source={SOURCES[source]}", f"data.tokenizer={TOKENIZERS[tokenizer]}")
  assert result == json.loads((workdir / "result.json").read_text())
  assert RESULT_KEYS <= result.keys()
  assert (result["status"], result["step"], result["num_tokens"]) == ("finished", 3, 3 * 8 * 64)
  names = ["validation/notes", "validation/records"] if source == "mixture" else ["validation"]
  expected = {f"{name}/{key}" for name in names for key in ("loss", "perplexity", "bits_per_byte", "accuracy")}
  assert evaluation.keys() == {"step"} | expected
  assert (result["eval_loss"], result["bits_per_byte"]) == (evaluation[f"{names[0]}/loss"],
                                                           evaluation[f"{names[0]}/bits_per_byte"])
  for name in names:
    assert 2 < evaluation[f"{name}/loss"] < math.log(512) + 0.2
    assert evaluation[f"{name}/perplexity"] == pytest.approx(math.exp(evaluation[f"{name}/loss"]))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bits_per_byte_by_hand(run, texts, tokenizer):
  """A set of one document whose bytes and tokens are counted here: its tokens and one that ends it are predicted."""
  _, evaluation, workdir = run(
      "data.source={texts}/records.jsonl", f"data.tokenizer={tokenizer}", "eval.sets=other={texts}/notes/0.txt")
  text = (texts / "notes" / "0.txt").read_bytes()
  num_tokens = len(Tokenizer.from_file(workdir / "tokenizer.json").encode(text.decode())) + 1
  assert num_tokens == len(text) + 1 if tokenizer == "bytes" else num_tokens < 0.9 * len(text)
  bits = num_tokens * evaluation["other/loss"] / math.log(2)
  assert evaluation["other/bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-9)
