"""What XLNet must keep: no target sees itself, segments with a memory are one text, and the same numbers on a mesh."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import metrics, partitioning
from lmjax.config import MeshConfig, ModelConfig, UserError
from lmjax.config_checks import check_objective
from lmjax.models import families, xlnet
from lmjax.models.transformer import init_params, make_model

V = 50
BASE = ModelConfig(**{**families.xlnet(), "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 64,
                      "vocab_size": V, "dtype": "float32"})
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def random_params(cfg):
  """Returns parameters that are random in biases and norms too."""
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(make_model(cfg), jax.random.key(0))))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def make(**changes):
  cfg = dataclasses.replace(BASE, **changes)
  return make_model(cfg), random_params(cfg)


@functools.partial(jax.jit, static_argnames=("model", "method"), compiler_options=FAST)
def apply(model, params, x, method="__call__", rngs=None, **inputs):
  return model.apply({"params": params}, x, method=method, rngs=rngs, **inputs)


def tokens(rows=2, length=12, seed=1):
  return np.random.default_rng(seed).integers(0, V, (rows, length))


def hidden_by(order):
  """Returns hidden_TT of a permutation: the tokens at the places of `order` are predicted in that order."""
  rank = np.argsort(order)
  return rank[:, None] <= rank[None]


def inputs(rows=2, length=12, seed=2):
  """Returns a permutation, three targets, token types and padding."""
  rng = np.random.default_rng(seed)
  orders = [rng.permutation(length) for _ in range(rows)]
  segment_ids = np.ones((rows, length), np.int32)
  segment_ids[0, -2:] = 0
  return dict(hidden_BTT=np.stack([hidden_by(order) for order in orders]),
              targets_BP=np.stack([order[-3:] for order in orders]), segment_ids_BT=segment_ids,
              token_types_BT=rng.integers(0, 2, (rows, length)))


def dependence(model, params, **inputs):
  """Returns rows of "1" and "0": which of six different input tokens the logits of each output depend on."""
  mix = jax.random.normal(jax.random.key(1), (V,))

  def outputs(table):  # The gradient of row s of the embedding is that of input s; the projection is another table.
    own = {**params, "embed": {"embedding": table}}
    return model.apply({"params": own}, jnp.arange(6)[None], **inputs)[0] @ mix

  grads = np.asarray(jax.jit(jax.jacrev(outputs), compiler_options=FAST)(params["embed"]["embedding"]))[:, :6]
  return ["".join("1" if part.any() else "0" for part in row) for row in grads]


@pytest.mark.parametrize("changes, inputs, table", [
    ({}, {}, ["111111"] * 6),
    (dict(unidirectional=True), {}, ["100000", "110000", "111000", "111100", "111110", "111111"]),
    # A token sees itself and those before it in the order 4, 0, 2, 5, 1, 3.
    ({}, dict(hidden_BTT=[4, 0, 2, 5, 1, 3]), ["100010", "111011", "101010", "111111", "000010", "101011"]),
    ({}, dict(segment_ids_BT=[0, 1, 1, 1, 0, 0]), ["111100", "011100", "011100", "011100", "011110", "011101"]),
    ({}, dict(segment_ids_BT=[1, 1, 2, 2, 2, 0]), ["110000", "110000", "001110", "001110", "001110", "111111"]),
    # A target sees those before it and not itself; place 4, the first in order, is told nothing.
    ({}, dict(hidden_BTT=[4, 0, 2, 5, 1, 3], targets_BP=[3, 1, 0, 2]), ["111011", "101011", "000010", "100010"]),
    (dict(unidirectional=True), dict(targets_BP=[1, 5], hidden_BTT=[0, 1, 2, 3, 4, 5]), ["100000", "111110"]),
])
def test_logits_depend_on_exactly_what_may_be_seen(changes, inputs, table):
  # Two layers: what is hidden must not come round by another token either.
  model, params = make(tie_embeddings=False, **changes)
  inputs = {name: jnp.array([hidden_by(value) if name == "hidden_BTT" else value]) for name, value in inputs.items()}
  assert dependence(model, params, **inputs) == table


def test_which_keys_are_seen_beside_a_memory():
  see = lambda **changes: xlnet.which_are_seen(
      dataclasses.replace(BASE, **changes), 4, 3, jnp.array([[1, 1, 1, 0]]),
      jnp.array([[[False, True, False, False]] * 4]))
  rows = lambda sees: ["".join("01"[int(x)] for x in row) for row in sees[0]]
  content, query = see()
  assert rows(query) == ["1111010"] * 4
  assert rows(content) == ["1111010", "1111110", "1111010", "1111011"]
  content, query = see(unidirectional=True)
  assert rows(query) == ["1111000", "1111000", "1111010", "1111010"]
  content, query = see(unidirectional=True, memory_same_len=True)
  assert rows(query) == ["1111000", "0111000", "0011010", "0001010"]
  assert rows(content) == ["1111000", "0111100", "0011010", "0001011"]


def test_a_row_without_a_memory_sees_none():
  model, params = make()
  x, before = tokens(rows=4), tokens(rows=4, seed=7)
  run = lambda **given: apply(model, params, x, "masked_outputs", targets_BP=np.array([[1, 5]] * 4), **given)[0]
  got = run(before_BT=before, has_before_B=np.array([1, 0, 1, 0]))
  np.testing.assert_allclose(got[::2], run(before_BT=before)[::2], atol=1e-5)
  np.testing.assert_allclose(got[1::2], run()[1::2], atol=1e-5)
  assert float(jnp.abs(run(before_BT=before) - run()).max()) > 1e-2


def test_shift_picks_the_score_of_each_distance():
  T, S = 3, 5
  distances = np.arange(S, -T, -1)
  picked = xlnet.shift(jnp.broadcast_to(distances, (1, 1, T, S + T)), S)[0, 0]
  expected = (np.arange(T) + S - T)[:, None] - np.arange(S)
  np.testing.assert_array_equal(picked, expected)
  one_way = xlnet.shift(jnp.broadcast_to(distances[:S + 1], (1, 1, T, S + 1)), S)[0, 0]
  np.testing.assert_array_equal(np.where(expected >= 0, one_way, 0), np.where(expected >= 0, expected, 0))


def test_encoded_distances():
  cfg = dataclasses.replace(BASE, embed_dim=4, reverse_half=True, distance_clamp=3)
  got = xlnet.encode_distances(cfg, 2, 5)
  angles = np.array([3, 3, 3, 2, 1, 0, -1])[:, None] * np.array([1, 0.01])
  np.testing.assert_allclose(got[0], np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=1e-6)
  np.testing.assert_allclose(got[1], np.concatenate([np.sin(-angles), np.cos(angles)], -1), atol=1e-6)


def test_segments_with_a_memory_of_all_are_one_text():
  model, params = make(unidirectional=True)
  x = tokens(length=20)
  whole, remembered = apply(model, params, x, "segment")
  memory, parts = None, []
  for part in (x[:, :7], x[:, 7:9], x[:, 9:]):
    logits, memory = apply(model, params, part, "segment", memory_LBMD=memory)
    parts.append(logits)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
  np.testing.assert_allclose(memory, remembered, atol=2e-5)
  assert float(jnp.abs(apply(model, params, x[:, 9:]) - whole[:, 9:]).max()) > 1e-2


@pytest.mark.parametrize("lengths, expected", [
    (dict(), [0, 1, 2, 3, 4, 5, 6]), (dict(memory_len=3), [4, 5, 6]), (dict(memory_reuse_len=2), [0, 1, 2, 3, 4]),
    (dict(memory_len=3, memory_reuse_len=2), [2, 3, 4])])
def test_what_is_remembered(lengths, expected):
  cfg, x = dataclasses.replace(BASE, **lengths), jnp.arange(3.0, 7)[None, :, None]
  assert xlnet.remember(cfg, x, jnp.arange(3.0)[None, :, None])[0, :, 0].tolist() == expected
  first = [at - 3 for at in expected if at >= 3] if "memory_len" not in lengths else None
  if first:
    assert xlnet.remember(cfg, x, None)[0, :, 0].tolist() == [3 + at for at in first]


def test_no_gradient_flows_through_a_memory():
  model, params = make()
  def loss(table, remembering):
    own = {**params, "embed": {"embedding": table}}
    memory = model.apply({"params": own if remembering else params}, jnp.arange(4)[None], method="segment")[1]
    return model.apply({"params": own}, jnp.arange(10, 14)[None], memory_LBMD=memory)[..., 20].sum()
  grad = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=FAST)
  grads = [grad(params["embed"]["embedding"], remembering) for remembering in (True, False)]
  assert float(jnp.abs(grads[0]).max()) > 1e-3
  np.testing.assert_array_equal(*grads)


def test_a_slot_without_target_changes_no_other_and_one_type_is_none():
  model, params = make()
  x, given = tokens(), inputs()
  run = lambda **changes: apply(model, params, x, **{**given, **changes})
  more = np.pad(given["targets_BP"], ((0, 0), (0, 2)), constant_values=-1)
  np.testing.assert_allclose(run(targets_BP=more)[:, :3], run(), atol=1e-5)
  np.testing.assert_allclose(run(token_types_BT=np.ones_like(x)), run(token_types_BT=None), atol=1e-5)
  assert float(jnp.abs(run() - run(token_types_BT=None)).max()) > 1e-2


def test_the_second_half_of_a_batch_is_read_from_end_to_start():
  (forward, params), (both, _) = make(), make(reverse_half=True)
  x = tokens(rows=4)
  got = apply(both, params, np.concatenate([x[:2], x[:2, ::-1]]))
  expected = apply(forward, params, x[:2])
  np.testing.assert_allclose(got[:2], expected, atol=1e-5)
  np.testing.assert_allclose(got[2:, ::-1], expected, atol=1e-5)
  assert float(jnp.abs(apply(forward, params, x[:2, ::-1])[:, ::-1] - expected).max()) > 1e-2


def test_which_texts_are_read_from_end_to_start_may_be_said_of_each():
  model, params = make(reverse_half=True)
  x = tokens(rows=4)
  run = lambda x, **given: apply(model, params, x, "features", **given)[0]
  got = run(x[[0, 2, 1, 3]], reversed_B=np.array([0, 1, 0, 1]))
  np.testing.assert_allclose(got[np.array([0, 2, 1, 3])], run(x), atol=1e-5)


def value_and_grads(model, params, batch):
  """Returns the loss of a batch's targets and its gradients, for everything that a batch may hold."""
  def loss(params):
    given = {name: x for name, x in batch.items() if name not in ("tokens", "answers")}
    logits = model.apply({"params": params}, batch["tokens"], **given)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["answers"][..., None], -1).mean()
  return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(params)


def batch_of(rows):
  given = inputs(rows)
  memory = 0.3 * np.random.default_rng(3).normal(size=(2, rows, 5, 32)).astype(np.float32)
  return {"tokens": tokens(rows), "answers": tokens(rows, 3, seed=4), "memory_LBMD": memory, **given}


MADE_AT_ONCE = dict(reverse_half=True, distance_clamp=4)


@functools.cache
def expected():
  return value_and_grads(*make(**MADE_AT_ONCE), batch_of(4))


def assert_same(got, atol):
  for one, other in zip(jax.tree.leaves(expected()), jax.tree.leaves(got), strict=True):
    assert float(jnp.abs(one).max()) > 0
    np.testing.assert_allclose(other, one, atol=atol)


def test_a_mesh_changes_neither_loss_nor_gradients():
  model, params = make(**MADE_AT_ONCE)
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  placed = jax.device_put(params, partitioning.param_shardings(mesh, boxed))
  query = placed["layers"]["attention"]["query"]["kernel"]
  assert query.addressable_shards[0].data.shape == (2, 16, 2, 8)
  batch = batch_of(4)
  with partitioning.use_mesh(mesh):
    rows = {name: jax.device_put(x, partitioning.batch_sharding(mesh)) for name, x in batch.items()
            if name != "memory_LBMD"}
    assert_same(value_and_grads(model, placed, {**rows, "memory_LBMD": batch["memory_LBMD"]}), 1e-5)


def test_loops_and_rematerialisation_change_no_gradient():
  model, params = make(**MADE_AT_ONCE)
  unrolled = make_model(dataclasses.replace(model.cfg, remat_policy="full", scan_layers=False))
  assert_same(value_and_grads(unrolled, params, batch_of(4)), 1e-6)


def test_dropout_is_on_exactly_when_a_key_is_given():
  model, params = make(dropout=0.5)
  run = lambda **kw: apply(model, params, tokens(), targets_BP=np.array([[1], [2]]), **kw)
  np.testing.assert_array_equal(run(), run())
  first, second = (run(rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
  assert float(jnp.abs(first - second).max()) > 1e-2


def test_half_precision_follows_float32():
  model, params = make()
  half = make_model(dataclasses.replace(BASE, dtype="bfloat16"))
  given = inputs()
  exact = apply(model, params, tokens(), **given)
  rounded, memory = apply(half, params, tokens(), "segment", **given)
  assert rounded.dtype == jnp.float32 and memory.dtype == jnp.bfloat16
  assert 0 < float(jnp.abs(rounded - exact).max()) < 0.1


@pytest.mark.parametrize("size, count", [("base", 116_750_336), ("large", 360_300_800)])
def test_presets_have_the_released_sizes(size, count):
  config = config_lib.base_config()
  config.model.update(families.xlnet(size))
  config.train.num_steps = 1
  config = config_lib.from_config_dict(config)
  model = make_model(config_lib.resolve_model(config, 32000).model)
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
  assert metrics.count_params(shapes) == count


def test_flops_are_six_for_each_parameter_that_multiplies_and_three_products_of_attention():
  cfg = make_model(BASE).cfg
  params = random_params(BASE)
  layers = params["layers"]
  multiplied = [layers["attention"][name]["kernel"] for name in ("query", "key", "value", "out")]
  multiplied += [layers["mlp"][name]["kernel"] for name in ("up", "down")] + [params["embed"]["embedding"]]
  matrices = 6 * metrics.count_params(multiplied)
  # Forward, a query and a key: 2 * 32 for their score, for that of their distance, and for the value; two layers.
  assert metrics.flops_per_token(cfg, 10) == matrices + 3 * 2 * 3 * 64 * 10
  one_way = dataclasses.replace(cfg, unidirectional=True)
  assert metrics.flops_per_token(one_way, 10) == matrices + 3 * 2 * 3 * 64 * 5.5


@pytest.mark.parametrize("changes, told", [
    (dict(block="pre"), "config.model.block is 'pre', which config.model.architecture xlnet does not do; set it to "
     "'post'"),
    (dict(position="rotary"), "config.model.position is 'rotary', which"),
    (dict(attention_window=4), "config.model.attention_window is 4, which"),
    (dict(qk_norm="head"), "config.model.qk_norm is 'head', which"),
    (dict(num_experts=4, mlp_bias=False), "config.model.num_experts is 4, which"),
    (dict(scale_logits=True), "config.model.scale_logits is True, which"),
    (dict(num_kv_heads=2), "config.model.num_kv_heads is 2, but in config.model.architecture xlnet it is num_heads"),
    (dict(head="span"), "config.model.head is span, which config.model.architecture xlnet does not have"),
    (dict(memory_same_len=True), "set config.model.unidirectional, or memory_same_len to False"),
    (dict(architecture="decoder", memory_len=4), "config.model.memory_len is 4, which config.model.architecture "
     "decoder does not do; set it to None")])
def test_what_xlnet_does_not_do_is_named(changes, told):
  config = config_lib.base_config()
  config.model.update({**families.xlnet(), **changes})
  config.train.num_steps = 1
  with pytest.raises(UserError) as error:
    config_lib.from_config_dict(config)
  assert told in str(error.value)


@pytest.mark.parametrize("model", [families.xlnet(), dict(architecture="encoder"), dict(head="none")])
def test_causal_language_modelling_needs_a_decoder_of_tokens(model):
  config = config_lib.base_config()
  config.model.update(model)
  config.train.num_steps = 1
  with pytest.raises(UserError, match="causal_lm, which predicts each token from those before it, but config.model."):
    check_objective(config_lib.from_config_dict(config))
