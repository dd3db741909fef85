"""Evaluation: sums over whole sets, which no batch size, mesh or padding changes, as a plain softmax gives them."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import evaluate, objectives, partitioning, train
from lmjax.config import MeshConfig, UserError
from lmjax.data import pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns (config, data, model, params): a model of random weights, and two sets of which none fills its batches."""
  folder = tmp_path_factory.mktemp("text")
  (folder / "train.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(300)))
  (folder / "other.txt").write_text("Another text, of twelve examples: " + "abc " * 80)
  config = config_lib.base_config()
  config.model.update(num_layers=1, embed_dim=32, num_heads=2, dtype="float32", init_std=0.3)
  config.data.update(source=str(folder / "train.txt"), tokenizer="bytes", seq_len=32, cache_dir=str(folder / "cache"))
  config.train.update(num_steps=1, batch_size=8)
  config.eval.sets = ("validation", f"other={folder / 'other.txt'}")
  config = config_lib.from_config_dict(config)
  data = pipeline.open_data(config)
  config = config_lib.resolve_durations(config_lib.resolve_model(config, data.tokenizer.size), data.train.num_tokens)
  setup = train.build(config, partitioning.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  return config, data, setup.model, jax.device_get(train.init_state(setup).params)


def evaluated(run, mesh, num_batches=None, batch_size=None):
  config, data, model, params = run
  if batch_size:
    group = dataclasses.replace(config.eval, batch_size=batch_size)
    config = dataclasses.replace(config, eval=group)
  num_devices = math.prod(size for size in (mesh.data, mesh.fsdp))
  mesh = partitioning.make_mesh(mesh, jax.devices()[:num_devices])
  objective = objectives.OBJECTIVES["causal_lm"]
  return dict(evaluate.Evaluator(model, objective, config, mesh, data)(params, num_batches))


def test_the_loss_is_that_of_a_plain_softmax_over_the_text(run):
  config, data, model, params = run
  token_set = data.eval_sets["other"]
  total = correct = 0.0
  for index in range(token_set.num_examples):
    example = token_set[index]
    logits = np.asarray(model.apply({"params": params}, example["inputs"][None])[0], np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    at_targets = np.take_along_axis(log_probs, example["targets"][:, None], axis=-1)[:, 0]
    total -= np.sum(at_targets * example["weights"])
    correct += np.sum((np.argmax(logits, axis=-1) == example["targets"]) * example["weights"])
  num_bytes = len("Another text, of twelve examples: " + "abc " * 80)
  num_tokens = num_bytes + 1  # The token that ends the text is predicted, too.
  found = evaluated(run, MeshConfig(data=1))
  assert found["other/loss"] == pytest.approx(total / num_tokens, rel=1e-5)
  assert found["other/perplexity"] == pytest.approx(math.exp(total / num_tokens), rel=1e-4)
  assert found["other/bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
  assert found["other/accuracy"] == pytest.approx(correct / num_tokens, rel=1e-9)


@pytest.mark.parametrize("mesh, batch_size", [(MeshConfig(data=8), None), (MeshConfig(data=2, fsdp=2), 4),
                                              (MeshConfig(data=1), 3)])
def test_neither_mesh_nor_batch_size_changes_a_number(run, mesh, batch_size):
  assert evaluated(run, mesh, batch_size=batch_size) == pytest.approx(evaluated(run, MeshConfig(data=1)), rel=1e-5)


def test_some_batches_are_fewer_examples(run):
  some, whole = (evaluated(run, MeshConfig(data=1), num_batches=n) for n in (1, None))
  assert some.keys() == whole.keys() and some["other/loss"] != whole["other/loss"]
  assert evaluated(run, MeshConfig(data=1), num_batches=100) == whole


@pytest.mark.parametrize("text, message", [
    (None, r"holds no run: it has no config\.json"),
    ("{", r"config\.json is not valid JSON"),
    ('{"modle": {}}', r"config\.json is not one that lmjax can read: .*did you mean 'model'\?"),
])
def test_a_folder_that_is_no_run(tmp_path, text, message):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=message):
    evaluate.read_config(str(tmp_path))


def test_the_config_of_a_run_comes_back_whole(run, tmp_path):
  config = run[0]
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  assert evaluate.read_config(str(tmp_path)) == config
  assert json.loads((tmp_path / "config.json").read_text())["data"]["seq_len"] == 32
