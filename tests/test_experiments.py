"""Every experiment file makes a config that is right, at every size, and says in its docstring how it is run."""

import importlib.util
import inspect
import pathlib
import re

from flax import linen as nn
import jax
import pytest

from lmjax import metrics
from lmjax.commands.experiment import apply_overrides
from lmjax.config import UserError, from_config_dict, resolve_model
from lmjax.models import families
from lmjax.models.transformer import init_params, make_model
from lmjax.sweeps.space import as_flags
from lmjax.sweeps.sweep import planned_settings, resolve

SIZES = {
    "gpt2": "124M 355M 774M 1.5B", "llama": "2-7B 2-13B 2-70B 3-8B 3-70B 3.2-1B 3.2-3B", "mixtral": "8x7B 8x22B",
    "bert": "base large", "electra": "small base large", "t5": "small base large 3B 11B 1.1-small 1.1-XXL",
    "transformer": "base big", "xlnet": "base large", "debug": "gemma t5",
    "tasks": "stdlib/identifiers stdlib/docstrings stdlib/packages,stdlib/answers", "finetune": "glue/sst2 squad"}
SWEEP_SIZES = {"mup_transfer": "cpu cpu-width cpu-depth pod pod-width pod-depth"}
SWEEPS = sorted((pathlib.Path(__file__).resolve().parents[1] / "experiments" / "sweeps").glob("*.py"))
FILES = sorted((pathlib.Path(__file__).resolve().parents[1] / "experiments").glob("*.py"))


def module_of(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_an_experiment_builds_and_says_how_it_is_run(path):
  module = module_of(path)
  assert f"--config=experiments/{path.name}" in module.__doc__ and "Hardware:" in module.__doc__
  sizes = SIZES.get(path.stem, "").split()
  assert len(inspect.signature(module.get_config).parameters) == bool(sizes)
  for arguments in [(), *((size,) for size in sizes)]:
    config = from_config_dict(module.get_config(*arguments))
    config = resolve_model(config, config.model.vocab_size or 256)
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(make_model(config.model), jax.random.key(0))))  # noqa: B023
    assert metrics.count_params(shapes) > 5e4


@pytest.mark.parametrize("family", families.PRESETS)
def test_a_debug_size_keeps_the_options_of_its_family(family):
  preset, small = families.preset(family), families.debug(families.preset(family))
  sizes = {"num_layers", "num_decoder_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
           "embedding_dim", "vocab_size", "max_positions", "attention_window", "attention_pattern", "num_experts",
           "experts_per_token", "expert_dim", "shared_expert_dim"}
  assert {name: value for name, value in small.items() if name not in sizes} == {
      name: value for name, value in preset.items() if name not in sizes}
  sizes -= {"vocab_size", "embedding_dim"}
  assert all(bool(small[name]) == bool(preset[name]) for name in sizes & preset.keys())


@pytest.mark.parametrize("path, size", [pytest.param(path, size, id=f"{path.stem}-{size}") for path in SWEEPS
                                        for size in SWEEP_SIZES.get(path.stem, "cpu pod").split()])
def test_a_sweep_makes_configs_that_are_right_and_says_how_it_is_run(path, size):
  module = module_of(path)
  assert f"--config=experiments/sweeps/{path.name}" in module.__doc__ and "Hardware:" in module.__doc__
  trials = planned_settings(resolve(module.get_sweep(size)))
  assert len(trials) > 7
  for settings in trials:
    config = module.get_config(size)
    apply_overrides(config, [flag.removeprefix("--config.") for flag in as_flags(settings)])
    from_config_dict(config)


@pytest.mark.parametrize("name, size, message", [
    ("learning_rate", "pods", "has no size 'pods'; did you mean 'pod'?"),
    ("batch_size", "large", "has no size 'large'; known are: cpu, pod."),
    ("depth", "gpu", "has no size 'gpu'; did you mean 'cpu'?"),
    ("isoflop", "ladders", "has no size 'ladders'; did you mean 'ladder'?"),
    ("mup_transfer", "xla", "has no size 'xla'; known are: cpu, cpu-depth, cpu-width, pod, pod-depth, pod-width."),
    ("mup_transfer", "pod-widths", "has no size 'pod-widths'; did you mean 'pod-width'?")])
def test_a_size_that_a_sweep_has_not_is_told(name, size, message):
  path, = (path for path in SWEEPS if path.stem == name)
  with pytest.raises(UserError, match=re.escape(f"experiments/sweeps/{name}.py {message}")):
    module_of(path).get_config(size)
