"""Settings: defaults that pass their own checks, durations in any unit, and a sentence for each mistake."""

import ast
import pathlib

import pytest

from lmjax import config as config_lib
from lmjax.config import Config, UserError


def make(**groups) -> Config:
  config = config_lib.base_config()
  config.train.num_steps = 100
  for name, values in groups.items():
    config[name].update(values)
  return config_lib.from_config_dict(config)


def test_the_defaults_pass_their_own_checks_and_survive_json():
  config = make()
  assert config_lib.from_json(config_lib.to_json(config)) == config


def test_the_length_of_the_run_has_no_default():
  with pytest.raises(UserError, match="set one of config.train.num_steps, num_tokens, num_epochs"):
    config_lib.from_config_dict(config_lib.base_config())


def test_every_setting_says_what_it_means():
  for name, _, sentence in config_lib.settings_help():
    assert len(sentence.split()) >= 2, name


@pytest.mark.parametrize("groups, told", [
    (dict(model=dict(num_layers=0)), "config.model.num_layers is 0, but it must be at least 1"),
    (dict(model=dict(norm="rms")), "config.model.norm is 'rms', which is not one of its values; did you mean"),
    (dict(model=dict(num_heads=3)), "num_heads = 3 does not divide embed_dim = 128"),
    (dict(model=dict(num_kv_heads=3)), "num_kv_heads = 3 does not divide num_heads = 4"),
    (dict(model=dict(position="rotary", head_dim=5)), "needs an even head_dim, but it turns 5 of 5"),
    (dict(model=dict(max_positions=64)), "seq_len is 256, more than the 64 learned positions"),
    (dict(optim=dict(learning_rate=-1.0)), "learning_rate is -1.0, but it must be at least 0"),
    (dict(optim=dict(learning_rate=float("nan"))), "learning_rate is nan, but it must be a finite number"),
    (dict(optim=dict(name="schedule_free", schedule="constant", beta1=0.0)), "beta1 is 0, but schedule_free"),
    (dict(optim=dict(name="schedule_free")), "config.optim.schedule is cosine; set it to constant"),
    (dict(optim=dict(decay_steps=5)), "config.optim.decay_steps is for the wsd schedule"),
    (dict(optim=dict(name="sophia", offload=True)), "offload is True, but config.optim.name is sophia, which measures"),
    (dict(model=dict(remat_policy="names", remat_save=("query", "mlp"))), "remat_save has 'mlp', but the results of a "
     "block are called query, key, value, attention, out, up, gate, down, router, shared_gate, distance"),
    (dict(model=dict(remat_policy="names", remat_save=("up",), remat_offload=("up",))), "both have 'up'"),
    (dict(model=dict(remat_offload=("up",))), "which config.model.remat_policy products does not read; set that to"),
    (dict(optim=dict(weight_decay_policy=(("(", 0.0),))), "weight_decay_policy has the entry"),
    (dict(optim=dict(learning_rate_policy=("mlp",))), "learning_rate_policy has the entry 'mlp', which is not a"),
    (dict(train=dict(gradient_noise=True)), "grad_accum_steps is 1; set it to 2 or more"),
    (dict(train=dict(batch_size=10, grad_accum_steps=3)), "batch_size is 10, which config.train.grad_accum_steps = 3"),
    (dict(train=dict(num_tokens=1e6)), "config.train.num_steps and config.train.num_tokens are both set"),
    (dict(optim=dict(warmup_steps=5, warmup_epochs=1.0)), "warmup_steps and config.optim.warmup_epochs are both set"),
    (dict(data=dict(weights=(1.0, 2.0))), "config.data.weights has 2 values for the 1 sources"),
    (dict(data=dict(source="a.txt,b.txt", weights=(1.0, 0.0))), "every weight must be a number above 0"),
    (dict(mesh=dict(data=-1, fsdp=-1)), "Only one axis of config.mesh may be -1; now data and fsdp are"),
    (dict(mesh=dict(tensor=0)), "config.mesh.tensor is 0"),
    (dict(model=dict(parametrization="mup")), "base_embed_dim is None; set it to the embed_dim at which"),
    (dict(model=dict(parametrization="completep", base_embed_dim=64)), "config.model.base_num_layers is None"),
    (dict(model=dict(parametrization="mup", base_embed_dim=64), optim=dict(name="sophia")), "no rule is known for "
     "config.optim.name = sophia"),
    (dict(model=dict(parametrization="mup", base_embed_dim=64), optim=dict(name="sgd")), "clip_norm is 1.0: the norm"),
    (dict(model=dict(parametrization="mup", base_embed_dim=64, qk_norm="head"), optim=dict(name="sgd", clip_norm=None)),
     "no rule is known for SGD of the gains of config.model.qk_norm = head"),
    (dict(model=dict(parametrization="completep", base_embed_dim=64, base_num_layers=2, block="post")),
     "block is post, for which no rule for depth is known"),
    (dict(model=dict(parametrization="completep", base_embed_dim=64, base_num_layers=2, num_future=2),
          objective=dict(name="multi_token")),
     "num_future is 2: no rule for depth is known for blocks that stand beside the stack"),
    (dict(model=dict(parametrization="completep", base_embed_dim=64, base_num_layers=2, num_decoder_layers=3,
                     architecture="encoder_decoder")), "num_decoder_layers is 3 and num_layers 4, which have one base"),
])
def test_a_mistake_is_one_sentence_that_names_the_setting(groups, told):
  with pytest.raises(UserError, match=told) as error:
    make(**groups)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw, told", [
    ({"optim": {"lerning_rate": 1.0}}, "config.optim has no setting 'lerning_rate'; did you mean 'learning_rate'"),
    ({"optimizer": {}}, "config has no setting 'optimizer'; did you mean 'optim'"),
    ({"train": {"num_steps": "many"}}, "config.train.num_steps is 'many', but it must be of type int"),
    ({"train": {"num_steps": 1.5}}, "config.train.num_steps is 1.5, but it must be of type int"),
    ({"train": {"num_steps": True}}, "config.train.num_steps is True, but it must be of type int"),
    ({"train": {"num_steps": 5, "batch_size": None}}, "config.train.batch_size is None"),
    ({"train": 3}, "config.train is 3, but it is a group"),
    ({"seed": -1}, "config.seed is -1, but it must be at least 0"),
])
def test_a_wrong_config_json_is_refused(raw, told):
  with pytest.raises(UserError, match=told):
    config_lib.from_config_dict(raw)


@pytest.mark.parametrize("train, steps", [
    (dict(num_steps=7), 7), (dict(num_steps=None, num_tokens=4096 * 10), 10),
    (dict(num_steps=None, num_tokens=4096 * 2.4), 2), (dict(num_steps=None, num_tokens=1.0), 1),
    (dict(num_steps=None, num_epochs=0.5), 12)])
def test_durations_become_steps(train, steps):
  config = config_lib.resolve_durations(make(train=train, data=dict(seq_len=256)), tokens_per_epoch=100_000)
  assert config.train.num_steps == steps
  assert config.train.num_tokens is None and config.train.num_epochs is None


def test_warmup_and_decay_must_fit_the_run():
  config = make(optim=dict(schedule="wsd", warmup_steps=80, decay_steps=30))
  with pytest.raises(UserError, match="warms up for 80 steps and decays for 30, but the run has only 100"):
    config_lib.resolve_durations(config, 1)


def test_no_more_steps_than_can_be_counted():
  config = make(train=dict(num_steps=None, num_tokens=1e300))
  with pytest.raises(UserError, match="The run would have 2.44e\\+296 steps, but at most 2147483647 can be counted"):
    config_lib.resolve_durations(config, 1)


@pytest.mark.parametrize("every", [None, 40])
def test_checkpoints_to_keep_must_be_among_those_made(every):
  config = make(checkpoint=dict(every_steps=every, keep_every_steps=100))
  with pytest.raises(UserError, match="keep_every_steps is 100, but checkpoints are made every"):
    config_lib.resolve_durations(config, 1)


def test_sizes_are_derived_from_the_tokenizer_and_the_width():
  model = config_lib.resolve_model(make(), vocab_size=1000).model
  assert (model.vocab_size, model.num_kv_heads, model.head_dim, model.mlp_dim, model.max_positions) == (
      1024, 4, 32, 512, 256)
  with pytest.raises(UserError, match="tokenizer has 1000 tokens but config.model.vocab_size is 999"):
    config_lib.resolve_model(make(model=dict(vocab_size=999)), 1000)


def test_defaults_live_in_one_place():
  """No `.get(name, default)` on a config anywhere in the library."""
  root = pathlib.Path(config_lib.__file__).parent
  for path in root.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        owner = ast.unparse(node.func.value)
        assert not (len(node.args) == 2 and ("config" in owner or "cfg" in owner)), f"{path}:{node.lineno}"


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
  for name in ("LMJAX_CACHE_DIR", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", "/home/someone")
  assert config_lib.cache_dir() == pathlib.Path("/home/someone/.cache/lmjax")
  monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
  assert config_lib.cache_dir() == pathlib.Path("/xdg/lmjax")
  monkeypatch.setenv("LMJAX_CACHE_DIR", "/own")
  assert config_lib.cache_dir() == pathlib.Path("/own")
