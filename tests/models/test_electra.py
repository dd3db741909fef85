"""ELECTRA's pair: what it shares, how large it is, and that its discriminator goes out alone."""

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax import metrics, partitioning
from lmjax.config import MeshConfig, UserError, base_config, electra_parts, from_config_dict, resolve_model
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model


def config_of(preset):
  config = base_config()
  config.model.update(preset)
  config.data.seq_len = 64
  config.train.update(num_steps=1, batch_size=8)
  config = from_config_dict(config)
  return resolve_model(config, config.model.vocab_size or 384)


def shapes_of(cfg):
  return nn.unbox(jax.eval_shape(lambda: init_params(make_model(cfg), jax.random.key(0))))


# The generators of base and large as released; that of small is a quarter, as in table 6 of the paper.
@pytest.mark.parametrize("size, generator", [("small", (64, 1, 256, 128)), ("base", (256, 4, 1024, 768)),
                                             ("large", (256, 4, 1024, 1024))])
def test_a_pair_has_the_sizes_of_both_and_the_tables_once(size, generator):
  cfg = config_of(families.electra_pretraining(size)).model
  part, whole = electra_parts(cfg)
  assert (part.embed_dim, part.num_heads, part.mlp_dim, part.embedding_dim) == generator
  assert part.head_dim == whole.head_dim == 64
  tables = (cfg.vocab_size + cfg.max_positions + cfg.token_types) * cfg.embedding_dim
  counts = [metrics.count_params(shapes_of(one)) for one in (cfg, part, whole)]
  assert counts[0] == counts[1] + counts[2] - tables
  alone = config_of(families.electra(size)).model
  assert dataclasses.replace(whole, pooler="gelu") == alone


def test_counts_and_flops_are_those_of_the_weights():
  cfg = config_of(families.electra_pretraining("base")).model
  shapes = shapes_of(cfg)
  assert metrics.count_params(shapes) - metrics.count_non_embedding(shapes) >= metrics.count_params(shapes["embed"])
  kernels = sum(math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(shapes)
                if path[-1].key == "kernel")
  attention = 12 * 24 * sum(part.num_layers * part.num_heads * part.head_dim for part in electra_parts(cfg))
  expected = 6 * (kernels + cfg.vocab_size * cfg.embedding_dim) + attention
  assert metrics.flops_per_token(cfg, 24) == pytest.approx(expected, rel=1e-12)


def test_the_discriminator_goes_out_and_comes_back(tmp_path):
  config = config_of(families.debug(families.electra_pretraining()))
  model = make_model(config.model)
  params = jax.jit(lambda: nn.unbox(init_params(model, jax.random.key(0))))()
  params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
  lmjax.save_hf(model, params, tmp_path / "out")
  alone, own = lmjax.load(tmp_path / "out")
  assert (alone.cfg.architecture, alone.cfg.head) == ("encoder", "replaced")
  x = np.random.default_rng(0).integers(0, 384, (2, 20))
  np.testing.assert_allclose(alone.apply({"params": own}, x), model.apply({"params": params}, x), atol=1e-5)
  with pytest.raises(UserError, match="The parameters have generator/"):
    lmjax.save_hf(model, {name: x for name, x in params.items() if name != "generator"}, tmp_path / "broken")


def test_a_mesh_that_does_not_divide_the_generator_is_told():
  config = config_of(families.debug(families.electra_pretraining()))
  mesh = partitioning.make_mesh(MeshConfig(data=4, tensor=2))
  with pytest.raises(UserError) as error:
    partitioning.check_divisible(config, mesh)
  assert str(error.value).startswith("config.model.generator_fraction = 0.25 makes a generator with a num_heads of 1")


def test_a_generator_has_no_pair_of_its_own():
  with pytest.raises(UserError, match="give the discriminator's size, base"):
    families.electra_pretraining("base-generator")
