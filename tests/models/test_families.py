"""Tests the presets against the published numbers of parameters."""

import math

from flax import linen as nn
import jax
import pytest

from lmjax.config import UserError, base_config, from_config_dict, resolve_model
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model


def num_params(preset):
  """Counts the parameters of a preset without making them."""
  config = base_config()
  config.train.num_steps = 1
  config.model.update(preset)
  config = from_config_dict(config)
  model = make_model(resolve_model(config, config.model.vocab_size).model)
  shapes = nn.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size, count", [
    ("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1.5B", 1_557_611_200)])
def test_gpt2_has_the_released_sizes(size, count):
  assert num_params(families.gpt2(size)) == count


@pytest.mark.parametrize("size, count", [
    ("2-7B", 6_738_415_616), ("2-13B", 13_015_864_320), ("2-70B", 68_976_648_192), ("3-8B", 8_030_261_248),
    ("3-70B", 70_553_706_496), ("3.2-1B", 1_235_814_400), ("3.2-3B", 3_212_749_824)])
def test_llama_has_the_released_sizes(size, count):
  assert num_params(families.llama(size)) == count


# The paper rounds, and leaves the reader to guess what it counts; these are its names for the sizes.
@pytest.mark.parametrize("size, billions", [
    ("125M", 0.125), ("350M", 0.356), ("760M", 0.760), ("1.3B", 1.3),
    ("2.7B", 2.7), ("6.7B", 6.7), ("13B", 13.0), ("175B", 175.0)])
def test_gpt3_sizes_are_about_those_of_the_paper(size, billions):
  assert num_params(families.gpt3(size)) == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize("family, size, told", [
    (families.gpt2, "124", "GPT-2 has no size '124'; did you mean '124M'?"),
    (families.llama, "3-9B", "Llama has no size '3-9B'; did you mean"),
    (families.gpt3, "huge", "GPT-3 has no size 'huge'; known are: 1.3B,")])
def test_an_unknown_size_names_the_known(family, size, told):
  with pytest.raises(UserError) as error:
    family(size)
  assert told in str(error.value)
