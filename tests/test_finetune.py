"""Fine-tuning takes of a folder what serves, and leaves what belongs to its own training."""

from flax import linen as nn
import jax
import numpy as np

from lmjax import config as config_lib
from lmjax import convert, finetune, partitioning, train
from lmjax.config import base_config, from_config_dict
from lmjax.config_checks import check_objective
from lmjax.data.tokenizer import byte_tokenizer
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model


def config_of(preset, **model):
  config = base_config()
  config.model.update({**families.debug(families.preset(preset)), **model})
  config.data.seq_len = 16
  config.train.update(num_steps=1, batch_size=8)
  return config


def test_heads_of_further_tokens_are_left_behind(tmp_path):
  pretrained = config_of("llama", num_future=2)
  pretrained.objective.name = "multi_token"
  (tmp_path / "config.json").write_text(config_lib.to_json(config_lib.resolve_model(from_config_dict(pretrained), 257)))
  byte_tokenizer().save(tmp_path / "tokenizer.json")
  config = config_of("llama")
  config.objective.name, config.model.head = "classification", "sequence"
  config.data.tasks = (dict(name="a", source="a.csv", text="{text}", label="label"),)
  config.checkpoint.finetune_from = str(tmp_path)
  taken = finetune.take_model(from_config_dict(config))
  check_objective(taken)
  assert taken.model.num_future == 1


def test_a_vocabulary_that_the_mesh_does_not_divide_becomes_one_that_it_does(tmp_path):
  model = make_model(config_lib.resolve_model(from_config_dict(config_of("bert", vocab_size=302)), 302).model)
  params = nn.unbox(init_params(model, jax.random.key(1)))
  convert.save_hf(model, params, tmp_path / "hf", byte_tokenizer())
  config = config_of("bert", vocab_size=384, head="sequence")
  config.objective.name = "classification"
  config.data.tasks = (dict(name="a", source="a.csv", text="{text}", label="label"),)
  config.mesh.update(data=2, fsdp=1, tensor=4)
  config.checkpoint.finetune_from = str(tmp_path / "hf")
  config = config_lib.resolve_model(finetune.take_model(from_config_dict(config)), 302)
  setup = train.build(config, partitioning.make_mesh(config.mesh))
  fresh = train.init_state(setup).params
  with partitioning.use_mesh(setup.mesh):
    table = finetune.first_params(config, setup.mesh, fresh)["embed"]["embedding"]
  np.testing.assert_array_equal(table[:302], params["embed"]["embedding"])
  np.testing.assert_array_equal(table[302:], fresh["embed"]["embedding"][302:])
  assert table.sharding == fresh["embed"]["embedding"].sharding
