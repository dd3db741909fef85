"""A config that passes the checks is the same after JSON, after a ConfigDict, and after overrides as flags."""

import dataclasses
import math

from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from lmjax import config as config_lib
from lmjax.commands import experiment
from lmjax.config import UserError

NAMES = {name: default for name, default, _ in config_lib.settings_help()}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
TUPLES = {
    "data.tasks": st.just(()),
    "objective.task_weights": st.sampled_from([(), (1.0, 0.5)]),
    "model.task_heads": st.just(()),
    "model.remat_save": st.sampled_from([(), ("query", "up")]),
    "model.remat_offload": st.sampled_from([(), ("attention",)]),
    "data.weights": st.sampled_from([(), (1.0,), (3,)]),
    "model.attention_pattern": st.sampled_from([(), ("global",)]),
    "eval.sets": st.lists(st.sampled_from(["validation", "train", "mine=a.txt,b c.txt"]), unique=True).map(tuple),
    "optim.learning_rate_policy": st.lists(st.tuples(st.sampled_from(["bias", r"a/(b|c)$"]), st.floats(0, 2)),
                                           max_size=2).map(tuple),
    "optim.weight_decay_policy": st.lists(st.tuples(st.sampled_from(["scale", "[xy]"]), st.floats(0, 2)),
                                          max_size=2).map(tuple),
    "optim.freeze_policy": st.lists(st.tuples(st.sampled_from(["embed", "[xy]"]), st.integers(-1, 99)),
                                    max_size=2).map(tuple)}


def values_of(group, field):
  """Returns a strategy for the values that a setting alone may have."""
  name, meta = f"{group}.{field.name}" if group else field.name, field.metadata
  if name in TUPLES:
    return TUPLES[name]
  if meta["choices"]:
    return st.sampled_from(meta["choices"])
  base = {"bool": st.booleans(), "str": TEXT, "int": numbers(st.integers, meta, 10**6),
          "float": numbers(st.floats, meta, 1e12)}
  kinds = str(field.type) if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
  kind = next(kind for kind in base if kind in kinds)
  return st.none() | base[kind] if "None" in kinds else base[kind]


def numbers(strategy, meta, most):
  low = meta["low"] if meta["low"] is not None else meta["above"]
  found = strategy(-most if low is None else low, meta["high"] if meta["high"] is not None else most)
  return found.filter(lambda value: meta["above"] is None or value > meta["above"])


@st.composite
def configs(draw):
  """Draws configs that pass all checks: any value for some settings, with what does not go together put right."""
  config = config_lib.base_config()
  config.train.num_steps = 100
  changed = draw(st.lists(st.sampled_from(sorted(NAMES)), max_size=8, unique=True))
  for name in changed:
    group, _, key = name.rpartition(".")
    kind = type(getattr(config_lib.Config(), group)) if group else config_lib.Config
    value = draw(values_of(group, kind.__dataclass_fields__[key]))
    with config.unlocked():
      (config[group] if group else config)[key] = value
  try:
    return config_lib.from_config_dict(config), changed
  except UserError:
    return None


quickly = settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@quickly
@given(configs().filter(bool))
def test_json_and_dicts_keep_every_value(drawn):
  config, _ = drawn
  assert config_lib.from_json(config_lib.to_json(config)) == config
  assert config_lib.from_config_dict(dataclasses.asdict(config)) == config


@quickly
@given(configs().filter(bool))
def test_overrides_on_a_command_line_keep_every_value(tmp_path_factory, drawn):
  config, changed = drawn
  path = tmp_path_factory.getbasetemp() / "experiment.py"
  path.write_text("from lmjax.config import base_config\ndef get_config():\n  c = base_config()\n"
                  "  c.train.num_steps = 100\n  return c\n")
  argv = [f"--config={path}"]
  for name in changed:
    group, _, key = name.rpartition(".")
    value = getattr(getattr(config, group) if group else config, key)
    argv.append(f"--config.{name}={value!r}" if isinstance(value, tuple) else f"--config.{name}={value}")
  flag_values = flags.FlagValues()
  experiment.define_config_flags(flag_values)
  flag_values(["lmjax", *experiment.rewrite_overrides(argv)])
  assert experiment.read_config(flag_values) == config


@given(st.sampled_from(sorted(NAMES)), st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just({}) |
       st.lists(st.integers(), max_size=2))
def test_any_value_for_any_setting_passes_or_is_one_sentence(name, value):
  group, _, key = name.rpartition(".")
  raw = {"train": {"num_steps": 100}}
  (raw.setdefault(group, {}) if group else raw)[key] = value
  try:
    config = config_lib.from_config_dict(raw)
  except UserError as e:
    assert "\n" not in str(e) and str(e).endswith((".", "?"))
  else:
    back = getattr(getattr(config, group) if group else config, key)
    assert back == (tuple(value) if isinstance(value, list) else value)
    assert not isinstance(back, float) or math.isfinite(back)
    assert config_lib.from_json(config_lib.to_json(config)) == config


@pytest.mark.parametrize("text", ["", "None", "none", " ", "é 中 🙂", "a=b", "--x", "'", '"', "a,b", "(1,)", "C:\\x"])
def test_any_text_can_be_a_prompt(tmp_path, text):
  config = config_lib.base_config()
  experiment.apply_overrides(config, [f"train.sample_prompt={text}"])
  assert config.train.sample_prompt == text
