"""Adapters: what a merged model computes is what separate ones do, they alone learn, and no split changes them."""

import contextlib
import functools
import math

from flax import linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from lmjax.config import (
  OptimConfig,
  UserError,
  base_config,
  from_config_dict,
  resolve_model,
)
from lmjax.models import families
from lmjax.models.layers import Einsum
from lmjax.models.transformer import init_params, make_model
from lmjax.optim import lora

FAST = {"xla_backend_optimization_level": 0}  # Compiling is most of the time.
OPTIM = OptimConfig(lora_rank=3, lora_alpha=6.0, lora_targets=r"attention/(query|out)/|mlp/(up|down)/kernel|^head/")
flat_of = functools.partial(flax.traverse_util.flatten_dict, sep="/")
tree_of = functools.partial(flax.traverse_util.unflatten_dict, sep="/")


def model_of(family, **changes):
  """Returns a small model, and random parameters with adapters: b of zero would hide a mistake."""
  config = base_config()
  config.train.num_steps, config.data.seq_len = 1, 16
  config.model.update({**families.debug(families.preset(family)), **changes})
  model = make_model(resolve_model(from_config_dict(config), 64).model)
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
    each = kernel.shape[:{"head": 0, "layers/mlp": 2}.get(path.rpartition("/")[0].removesuffix("/up").removesuffix(
        "/down"), 1)]
    for place in np.ndindex(*each):
      product = 2.0 * (a[place].reshape(-1, 3) @ b[place].reshape(3, -1))
      product = product.T if path == "head/kernel" else product
      np.testing.assert_allclose(merged[path][place], kernel[place] + product.reshape(kernel[place].shape), atol=1e-6)


def test_adapters_start_as_peft_makes_them():
  _, params = model_of("llama")
  boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, ()), lora.without(params))
  model, _ = model_of("llama")
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
  adapters = {path: x for path, x in adapters.items() if not path.startswith("head/") and x.ndim - 2 < 3
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
