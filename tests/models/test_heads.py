"""Heads and encoders: what each makes, what it must not depend on, how large the published ones are, and refusals."""

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax import metrics, partitioning
from lmjax.config import MeshConfig, ModelConfig, UserError, base_config, fill_sizes, from_config_dict, resolve_model
from lmjax.config_checks import check_objective
from lmjax.models import families
from lmjax.models.heads import mean_vector, sequence_vector
from lmjax.models.transformer import init_params, make_model

ENCODER = ModelConfig(
    architecture="encoder", num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, vocab_size=64, max_positions=32,
    block="post", embedding_norm=True, token_types=2, head_transform=True, head_bias=True, pooler="tanh", num_labels=4,
    scale_residual_init=False, dtype="float32", init_std=0.2)
FAST = {"xla_backend_optimization_level": 0}  # Compiling is most of the time.
HEADS = ("lm", "pretraining", "sentence", "replaced", "sequence", "token", "choice", "span", "pooled", "none")


def make(**changes):
  model = make_model(dataclasses.replace(ENCODER, **changes))
  init = jax.jit(lambda key: nn.unbox(init_params(model, key)), compiler_options=FAST)
  params = init(jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  return model, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def tokens(*shape, seed=1):
  return jax.random.randint(jax.random.key(seed), shape, 0, 64)


def test_the_vector_of_a_sequence_is_of_its_first_or_last_real_token():
  x = jnp.arange(2 * 4 * 1.0).reshape(2, 4, 1)
  assert sequence_vector(x, None, last=False).tolist() == [[0], [4]]
  assert sequence_vector(x, None, last=True).tolist() == [[3], [7]]
  segments = jnp.array([[1, 1, 0, 0], [0, 1, 1, 1]])
  assert sequence_vector(x, segments, last=False).tolist() == [[0], [5]]
  assert sequence_vector(x, segments, last=True).tolist() == [[1], [7]]


def test_the_mean_is_over_real_tokens_and_of_length_one():
  x = jnp.array([[[3.0, 0.0], [3.0, 8.0], [100.0, 100.0]]])
  np.testing.assert_allclose(mean_vector(x, jnp.array([[1, 1, 0]])), [[0.6, 0.8]], rtol=1e-6)
  assert float(jnp.linalg.norm(mean_vector(x, None))) == pytest.approx(1)
  assert mean_vector(x, jnp.zeros((1, 3), int)).tolist() == [[0, 0]]  # Not a number would spread.


@pytest.mark.parametrize("head", HEADS)
def test_what_stands_in_padding_changes_no_real_output(head):
  model, params = make(head=head)
  shape = (2, 3, 12) if head == "choice" else (2, 12)
  x = tokens(*shape)
  mask = jnp.ones(shape, int).at[..., 8:].set(0)
  run = jax.jit(lambda x: jax.tree.leaves(model.apply({"params": params}, x, None, mask)))
  per_token = {"lm": [64], "token": [4], "replaced": [], "none": [32]}
  for one, other in zip(run(x), run(x.at[..., 8:].add(1) % 64), strict=True):
    if one.shape[:2] == (2, 12):
      one, other = one[:, :8], other[:, :8]
    np.testing.assert_allclose(one, other, atol=1e-6)
  changed = run(x.at[..., 3].add(1) % 64)  # Where every output sees it.
  assert all(float(jnp.abs(one - other).max()) > 1e-4 for one, other in zip(run(x), changed, strict=True))
  if head in per_token:
    assert run(x)[0].shape == (2, 12, *per_token[head])


def test_an_encoder_sees_both_sides_and_a_decoder_one():
  for architecture, blocked in (("encoder", False), ("decoder", True)):
    model, params = make(architecture=architecture, head="token")
    x = tokens(1, 8)
    before, after = (model.apply({"params": params}, x.at[0, 7].set(t)) for t in (1, 2))
    assert bool((before[0, :7] == after[0, :7]).all()) is blocked


def test_positions_after_rows_of_padding_count_real_tokens():
  model, params = make(position_offset=2, head="none", pooler="none")
  x = tokens(1, 6)
  right = model.apply({"params": params}, jnp.pad(x, ((0, 0), (0, 3))), None, jnp.array([[1] * 6 + [0] * 3]))[:, :6]
  left = model.apply({"params": params}, jnp.pad(x, ((0, 0), (3, 0))), None, jnp.array([[0] * 3 + [1] * 6]))[:, 3:]
  alone = model.apply({"params": params}, x)
  np.testing.assert_allclose(right, alone, atol=1e-5)
  np.testing.assert_allclose(left, alone, atol=1e-5)


SMALL = dict(num_layers=2, num_heads=4, num_kv_heads=4, embed_dim=32, head_dim=8, mlp_dim=64, embedding_dim=32,
             vocab_size=64, max_positions=32, num_labels=4, dtype="float32", init_std=0.2)
NARROW = dict(SMALL, embedding_dim=16)


# Every family, and every head.
@pytest.mark.parametrize("preset", [
    families.bert() | SMALL, families.bert() | SMALL | dict(head="sentence"),
    families.roberta() | SMALL, families.roberta() | SMALL | dict(head="token"),
    families.albert() | NARROW, families.albert() | NARROW | dict(head="choice"),
    families.electra() | NARROW, families.electra("small-generator") | NARROW,
    families.electra() | NARROW | dict(head="none", pooler="none"),
    families.distilbert() | SMALL | dict(head="span"), families.distilbert() | SMALL | dict(head="sequence"),
    families.distilbert() | SMALL | dict(head="pooled"), families.bert() | SMALL | dict(head="none")])
def test_eight_devices_equal_one(preset):
  model = make_model(ModelConfig(**preset))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), nn.unbox(boxed))
  x = tokens(8, 2, 12) if model.cfg.head == "choice" else tokens(8, 12)
  mask = jnp.ones(x.shape, int).at[1, ..., 8:].set(0)
  types = tokens(*x.shape, seed=5) % model.cfg.token_types if model.cfg.token_types else None

  def loss(params):
    out = model.apply({"params": params}, x, None, mask, types)
    return sum(jnp.square(jax.nn.log_softmax(part)).mean() for part in jax.tree.leaves(out)), out
  run = lambda p: jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(p)
  expected = run(params)
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with partitioning.use_mesh(mesh):
    split = jax.device_put(params, partitioning.param_shardings(mesh, boxed))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    got = run(split)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def num_params(preset, **changes):
  config = base_config()
  config.train.num_steps = 1
  config.model.update({**preset, **changes})
  config = from_config_dict(config)
  model = make_model(resolve_model(config, config.model.vocab_size).model)
  return metrics.count_params(jax.eval_shape(lambda: nn.unbox(init_params(model, jax.random.key(0)))))


# Of the released models without heads, with the pooler where they have one; and with the heads they were trained with.
@pytest.mark.parametrize("preset, changes, count", [
    (families.bert("base"), {}, 109_482_240), (families.bert("large"), {}, 335_141_888),
    (families.roberta("base"), {}, 124_645_632), (families.roberta("large"), {}, 355_359_744),
    (families.albert("base-v2"), {}, 11_683_584), (families.albert("large-v2"), {}, 17_683_968),
    (families.albert("xlarge-v2"), {}, 58_724_864), (families.albert("xxlarge-v2"), {}, 222_595_584),
    (families.electra("small"), dict(pooler="none"), 13_483_008),
    (families.electra("base"), dict(pooler="none"), 108_891_648),
    (families.electra("large"), dict(pooler="none"), 334_092_288),
    (families.distilbert(), dict(pooler="none"), 66_362_880),
    (families.bert("base"), dict(head="pretraining"), 110_106_428),
    (families.distilbert(), dict(head="lm"), 66_985_530),
])
def test_presets_have_the_released_sizes(preset, changes, count):
  assert num_params(preset, **{"head": "none", **changes}) == count


@pytest.mark.parametrize("cfg", [
    *(dataclasses.replace(ENCODER, head=head) for head in HEADS),
    *(dataclasses.replace(ENCODER, head=head, embedding_dim=16, share_layers=True) for head in HEADS),
    *(ModelConfig(**preset) for preset in (
        families.bert("large"), families.roberta(), families.albert("xxlarge-v2"), families.electra("large"),
        families.electra("base-generator"), families.distilbert()))])
def test_flops_are_six_for_each_parameter_that_multiplies_and_attention(cfg):
  cfg = fill_sizes(cfg)
  shapes = jax.eval_shape(lambda: nn.unbox(init_params(make_model(cfg), jax.random.key(0))))
  kernels = {jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
             for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "kernel"}
  length = 24
  per_layer = sum(size for path, size in kernels.items() if path.startswith("layers/"))
  once = lambda path: path.startswith(f"{cfg.head}_head/") and cfg.head not in ("token", "span", "replaced")
  count = per_layer * (cfg.num_layers if cfg.share_layers else 1)
  count += sum(size for path, size in kernels.items() if not path.startswith("layers/") and not once(path))
  count += sum(size for path, size in kernels.items() if once(path)) / length
  count += cfg.vocab_size * cfg.embedding_dim * (cfg.head in ("lm", "pretraining"))  # The embedding, as the output.
  attention = 12 * cfg.num_layers * length * cfg.embed_dim  # Every key: scores and values, forward and backward.
  assert metrics.flops_per_token(cfg, length) == pytest.approx(6 * count + attention)


@pytest.mark.parametrize("model, told", [
    (dict(head="pooled"), "config.model.head is pooled, which reads a text from both sides, but config.model.archi"),
    (dict(head="replaced"), "config.model.head is replaced, which reads a text from both sides"),
    (dict(embedding_dim=16, embed_dim=32), "config.model.embedding_dim is 16 and embed_dim 32, but the output"),
    (dict(head="sequences"), "did you mean 'sequence'?"),
    (dict(pooler="sigmoid"), "config.model.pooler is 'sigmoid', which is not one of its values"),
    (dict(num_labels=0), "config.model.num_labels is 0, but it must be at least 1"),
])
def test_what_cannot_work_is_one_sentence(model, told):
  config = base_config()
  config.train.num_steps = 1
  config.model.update(model)
  with pytest.raises(UserError) as error:
    from_config_dict(config)
  assert told in str(error.value) and "\n" not in str(error.value)


def test_causal_language_modelling_needs_a_decoder_with_its_head():
  config = base_config()
  config.train.num_steps = 1
  check_objective(from_config_dict(config))
  config.model.head = "sequence"
  with pytest.raises(UserError, match="config.model.head is sequence; set it to lm, or another objective"):
    check_objective(from_config_dict(config))
  config.model.update(families.bert())
  with pytest.raises(UserError, match="config.model.architecture is encoder; set it to decoder, or another objective"):
    check_objective(from_config_dict(config))


def test_an_encoder_continues_no_text():
  model, params = make(head="lm")
  with pytest.raises(UserError, match="architecture encoder with head lm, but only a decoder"):
    lmjax.generate(model, params, [[1, 2]], max_new_tokens=2)
