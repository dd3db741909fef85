"""Adapters: what a merged model computes is what separate ones do, they alone learn, and no split changes them."""

import contextlib
import dataclasses
import functools
import math
import types

from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import checkpoint, loop, metrics, partitioning, train
from lmjax import config as config_lib
from lmjax.config import CheckpointConfig, MeshConfig, OptimConfig, UserError, base_config, from_config_dict
from lmjax.models import families
from lmjax.models.layers import Einsum
from lmjax.models.transformer import init_params, make_model
from lmjax.optim import lora
from lmjax.optim.gates import join, make_gates

FAST = {"xla_backend_optimization_level": 0}  # Compiling is most of the time.
OPTIM = OptimConfig(lora_rank=3, lora_alpha=6.0, lora_targets=r"attention/(query|out)/|mlp/(up|down)/kernel|^head/")
flat_of = functools.partial(flax.traverse_util.flatten_dict, sep="/")
tree_of = functools.partial(flax.traverse_util.unflatten_dict, sep="/")


def model_of(family, **changes):
  """Returns a small model, and random parameters with adapters: b of zero would hide a mistake."""
  config = base_config()
  config.train.num_steps, config.data.seq_len = 1, 16
  config.model.update({**families.debug(families.preset(family)), **changes})
  model = make_model(config_lib.resolve_model(from_config_dict(config), 64).model)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  boxed = {**boxed, **jax.eval_shape(lambda: lora.init(boxed, OPTIM, jax.random.key(0)))}
  random = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: (0.2 * random.normal(size=x.shape)).astype(np.float32), nn.unbox(boxed))


# By hand.


def test_each_layer_and_expert_gets_its_own_product():
  _, params = model_of("mixtral")
  base, adapters = flat_of(lora.without(params)), flat_of(params["lora"])
  merged = flat_of(lora.merge(params, OPTIM))
  changed = {"layers/attention/query/kernel", "layers/attention/out/kernel", "layers/mlp/up/kernel",
             "layers/mlp/down/kernel", "head/kernel"}
  assert {path.rpartition("/")[0] for path in adapters} == changed and merged.keys() == base.keys()
  for path, kernel in base.items():
    if path not in changed:
      np.testing.assert_array_equal(merged[path], kernel)
      continue
    a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
    each = 2 if "mlp" in path else 1 if "layers" in path else 0
    for place in np.ndindex(*kernel.shape[:each]):
      product = 2.0 * (a[place].reshape(-1, 3) @ b[place].reshape(3, -1))
      product = product.T if path == "head/kernel" else product
      np.testing.assert_allclose(merged[path][place], kernel[place] + product.reshape(kernel[place].shape), atol=1e-6)


def test_adapters_start_as_peft_makes_them():
  model, params = model_of("llama")
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  start = flat_of(nn.unbox(lora.init(boxed, OPTIM, jax.random.key(0))["lora"]))
  inputs = {"layers/attention/query/kernel": 64, "layers/attention/out/kernel": 64, "layers/mlp/down/kernel": 128}
  for path, count in inputs.items():
    a = np.asarray(start[f"{path}/a"])
    assert 0.95 / math.sqrt(count) < np.abs(a).max() <= 1 / math.sqrt(count)
    assert a.std() == pytest.approx(1 / math.sqrt(3 * count), rel=0.1) and not np.any(start[f"{path}/b"])
  assert not np.array_equal(start["layers/attention/query/kernel/a"][0], start["layers/attention/query/kernel/a"][1])
  same = lora.merge({**lora.without(params), "lora": tree_of(start)}, OPTIM)
  jax.tree.map(np.testing.assert_array_equal, same, lora.without(params))


def test_a_pattern_that_matches_no_kernel_is_told():
  model, _ = model_of("llama")
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  for pattern in ("attn/q_proj", "attention_norm"):
    with pytest.raises(UserError, match="lora_targets is '.*', which matches no kernel; they are: .*attention/query/"):
      lora.init(boxed, OptimConfig(lora_rank=2, lora_targets=pattern), jax.random.key(0))
  config = base_config()
  config.train.num_steps, config.optim.lora_targets = 1, "("
  with pytest.raises(UserError, match="config.optim.lora_targets is '\\(', which is not a regex"):
    from_config_dict(config)


# Against adapters that stay apart from the kernels. One layer, for a module inside the scan knows not which it is.


@contextlib.contextmanager
def apart(adapters):
  """Adds scale * (x A) B to what a linear map returns, and leaves its kernel alone."""
  used = set()

  def call(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    path = "/".join(context.module.path)
    if not isinstance(context.module, Einsum) or f"{path}/kernel/a" not in adapters:
      return y
    used.add(path)
    a, b = (adapters[f"{path}/kernel/{name}"] for name in "ab")
    a, b = (x[0] if "layers" in path else x for x in (a, b))
    x = args[0]
    inner = x.reshape(*x.shape[:-(a.ndim - 1)], -1) @ a.reshape(-1, 3)
    return y + 2.0 * (inner @ b.reshape(3, -1)).reshape(*inner.shape[:-1], *b.shape[1:])

  with nn.intercept_methods(call):
    yield used


@pytest.mark.parametrize("family, num_maps", [("llama", 4), ("bert", 4), ("t5", 10), ("mixtral", 2)])
def test_merged_equals_unmerged(family, num_maps):
  depth = dict(num_layers=1, num_decoder_layers=1) if family == "t5" else dict(num_layers=1)
  model, params = model_of(family, **depth, **(dict(head="lm", pooler="none") if family == "bert" else {}))
  adapters = flat_of(params["lora"])
  # Those of experts, which are no maps of their own, and of the head, by hand above.
  adapters = {path: x for path, x in adapters.items() if not path.startswith("head/")
              and not (family == "mixtral" and "mlp" in path)}
  params = {**lora.without(params), "lora": tree_of(adapters)}
  tokens = np.random.default_rng(1).integers(0, 64, (2, 12))
  inputs = (tokens, tokens[:, :7]) if family == "t5" else (tokens,)
  run = lambda params: jax.jit(lambda p: model.apply({"params": p}, *inputs), compiler_options=FAST)(params)
  merged = run(lora.merge(params, OPTIM))
  with apart(adapters) as used:
    unmerged = run(lora.without(params))
  assert len(used) == num_maps
  scale = float(np.abs(unmerged).max())
  np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-5 * max(1, scale))
  assert np.abs(merged - run(lora.without(params))).max() > 0.05 * scale


# In training.


def _of_texts(model, params, batch, cfg, rngs=None):
  """An objective for encoder-decoders, which answer a text with itself."""
  logits = model.apply({"params": params}, batch["inputs"], batch["inputs"])
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
  sums = {"loss": jnp.sum(nll * batch["weights"]), "weight": jnp.sum(batch["weights"])}
  return sums["loss"], sums


# The family, its objective, and eight devices.
TRAINED = {
    "llama": ({}, "causal_lm", dict(data=2, fsdp=2, tensor=2)),
    "bert": (dict(head="lm", pooler="none"), "masked_lm", dict(data=2, fsdp=2, tensor=2)),
    "t5": ({}, "causal_lm", dict(data=2, fsdp=2, tensor=2)),
    "mixtral": ({}, "causal_lm", dict(data=2, expert=4)),
}


def setup_of(family, mesh=None, **optim):
  changes, objective, _ = TRAINED[family]
  config = base_config()
  config.model.update({**families.debug(families.preset(family)), **changes, "dtype": "float32"})
  config.data.seq_len, config.objective.name = 16, objective
  config.train.update(num_steps=10, batch_size=8, ema_decay=optim.pop("ema_decay", 0.0))
  # Without an optimizer's own scale, a step changes no more than rounding does what rounding changes.
  config.optim.update({"name": "sgd", "momentum": 0.9, "clip_norm": None, "weight_decay": 0.0, "lora_rank": 3,
                       "lora_targets": OPTIM.lora_targets, "freeze_policy": (), **optim})
  config = config_lib.resolve_model(from_config_dict(config), 64)
  mesh = {"data": 1, **(mesh or {})}
  setup = train.build(config, partitioning.make_mesh(MeshConfig(**mesh), jax.devices()[:math.prod(mesh.values())]))
  return setup._replace(objective=types.SimpleNamespace(loss=_of_texts)) if family == "t5" else setup


def batch_of(family):
  random = np.random.default_rng(2)
  tokens, length = random.integers(0, 64, (8, 17)).astype(np.int32), 6 if family == "bert" else 16
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:length + 1],
           "weights": (random.random((8, length)) < np.linspace(0.2, 1, 8)[:, None]).astype(np.float32)}
  if family == "bert":
    zeros = np.zeros((8, 16), np.int32)
    batch |= {"places": np.tile(np.arange(0, 12, 2, dtype=np.int32), (8, 1)), "token_types": zeros,
              "segment_ids": zeros + 1}
  return batch


def steps(setup, state, count, batch, compiled=None):
  """Returns the states after each step, on the host, what the steps report, and the compiled step."""
  hparams = {"learning_rate": np.float32(0.3), "weight_decay": np.float32(0), "seed": np.uint32(0)}
  states, outs = [], []
  with partitioning.use_mesh(setup.mesh):
    for _ in range(count):
      args = state, partitioning.global_batch(setup.mesh, batch, 8), hparams
      compiled = compiled or train.make_train_step(setup).lower(*args).compile(FAST)
      state, out = compiled(*args)
      states.append(jax.device_get(state))
      outs.append({name: float(value) for name, value in out.items()})
  return states, outs, compiled


@pytest.fixture(scope="module", params=TRAINED)
def trained(request):
  """Returns (family, setup, the initial state and those after each of three steps, what the steps report)."""
  setup = setup_of(request.param)
  first = jax.device_get(train.init_state(setup))
  states, outs, _ = steps(setup, jax.device_put(first, setup.state_shardings), 3, batch_of(request.param))
  return request.param, setup, [first, *states], outs


def test_a_step_is_one_of_the_merged_model_and_the_first_of_the_model_as_it_was(trained):
  family, setup, states, outs = trained
  loss = jax.jit(lambda params: setup.objective.loss(setup.model, params, batch_of(family), setup.config.objective)[0],
                 compiler_options=FAST)
  weight = batch_of(family)["weights"].sum()
  assert outs[0]["loss"] == pytest.approx(float(loss(lora.without(states[0].params))) / weight, rel=1e-5)
  merged = loop.eval_params(setup, states[2])
  assert outs[2]["loss"] == pytest.approx(float(loss(merged)) / weight, rel=1e-5)
  assert outs[2]["loss"] < outs[0]["loss"] - 1e-4


def test_adapters_alone_learn_and_have_a_state(trained):
  _, setup, states, _ = trained
  before, after = flat_of(states[0].params), flat_of(states[3].params)
  assert before.keys() == after.keys() and any(path.startswith("lora/") for path in before)
  for path, old in before.items():
    assert np.array_equal(old, after[path]) != path.startswith("lora/"), path
  adapters = jax.tree.leaves(states[0].params["lora"])
  held = [leaf.shape for leaf in jax.tree.leaves(states[0].opt_state) if leaf.size > 1]
  assert sorted(held) == sorted(leaf.shape for leaf in adapters)


def test_eight_devices_train_the_same_adapters(trained):
  family, _, states, outs = trained
  setup = setup_of(family, TRAINED[family][2])
  split, split_outs, _ = steps(setup, jax.device_put(states[0], setup.state_shardings), 3, batch_of(family))
  for one, other in zip(outs, split_outs):
    assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
  one, other = (flat_of(x[-1].params["lora"]) for x in (states, split))
  scale = max(np.abs(leaf).max() for leaf in one.values())
  for path, leaf in one.items():
    np.testing.assert_allclose(other[path], leaf, rtol=0, atol=1e-5 * max(1, scale), err_msg=path)
  kernel = setup.state_shardings.params["lora"]["layers" if family != "t5" else "encoder"]
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(kernel))


def test_initial_adapters_do_not_depend_on_the_mesh():
  one, eight = (train.init_state(setup_of("llama", mesh)) for mesh in (None, dict(data=1, fsdp=4, tensor=2)))
  assert metrics.digest(one.params) == metrics.digest(eight.params)


def test_a_run_goes_on_exactly_and_its_parameters_are_read_merged(tmp_path):
  setup = setup_of("llama", name="adamw", ema_decay=0.9)
  batch = batch_of("llama")
  states, _, step = steps(setup, train.init_state(setup), 4, batch)
  two = jax.device_put(states[1], setup.state_shardings)
  with contextlib.closing(checkpoint.Checkpointer(tmp_path, CheckpointConfig())) as checkpointer:
    checkpointer.save(2, two, {"config": dataclasses.asdict(setup.config)})
    checkpointer.wait()
    restored, _ = checkpointer.restore(setup.state_shapes)
  count = metrics.count_params(states[0].params["lora"])
  assert metrics.count_params(states[0].ema) == count < metrics.count_params(states[0].opt_state) < 2 * count + 9
  went_on, _, _ = steps(setup, restored, 2, batch, step)
  assert metrics.digest(went_on[-1]) == metrics.digest(states[-1])
  of_model = lora.without(setup.state_shapes.params)
  for prefers, expected in ((True, join(states[1].ema, states[1].params)), (False, states[1].params)):
    read = checkpoint.restore_params(tmp_path, of_model, prefer_ema=prefers)
    jax.tree.map(np.testing.assert_array_equal, read, jax.device_get(lora.merge(expected, setup.config.optim)))
    apart = checkpoint.restore_params(tmp_path, setup.state_shapes.params, prefer_ema=prefers)
    jax.tree.map(np.testing.assert_array_equal, apart, expected)


def test_a_policy_may_let_more_learn():
  boxed = jax.eval_shape(lambda: init_params(model_of("llama")[0], jax.random.key(0)))
  cfg = dataclasses.replace(OPTIM, freeze_policy=(("final_norm", 0), ("lora/layers/mlp", -1)))
  boxed = {**boxed, **jax.eval_shape(lambda: lora.init(boxed, cfg, jax.random.key(0)))}
  frozen = flat_of(make_gates(cfg, partitioning.logical_axes(boxed), nn.unbox(boxed)).frozen)
  learned = {path.removesuffix("/a").removesuffix("/b") for path, never in frozen.items() if not never}
  assert learned == {"final_norm/scale", "lora/layers/attention/query/kernel", "lora/layers/attention/out/kernel"}


def test_muon_takes_adapters_as_matrices():
  setup = setup_of("llama", name="muon")
  state = jax.tree_util.tree_leaves_with_path(setup.state_shapes.opt_state)
  of_muon = [path for path, leaf in state if "'muon'" in jax.tree_util.keystr(path) and leaf.ndim > 1]
  assert len(of_muon) == len(jax.tree.leaves(setup.state_shapes.params["lora"]))
