"""Every family at its debug size: it trains, goes on exactly from a checkpoint, and transformers computes the same."""

import json
import shutil

import jax
import numpy as np
import pytest

import lmjax
from lmjax import partitioning, train
from lmjax.commands.experiment import apply_overrides, load_experiment
from lmjax.config import from_config_dict
from lmjax.models import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SETTINGS = ("train.num_steps=5", "train.sample_length=0", "optim.warmup_steps=1", "checkpoint.every_steps=3",
            "checkpoint.keep_last=2", "eval.num_batches=1", "eval.final_num_batches=1", "tracking.tensorboard=false")
# transformers has no model with these options.
OURS_ALONE = ("gpt3", "transformer")


def inputs_of(model, tokens):
  return (tokens[:, :40], tokens[:, 40:]) if model.cfg.architecture == "encoder_decoder" else (tokens,)


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
  """Compiling is most of the time here, and optimising most of that."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(texts, debug, monkeypatch):
  """Returns a function from a family and a workdir to what training there ends with, on one device."""
  make_mesh = partitioning.make_mesh
  monkeypatch.setattr(partitioning, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))

  def run(family, workdir, *settings):
    config = load_experiment(f"{debug.removeprefix('--config=')}:{family}")
    apply_overrides(config, [*SETTINGS, f"data.source={texts}/notes/*.txt", *settings])
    config = from_config_dict(config)
    return train.train_and_evaluate(config, str(workdir))
  return run


def goes_on_exactly(run, folder, family, *settings):
  """Returns the workdir of a run that went on from step 3, after comparing it with an unbroken one."""
  whole = run(family, folder / "whole", *settings)
  assert whole["status"] == "finished" and np.isfinite(whole["train_loss"]) and np.isfinite(whole["eval_loss"])
  broken = folder / "broken"
  shutil.copytree(folder / "whole", broken)
  shutil.rmtree(broken / "checkpoints" / "5")
  (broken / "result.json").unlink()
  again = run(family, broken, *settings)
  assert (again["params_sha256"], again["train_loss"]) == (whole["params_sha256"], whole["train_loss"])
  return broken


# What the families above do not learn by; labelled tasks are in test_tasks.py.
@pytest.mark.slow
@pytest.mark.parametrize("family, objective, settings", [
    ("llama", "multi_token", ("model.num_future=2",)), ("llama", "prefix_lm", ("model.dropout=0.1",)),
    ("llama", "fill_in_the_middle", ()), ("t5", "mixture_of_denoisers", ())])
def test_every_other_objective_goes_on_exactly(family, objective, settings, run, tmp_path):
  workdir = goes_on_exactly(run, tmp_path, family, f"objective.name={objective}", *settings)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  # The first term of multi_token is the cost of all of the text, as that of causal_lm.
  assert ("validation/bits_per_byte" in last) == (objective == "multi_token")


# ELECTRA's discriminator learns beside its generator.
@pytest.mark.parametrize("family", [name for name in families.PRESETS if name != "electra"])
def test_it_trains_goes_on_exactly_and_goes_out(family, run, tmp_path):
  broken = goes_on_exactly(run, tmp_path, family)
  if family in OURS_ALONE:
    return
  model, params = lmjax.load(broken)
  lmjax.save_hf(model, params, tmp_path / "out")
  tokens = np.random.default_rng(0).integers(3, 257, (2, 64))  # Without any that is padding somewhere.
  expected = outputs_of_transformers(tmp_path / "out", [torch.tensor(x) for x in inputs_of(model, tokens)])
  got = jax.tree.leaves(model.apply({"params": params}, *inputs_of(model, tokens)))
  assert len(got) == len(expected)
  for one, other in zip(got, expected):
    scale = max(1.0, np.abs(other).max())
    np.testing.assert_allclose(one, other.reshape(one.shape), rtol=0, atol=1e-4 * scale)


def outputs_of_transformers(folder, inputs):
  """Returns the logits of the class that a folder's config.json names."""
  kind = json.loads((folder / "config.json").read_text())["architectures"][0]
  model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()
  with torch.no_grad():
    out = model(inputs[0], decoder_input_ids=inputs[1]) if len(inputs) == 2 else model(inputs[0])
  return [value.numpy() for name, value in out.items() if "logits" in name]
