"""What an encoder-decoder must keep: who sees what, and the same numbers however they are computed."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import metrics, partitioning
from lmjax.config import MeshConfig, ModelConfig, UserError, base_config, from_config_dict, resolve_model
from lmjax.config_checks import check_objective
from lmjax.generation import generate
from lmjax.models import families
from lmjax.models.attention import init_cache
from lmjax.models.relative import bucket_of_distances, relative_buckets
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives.cross_entropy import LossOptions, cross_entropy

SIZES = dict(num_layers=2, num_decoder_layers=3, embed_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64,
             vocab_size=64, dtype="float32")
VARIANTS = {
    "t5": {**families.t5(), **SIZES},
    "t5_1_1": {**families.t5_1_1(), **SIZES},
    "bart": {**families.bart(), **SIZES, "max_positions": 40, "head_bias": True, "init_std": 0.2},
    "transformer": {**families.transformer(), **SIZES},
    "two_tables": dict(families.t5(), **{**SIZES, "position": "rotary", "num_kv_heads": 2}, share_embeddings=False,
                       qk_norm="head", attention_softcap=5.0),
}


FAST = {"xla_backend_optimization_level": 0}  # Each of many small programs runs once.


def make(settings):
  model = make_model(ModelConfig(**settings))
  # Most of an initialisation goes into compiling random numbers that are drawn once.
  init = jax.jit(lambda key: nn.unbox(init_params(model, key)), compiler_options=FAST)
  return model, init(jax.random.key(0))


@pytest.fixture(params=VARIANTS)
def variant(request):
  return make(VARIANTS[request.param])


def texts(rows=2, encoder_len=11, decoder_len=9):
  draw = lambda seed, length: jax.random.randint(jax.random.key(seed), (rows, length), 0, 64)
  return draw(1, encoder_len), draw(2, decoder_len)


def test_what_a_logit_depends_on(variant):
  model, params = variant
  source, target = texts()
  run = jax.jit(lambda *args: model.apply({"params": params}, *args), compiler_options=FAST)
  logits = run(source, target)
  later = run(source, target.at[:, 5:].set((target[:, 5:] + 1) % 64))
  np.testing.assert_allclose(logits[:, :5], later[:, :5], atol=1e-5)
  assert float(jnp.abs(logits[:, 5:] - later[:, 5:]).max(-1).min()) > 1e-3
  other = run(source.at[:, -1].set((source[:, -1] + 1) % 64), target)
  assert float(jnp.abs(logits - other).max(-1).min()) > 1e-5  # Every position reads the last of the encoder's.


def dependences(gradient_TSD):
  return ["".join("1" if part.any() else "0" for part in row) for row in np.asarray(gradient_TSD)]


# Of two packed pairs of texts: which encoder and which decoder tokens the logits of a position depend on.
SOURCE_IDS, TARGET_IDS = [1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 0]
OF_SOURCE = ["111000", "111000", "000110", "000110", "000110"]
OF_TARGET = ["100000", "110000", "001000", "001100", "001110"]


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_zero_exactly_where_nothing_may_be_seen(name, packed):
  model, params = make({**VARIANTS[name], "tie_embeddings": False, "share_embeddings": False})
  ids = lambda x: jnp.array([x]) if packed else None
  mix = jax.random.normal(jax.random.key(1), (64,))

  # Six different tokens on each side: the gradient of row s of an embedding is that of input s.
  def outputs(encoder_table, decoder_table):
    put = lambda side, table: dict(params[side], embed=dict(params[side]["embed"], embedding=table))
    own = dict(params, encoder=put("encoder", encoder_table), decoder=put("decoder", decoder_table))
    tokens = jnp.arange(6)[None]
    return model.apply({"params": own}, tokens, tokens, encoder_segment_ids_BS=ids(SOURCE_IDS),
                       decoder_segment_ids_BT=ids(TARGET_IDS))[0] @ mix

  jacobian = jax.jit(jax.jacrev(outputs, (0, 1)), compiler_options=FAST)
  of_source, of_target = jacobian(*(params[side]["embed"]["embedding"] for side in ("encoder", "decoder")))
  expected = (OF_SOURCE, OF_TARGET) if packed else (["111111"] * 5, ["100000", "110000", "111000", "111100", "111110"])
  assert dependences(of_source[:5, :6]) == expected[0]
  assert dependences(of_target[:5, :6]) == expected[1]


def test_padding_and_packing_change_nothing(variant):
  model, params = variant
  run = jax.jit(lambda *args: model.apply({"params": params}, *args), compiler_options=FAST)
  source, target = texts(1)
  one, two = run(source[:, :4], target[:, :3]), run(source[:, 4:], target[:, 3:])
  positions = lambda *lengths: jnp.concatenate([jnp.arange(n) for n in lengths])[None]
  ids = lambda *lengths: jnp.repeat(jnp.arange(1, 3), jnp.array(lengths), total_repeat_length=sum(lengths))[None]
  packed = run(source, target, positions(4, 7), ids(4, 7), positions(3, 6), ids(3, 6))
  np.testing.assert_allclose(packed, jnp.concatenate([one, two], 1), atol=2e-5)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 5)))
  real = lambda x: pad(jnp.ones_like(x))
  padded = run(pad(source), pad(target), None, real(source), None, real(target))
  np.testing.assert_allclose(padded[:, :9], run(source, target), atol=2e-5)
  # Ids of one side alone: all of the other is of segment 1.
  np.testing.assert_allclose(run(pad(source), target, None, real(source)), run(source, target), atol=2e-5)
  np.testing.assert_allclose(run(source, pad(target), None, None, None, real(target))[:, :9], run(source, target),
                             atol=2e-5)


def test_decoding_with_a_cache_equals_the_whole_pass(variant):
  model, params = variant
  source, target = texts()
  ids = jnp.ones_like(source).at[1, 7:].set(0)
  whole = model.apply({"params": params}, source, target, encoder_segment_ids_BS=ids)
  cache = model.apply({"params": params}, source, ids, max_length=12, method="start")
  step = jax.jit(lambda toks, at, cache: model.apply({"params": params}, toks, at, cache, method="step"),
                 compiler_options=FAST)
  logits, cache = step(target[:, :4], jnp.broadcast_to(jnp.arange(4), (2, 4)), cache)
  np.testing.assert_allclose(logits, whole[:, 3], atol=2e-5)
  for i in range(4, 9):
    logits, cache = step(target[:, i:i + 1], jnp.full((2, 1), i), cache)
    np.testing.assert_allclose(logits, whole[:, i], atol=2e-5)


def loss_of(model, source, target):
  ids = jnp.ones_like(source).at[0, 8:].set(0)
  weights = jnp.ones(target.shape, jnp.float32).at[1, 6:].set(0)

  def loss(params, rngs=None):
    x, w, bias = model.apply(
        {"params": params}, source, target, encoder_segment_ids_BS=ids,
        decoder_segment_ids_BT=weights.astype(jnp.int32), rngs=rngs, method="features_and_output")
    return cross_entropy(x, w, (target + 1) % 64, weights, LossOptions(), bias)[0] / weights.sum()
  return loss


@pytest.mark.parametrize("name", ["t5", "t5_1_1", "bart"])
def test_the_chunked_loss_is_that_of_the_logits(name):
  model, params = make(VARIANTS[name])
  source, target = texts()
  logits = model.apply({"params": params}, source, target)
  x, w, bias = model.apply({"params": params}, source, target, method="features_and_output")
  total, _ = cross_entropy(x, w, target, jnp.ones(target.shape), LossOptions(), bias)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, target).sum()
  np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("changes", [dict(scan_layers=False, remat_policy="none"), dict(remat_policy="full")])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_loops_and_rematerialisation_change_no_gradient(name, changes):
  def grads(**changes):  # The loss of features and a projection knows no bias of logits.
    model, params = make({**VARIANTS[name], "head_bias": False, **changes})
    return jax.jit(jax.grad(loss_of(model, *texts())))(params)
  plain = grads()
  for path, x in jax.tree_util.tree_leaves_with_path(plain):
    # What is added to all keys moves all scores of a query alike.
    assert float(jnp.abs(x).max()) > 1e-7 or [key.key for key in path[-2:]] == ["key", "bias"]
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(grads(**changes)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_dropout_is_on_exactly_when_a_key_is_given():
  model, params = make({**VARIANTS["t5"], "dropout": 0.5})
  loss = jax.jit(loss_of(model, *texts()))
  first, second = (loss(params, {"dropout": jax.random.key(seed)}) for seed in (0, 1))
  assert loss(params) == loss(params) and abs(first - second) > 1e-3


@pytest.mark.parametrize("name", ["t5", "t5_1_1", "bart", "transformer"])
def test_a_mesh_changes_neither_loss_nor_gradient(name):
  model, params = make(VARIANTS[name])
  loss = loss_of(model, *texts(rows=4))
  expected = jax.jit(jax.value_and_grad(loss))(params)
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  shardings = partitioning.param_shardings(mesh, boxed)
  with partitioning.use_mesh(mesh):
    split = jax.device_put(params, shardings)
    got = jax.jit(jax.value_and_grad(loss), in_shardings=(shardings,))(split)
  kernel = split["decoder"]["layers"]["cross_attention"]["query"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 16, 2, 8)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


# Eight buckets up to distance 20: four of one distance each, then 4..5, 6..8, 9..13, 14 and beyond.
CAUSAL = [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7]
# Each direction has four of them: 0, 1, 2..6 and 7 and beyond.
EITHER = [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]


def test_buckets_are_those_worked_out_by_hand():
  assert bucket_of_distances(8, 20).tolist() == CAUSAL
  assert bucket_of_distances(4, 20).tolist() == EITHER
  cfg = ModelConfig(relative_buckets=8, relative_max_distance=20)
  at = lambda query, keys, both: relative_buckets(cfg, jnp.array([query]), jnp.array(keys), both).tolist()
  assert at(10, [10, 9, 6, 2, 0, 11, 30], False) == [0, 1, 4, 5, 6, 0, 0]
  assert at(10, [10, 9, 8, 4, 3, 11, 12, 17, 99], True) == [0, 1, 2, 2, 3, 5, 6, 7, 7]
  assert at(1000, [0], False) == [7]


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_relative_positions_serve_a_single_stack(architecture):
  settings = dict(SIZES, architecture=architecture, num_decoder_layers=None, position="relative")
  model, params = make(dict(settings, init_std=0.2))
  tokens = texts()[0]
  logits = model.apply({"params": params}, tokens)
  # Only distances count.
  moved = model.apply({"params": params}, tokens, jnp.arange(11)[None] + 5)
  np.testing.assert_allclose(logits, moved, atol=2e-5)
  flat = dict(params, relative=jax.tree.map(jnp.zeros_like, params["relative"]))
  assert float(jnp.abs(logits - model.apply({"params": flat}, tokens)).max()) > 1e-3
  if architecture == "decoder":
    cache = init_cache(model.cfg, 2, 11)
    for i in range(11):
      got, cache = model.apply({"params": params}, tokens[:, i:i + 1], jnp.full((2, 1), i), cache, method="step")
      np.testing.assert_allclose(got, logits[:, i], atol=2e-5)


def test_initial_weights_are_those_of_t5():
  cfg = {**VARIANTS["t5"], "embed_dim": 128, "head_dim": 32, "mlp_dim": 512}
  _, params = make(cfg)
  part = params["decoder"]["layers"]
  for value, std in [(params["embed"]["embedding"], 1.0), (part["attention"]["query"]["kernel"], (128 * 32) ** -0.5),
                     (part["cross_attention"]["key"]["kernel"], 128 ** -0.5),
                     (part["attention"]["out"]["kernel"], 128 ** -0.5), (part["mlp"]["up"]["kernel"], 128 ** -0.5),
                     (part["mlp"]["down"]["kernel"], 512 ** -0.5),
                     (params["encoder"]["relative"]["bias"], 128 ** -0.5)]:
    assert float(jnp.std(value)) == pytest.approx(std, rel=0.1)


def shapes_of(preset):
  config = base_config()
  config.train.num_steps = 1
  config.model.update(preset)
  config = from_config_dict(config)
  model = make_model(resolve_model(config, config.model.vocab_size).model)
  return model.cfg, nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


@pytest.mark.parametrize("preset, count", [
    (families.t5("small"), 60_506_624), (families.t5("base"), 222_903_552), (families.t5("large"), 737_668_096),
    (families.t5("3B"), 2_851_598_336), (families.t5("11B"), 11_307_321_344),
    (families.t5_1_1("small"), 76_961_152), (families.flan_t5("base"), 247_577_856),
    (families.t5_1_1("large"), 783_150_080), (families.t5_1_1("XL"), 2_849_757_184),
    (families.t5_1_1("XXL"), 11_135_332_352),
    (families.bart("base"), 139_420_416 + 50_265), (families.bart("large"), 406_291_456 + 50_265)])  # And biases.
def test_presets_have_the_released_sizes(preset, count):
  assert metrics.count_params(shapes_of(preset)[1]) == count


@pytest.mark.parametrize("size, millions", [("base", 65), ("big", 213)])
def test_the_first_transformer_has_about_the_size_of_the_paper(size, millions):
  # It rounds, and its vocabulary is "about 37000".
  assert metrics.count_params(shapes_of(families.transformer(size))[1]) == pytest.approx(millions * 1e6, rel=0.035)


@pytest.mark.parametrize("preset", [families.t5("base"), families.t5_1_1("small"), families.transformer("base")])
def test_flops_are_six_for_each_weight_a_token_meets_and_those_of_attention(preset):
  cfg, shapes = shapes_of(preset)
  S, T = 96, 40
  matrices = lambda tree: sum(math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)
                              if path[-1].key == "kernel")
  encoder, decoder = matrices(shapes["encoder"]), matrices(shapes["decoder"]["layers"])
  cross = shapes["decoder"]["layers"]["cross_attention"]
  read = matrices({name: cross[name] for name in ("key", "value")})
  weights = S * (encoder + read) + T * (decoder - read + cfg.vocab_size * cfg.embed_dim)
  pairs = cfg.num_layers * S * S + cfg.num_decoder_layers * (T * (T + 1) / 2 + S * T)
  expected = 6 * weights + 12 * pairs * cfg.num_heads * cfg.head_dim
  assert metrics.flops_per_example(cfg, S, T) == pytest.approx(expected, rel=1e-12)
  assert metrics.flops_per_token(cfg, S) == metrics.flops_per_example(cfg, S, S) / S


def test_embeddings_of_both_sides_are_counted_apart():
  shapes = shapes_of(families.bart("base"))[1]
  tables = 50265 * 768 + 2 * (1026 * 768 + 2 * 768)  # With the norms of the embeddings.
  assert metrics.count_non_embedding(shapes) == 139_420_416 - tables


@pytest.mark.parametrize("changes, told", [
    (dict(relative_max_distance=16), "relative_max_distance is 16, but the first 16 distances have buckets"),
    (dict(relative_buckets=7), "relative_buckets is 7, but it must be even"),
    (dict(attention_window=4), "attention_window is 4, which config.model.architecture encoder_decoder does not do; "
     "set it to None"),
    (dict(attention_window=4, attention_pattern=("local",)), "encoder_decoder does not do; set it to None"),
    (dict(attention_pattern=("global",)), "attention_pattern is ('global',), which"),
    (dict(head="sequence"), "head is 'sequence', which config.model.architecture encoder_decoder does not do; set it "
     "to 'lm'"),
    (dict(num_experts=4, use_bias=False), "num_experts is 4, which"),
    (dict(token_types=2), "token_types is 2, which"),
    (dict(block="parallel"), "block is 'parallel', which has no place for cross-attention")])
def test_settings_that_cannot_work_are_told(changes, told):
  with pytest.raises(UserError) as error:
    shapes_of({**families.t5("small"), **changes})
  assert told in str(error.value)


def test_a_causal_objective_refuses_an_encoder_decoder():
  config = base_config()
  config.train.num_steps = 1
  config.model.update(families.t5("small"))
  with pytest.raises(UserError, match="predicts each token from those before it, but config.model.architecture is "
                                      "encoder_decoder; set it to decoder"):
    check_objective(from_config_dict(config))


@pytest.mark.parametrize("options, told", [
    (dict(), "decoder_start_token_id is None, but the text of an encoder_decoder begins with a token from 0 to 63"),
    (dict(decoder_start_token_id=64), "decoder_start_token_id is 64, but"),
    (dict(decoder_start_token_id=0, max_new_tokens=41), "The longer of prompt and max_new_tokens make 41 tokens, but")])
def test_what_cannot_be_generated_is_told(options, told):
  model = make_model(ModelConfig(**VARIANTS["bart"]))
  with pytest.raises(UserError) as error:
    generate(model, None, [[1, 2]], **options)
  assert str(error.value).startswith(told)
