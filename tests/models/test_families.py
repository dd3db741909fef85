"""Tests the presets against the published numbers of parameters."""

import math

from flax import linen as nn
import jax
import pytest

from lmjax import metrics
from lmjax.config import UserError, base_config, from_config_dict, resolve_model
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model


def config_and_shapes(preset):
  """Returns the settings of a preset and its parameters' shapes, without making them."""
  config = base_config()
  config.train.num_steps = 1
  config.model.update(preset)
  config = from_config_dict(config)
  model = make_model(resolve_model(config, config.model.vocab_size).model)
  return model.cfg, nn.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))


def num_params(preset):
  """Counts the parameters of a preset."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(config_and_shapes(preset)[1]))


@pytest.mark.parametrize("size, count", [
    ("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1.5B", 1_557_611_200)])
def test_gpt2_has_the_released_sizes(size, count):
  assert num_params(families.gpt2(size)) == count


@pytest.mark.parametrize("size, count", [
    ("2-7B", 6_738_415_616), ("2-13B", 13_015_864_320), ("2-70B", 68_976_648_192), ("3-8B", 8_030_261_248),
    ("3-70B", 70_553_706_496), ("3.2-1B", 1_235_814_400), ("3.2-3B", 3_212_749_824)])
def test_llama_has_the_released_sizes(size, count):
  assert num_params(families.llama(size)) == count


@pytest.mark.parametrize("family, size, count", [
    (families.smollm, "135M", 134_515_008), (families.smollm, "360M", 361_821_120),
    (families.smollm, "1.7B", 1_711_376_384), (families.mistral, "7B", 7_241_732_096),
    (families.qwen2, "0.5B", 494_032_768), (families.qwen2, "1.5B", 1_543_714_304),
    (families.qwen2, "7B", 7_615_616_512), (families.qwen2, "72B", 72_706_203_648),
    (families.qwen3, "0.6B", 596_049_920), (families.qwen3, "1.7B", 1_720_574_976),
    (families.qwen3, "4B", 4_022_468_096), (families.qwen3, "8B", 8_190_735_360),
    (families.qwen3, "32B", 32_762_123_264),
    (families.gemma, "2b", 2_506_172_416), (families.gemma, "7b", 8_537_680_896),
    (families.gemma, "2-2b", 2_614_341_888), (families.gemma, "2-9b", 9_241_705_984),
    (families.gemma, "2-27b", 27_227_128_320), (families.gemma, "3-270m", 268_098_176),
    # Of the two larger ones that which reads text.
    (families.gemma, "3-1b", 999_885_952), (families.gemma, "3-4b", 3_880_263_168),
    (families.gemma, "3-27b", 27_009_346_304),
    (families.pythia, "70m", 70_426_624), (families.pythia, "160m", 162_322_944),
    (families.pythia, "410m", 405_334_016), (families.pythia, "1b", 1_011_781_632),
    (families.pythia, "1.4b", 1_414_647_808), (families.pythia, "2.8b", 2_775_208_960),
    (families.pythia, "6.9b", 6_857_302_016), (families.pythia, "12b", 11_846_072_320),
    (families.olmo2, "1B", 1_484_916_736), (families.olmo2, "7B", 7_298_617_344),
    (families.olmo2, "13B", 13_716_198_400)])
def test_other_decoders_have_the_released_sizes(family, size, count):
  assert num_params(family(size)) == count


# What acts on a token is published rounded.
@pytest.mark.parametrize("family, size, count, active_billions", [
    (families.mixtral, "8x7B", 46_702_792_704, 12.9), (families.mixtral, "8x22B", 140_620_634_112, 39),
    (families.qwen2_moe, "A2.7B", 14_315_784_192, 2.7), (families.qwen2_moe, "57B-A14B", 57_408_658_944, 14),
    (families.qwen3_moe, "30B-A3B", 30_532_122_624, 3.3), (families.qwen3_moe, "235B-A22B", 235_093_634_560, 22)])
def test_mixtures_have_the_released_sizes_and_flops_of_the_weights_that_act_on_a_token(
    family, size, count, active_billions):
  cfg, shapes = config_and_shapes(family(size))
  assert metrics.count_params(shapes) == count
  active = metrics.count_active(shapes, cfg)
  assert active == pytest.approx(active_billions * 1e9, rel=0.02)
  kernels = lambda tree: sum(math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)
                             if path[-1].key == "kernel")
  weights = kernels(shapes) - (count - active)
  pairs = cfg.num_layers * cfg.num_heads * cfg.head_dim * (64 + 1) / 2
  assert metrics.flops_per_token(cfg, 64) == pytest.approx(6 * weights + 12 * pairs, rel=1e-12)


# The paper rounds, and leaves the reader to guess what it counts; these are its names for the sizes.
@pytest.mark.parametrize("size, billions", [
    ("125M", 0.125), ("350M", 0.356), ("760M", 0.760), ("1.3B", 1.3),
    ("2.7B", 2.7), ("6.7B", 6.7), ("13B", 13.0), ("175B", 175.0)])
def test_gpt3_sizes_are_about_those_of_the_paper(size, billions):
  assert num_params(families.gpt3(size)) == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize("family, size, told", [
    (families.gpt2, "124", "GPT-2 has no size '124'; did you mean '124M'?"),
    (families.llama, "3-9B", "Llama has no size '3-9B'; did you mean"),
    (families.mixtral, "7B", "Mixtral has no size '7B'; did you mean '8x7B'?"),
    (families.gpt3, "huge", "GPT-3 has no size 'huge'; known are: 1.3B,")])
def test_an_unknown_size_names_the_known(family, size, told):
  with pytest.raises(UserError) as error:
    family(size)
  assert told in str(error.value)
