"""Parametrizations: roles against hand-written tables, factors against the papers', and no change at the base size."""

import dataclasses

from flax import linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import parametrization, partitioning
from lmjax.config import ModelConfig, OptimConfig, UserError
from lmjax.convert import hf_config
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model
from lmjax.optim import lora
from lmjax.optim.optimizer import make_optimizer
from lmjax.scaling import coordinate_check

NORMS = {"layers/attention_norm/scale": "input", "layers/mlp_norm/scale": "input", "final_norm/scale": "input"}
ATTENTION = {f"layers/attention/{name}/kernel": "hidden" for name in ("query", "key", "value", "out")}
BIASES = {f"layers/{name}/bias": "input" for name in (
    *(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp/up", "mlp/down", "attention_norm",
    "mlp_norm")}
MLP = {f"layers/mlp/{name}/kernel": "hidden" for name in ("up", "down")}
ROLES = {
    "llama": {"embed/embedding": "input", **NORMS, **ATTENTION, **MLP, "layers/mlp/gate/kernel": "hidden",
              "head/kernel": "output"},
    "gpt2": {"embed/embedding": "input", "embed/position": "input", **NORMS, **ATTENTION, **MLP, **BIASES,
             "final_norm/bias": "input"},
    "mixtral": {"embed/embedding": "input", **NORMS, **ATTENTION, **MLP, "layers/mlp/gate/kernel": "hidden",
                "layers/mlp/router/kernel": "output", "head/kernel": "output"},
    "t5": {"embed/embedding": "input",
           **{f"{side}/{name}": role for side in ("encoder", "decoder")
              for name, role in {**NORMS, **ATTENTION, **MLP, "relative/bias": "input"}.items()},
           "decoder/layers/cross_attention_norm/scale": "input",
           **{f"decoder/layers/cross_{name.removeprefix('layers/')}": "hidden" for name in ATTENTION}},
    "albert": {"embed/embedding": "input", "embed/position": "input", "embed/token_type": "input",
               "embed/norm/scale": "input", "embed/norm/bias": "input", "embed/projection/kernel": "hidden",
               "embed/projection/bias": "input", **{k: v for k, v in NORMS.items() if k != "final_norm/scale"},
               **ATTENTION, **MLP, **BIASES, "head_transform/dense/kernel": "hidden",
               "head_transform/dense/bias": "input", "head_transform/norm/scale": "input",
               "head_transform/norm/bias": "input", "head/bias": "fixed", "pretraining_head/pooler/kernel": "hidden",
               "pretraining_head/pooler/bias": "input", "pretraining_head/out/kernel": "output",
               "pretraining_head/out/bias": "fixed"},
}


def sized(family, width=64, **changes):
  config = config_lib.base_config()
  config.train.num_steps = 1
  config.data.seq_len = 16
  config.model.update(families.debug(families.preset(family)), **changes)
  model = config_lib.resolve_model(config_lib.from_config_dict(config), 128).model
  return coordinate_check.at_width(model, width, "heads")


def boxed(model, key=None):
  model = make_model(model)
  if key is None:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return jax.jit(lambda: init_params(model, key))()


@pytest.mark.parametrize("family", ROLES)
def test_roles_are_as_written_by_hand(family):
  if family == "albert":
    changes = dict(head="pretraining", pooler="tanh")
  else:
    changes = dict(tie_embeddings=family in ("gpt2", "t5"))
  axes = flatten_dict(partitioning.logical_axes(boxed(sized(family, **changes))))
  assert {"/".join(path): parametrization.role(path[-1], names) for path, names in axes.items()} == ROLES[family]


# At 4 times the width and twice the depth of the base: hand-worked from tables 3 and 8 of arXiv 2203.03466 (m = 4),
# table 1 of arXiv 2505.01618 (l = 2), and what parametrization.py says of the others.
AXES = {"input": ("embedding", ("vocab", "embed")), "hidden": ("kernel", ("layers", "embed", "mlp")),
        "output": ("kernel", ("vocab", "embed")), "fixed": ("bias", ("vocab",)),
        "router": ("kernel", ("layers", "embed", "router"))}
EXPECTED = {
    "init": dict(input=1, hidden=1 / 2, output=1 / 4, fixed=1, router=1 / 4),
    "eps": dict(input=1 / 4, hidden=1 / 8, output=1, fixed=1, router=1 / 2),
    "adamw": dict(input=1, hidden=1 / 4, output=1 / 4, fixed=1, router=1 / 4),
    "schedule_free": dict(input=1, hidden=1 / 4, output=1 / 4, fixed=1, router=1 / 4),
    "lion": dict(input=1, hidden=1 / 4, output=1 / 4, fixed=1, router=1 / 4),
    "sgd": dict(input=4, hidden=2, output=1 / 4, fixed=1, router=1 / 2),
    "adafactor": dict(input=1, hidden=1 / 2, output=1, fixed=1, router=1),
    "muon": dict(input=1, hidden=1 / 2, output=1 / 4, fixed=1, router=1 / 4),
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_factors_are_the_papers(rule):
  cfg = ModelConfig(embed_dim=256, num_layers=4, parametrization="completep", base_embed_dim=64, base_num_layers=2)
  factor = {"init": parametrization.init_factor, "eps": parametrization.eps_factor}.get(
      rule, lambda cfg, *parameter: parametrization.learning_rate_factor(cfg, rule, *parameter))
  assert {name: factor(cfg, *parameter) for name, parameter in AXES.items()} == EXPECTED[rule]


@pytest.mark.parametrize("family, optimizer", [
    ("gpt2", "adamw"), pytest.param("t5", "sgd", marks=pytest.mark.slow)])
def test_at_the_base_size_nothing_changes(family, optimizer):
  standard, completep = (start_and_step(dataclasses.replace(
      sized(family), parametrization=kind, base_embed_dim=64, base_num_layers=2), optimizer)
                         for kind in ("standard", "completep"))
  jax.tree.map(np.testing.assert_array_equal, standard, completep)


def start_and_step(cfg, optimizer):
  """Returns the initial parameters of a model and those after a step."""
  params = boxed(cfg, jax.random.key(1))
  axes, params = partitioning.logical_axes(params), nn.unbox(params)
  model = make_model(cfg)
  made = make_optimizer(OptimConfig(name=optimizer), axes, None, cfg)

  @jax.jit
  def step(params):
    loss = lambda p: jnp.square(model.apply({"params": p}, *model.dummy_inputs) - 1).mean()
    return made.update(jax.grad(loss)(params), made.init(params), params,
                       {"learning_rate": 0.1, "weight_decay": 0.1}, None)[0]

  return params, step(params)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_initial_weights_follow_the_width(family):
  """T5's are over the root of their inputs anyway, which must not count twice."""
  narrow, wide = (dataclasses.replace(sized(family, width, tie_embeddings=False, num_layers=1), parametrization="mup",
                                      base_embed_dim=64) for width in (64, 256))
  narrow, wide = (flatten_dict(nn.unbox(boxed(cfg, jax.random.key(0)))) for cfg in (narrow, wide))
  for path, weights in wide.items():
    if path[-1] == "scale":
      continue
    wanted = 1.0
    if path[-1] == "kernel":
      wanted = 0.25 if path[-2] == "head" else 0.5
    few = path[-1] == "bias"  # T5's table of buckets.
    np.testing.assert_allclose(np.std(weights) / np.std(narrow[path]), wanted, rtol=0.25 if few else 0.05)


def test_wider_heads_and_deeper_stacks():
  cfg = ModelConfig(embed_dim=256, head_dim=64, num_layers=8, parametrization="completep", base_embed_dim=64,
                    base_head_dim=16, base_num_layers=2)
  assert parametrization.attention_scale(cfg) == 16 ** 0.5 / 64
  assert parametrization.attention_scale(dataclasses.replace(cfg, attention_scale=1.0)) == 1 / 4
  assert parametrization.attention_scale(dataclasses.replace(cfg, base_head_dim=None)) is None
  assert parametrization.branch_factor(cfg) == 1 / 4
  assert parametrization.branch_factor(dataclasses.replace(cfg, parametrization="mup")) == 1
  assert parametrization.base_layers(cfg) == 2


def one_step(optimizer, width, grads, **settings):
  """Returns the change of a kernel [1, width, 2 width] by one step at learning rate 1."""
  cfg = ModelConfig(embed_dim=width, parametrization="mup", base_embed_dim=8)
  axes = {"layers": {"mlp": {"up": {"kernel": ("layers", "embed", "mlp")}}}}
  tree = lambda x: {"layers": {"mlp": {"up": {"kernel": jnp.asarray(x)}}}}
  made = make_optimizer(OptimConfig(name=optimizer, weight_decay_policy=(), **settings), axes, None, cfg)
  zeros = tree(np.zeros((1, width, 2 * width), np.float32))
  after, _ = made.update(tree(grads), made.init(zeros), zeros, {"learning_rate": 1.0, "weight_decay": 0.0}, None)
  return np.asarray(after["layers"]["mlp"]["up"]["kernel"])[0]


def test_muons_steps_have_one_norm_at_every_width():
  norms = [np.linalg.norm(one_step("muon", width, np.random.default_rng(0).normal(size=(1, width, 2 * width))), 2)
           for width in (8, 32, 128)]
  assert max(norms) / min(norms) < 1.2  # Muon's iteration makes singular values that are only about 1.


def test_adams_epsilon_falls_as_gradients_do():
  ones = np.ones((1, 8, 16), np.float32)
  narrow = one_step("adamw", 8, ones, eps=1.0)
  wide = one_step("adamw", 32, np.ones((1, 32, 64), np.float32) / 4, eps=1.0)
  np.testing.assert_allclose(wide, narrow[0, 0] / 4, rtol=1e-6)


def test_decay_is_the_same_at_every_width():
  cfg = ModelConfig(embed_dim=32, parametrization="mup", base_embed_dim=8)
  axes = {"layers": {"mlp": {"up": {"kernel": ("layers", "embed", "mlp")}}}}
  made = make_optimizer(OptimConfig(weight_decay_policy=()), axes, None, cfg)
  ones = {"layers": {"mlp": {"up": {"kernel": jnp.ones((1, 32, 64))}}}}
  after, _ = made.update(jax.tree.map(jnp.zeros_like, ones), made.init(ones), ones,
                         {"learning_rate": 0.1, "weight_decay": 0.5}, None)
  np.testing.assert_allclose(after["layers"]["mlp"]["up"]["kernel"], 0.95, rtol=1e-6)


def test_adapters_have_lora_plus_learning_rates():
  cfg = dataclasses.replace(sized("llama", 128), parametrization="mup", base_embed_dim=64)
  adapters = jax.eval_shape(lambda: lora.init(boxed(cfg), OptimConfig(lora_rank=2), jax.random.key(0)))
  for path, names in flatten_dict(partitioning.logical_axes(adapters)).items():
    factor = parametrization.learning_rate_factor(cfg, "adamw", path[-1], names)
    assert factor == {"a": 0.5, "b": 1.0}[path[-1]], path


def test_what_hugging_face_can_hold_is_written_and_the_rest_refused():
  mup = lambda family, **changes: dataclasses.replace(
      sized(family, 128, **changes), parametrization="mup", base_embed_dim=64)
  _, hf = hf_config.to_hf(mup("llama", tie_embeddings=False))
  assert hf == hf_config.to_hf(sized("llama", 128, tie_embeddings=False))[1]
  for cfg in (mup("gpt2"), mup("gemma"), dataclasses.replace(
      mup("llama", tie_embeddings=False), parametrization="completep", base_num_layers=1)):
    with pytest.raises(UserError, match=f"config.model.parametrization than '{cfg.parametrization}'"):
      hf_config.to_hf(cfg)
