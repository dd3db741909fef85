"""Which settings a run may change when it goes on: every one is decided, and each decision is kept."""

import dataclasses
import json
import operator
import types

import pytest

from lmjax import config as config_lib
from lmjax import resume
from lmjax.config import Config, UserError

DECIDED = (*resume.FIXED, *resume.WARNED, *resume.FREE)
# Where any other number or word will not do: values that pass the checks of the config.
OTHER = {
    "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 64, "model.embed_dim": 256,
    "model.max_positions": 512, "data.weights": (1.0,), "data.seq_len": 128, "train.batch_size": 32,
    "optim.learning_rate_policy": (("bias", 0.5),), "optim.weight_decay_policy": (("bias", 0.5),),
    "optim.schedule": "wsd", "train.on_spike": "skip", "train.ema_decay": 0.5, "data.validation_fraction": 0.1,
    "eval.sets": ("train",), "model.dropout": 0.5, "objective.label_smoothing": 0.5, "mesh.data": 2}
DURATION = {f"{group}.{stem}_{unit}" for group, stem in config_lib.DURATIONS for unit in ("tokens", "epochs")}


def make() -> Config:
  return config_lib.Config(train=config_lib.TrainConfig(num_steps=100), model=config_lib.ModelConfig(position="rotary"))


def with_setting(config, name, value):
  group, _, key = name.rpartition(".")
  if not group:
    return dataclasses.replace(config, **{key: value})
  return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})


def another(name):
  """Returns a value that the setting does not have by default."""
  if name in OTHER:
    return OTHER[name]
  group, _, key = name.rpartition(".")
  kind = type(operator.attrgetter(group)(make())) if group else Config
  field = kind.__dataclass_fields__[key]
  now = operator.attrgetter(name)(make())
  if field.metadata["choices"]:
    return next((choice for choice in field.metadata["choices"] if choice != now), "other")
  if isinstance(now, bool):
    return not now
  if isinstance(now, (int, float)):
    return now / 2 if isinstance(now, float) and now else now + 1
  return {str: "other"}.get(type(now)) or (3 if "int" in str(field.type) else "x" if "str" in str(field.type) else 0.5)


def changed(name):
  return with_setting(make(), name, another(name))


def test_every_setting_is_decided_once():
  """A new setting needs a place in FIXED, WARNED or FREE of lmjax/resume.py."""
  assert sorted(DECIDED) == sorted(name for name, _, _ in config_lib.settings_help())


@pytest.mark.parametrize("name", sorted(set(resume.FIXED)))
def test_a_fixed_setting_is_refused_with_both_values_and_the_way_out(name):
  old, new = operator.attrgetter(name)(make()), another(name)
  with pytest.raises(UserError) as error:
    resume.check_resume(dataclasses.asdict(make()), changed(name), "w")
  assert str(error.value) == (
      f"The run in w has config.{name} = {old!r}, but now it is {new!r}; to go on keep {old!r}, to start another run "
      "give another --workdir.")


@pytest.mark.parametrize("name", sorted(set(resume.WARNED) - resume.OFF.keys() - DURATION))
def test_a_change_of_what_is_learned_is_told(name):
  old, new = operator.attrgetter(name)(make()), another(name)
  assert resume.check_resume(dataclasses.asdict(make()), changed(name), "w") == [
      f"config.{name} = {new!r} (it was {old!r})"]


@pytest.mark.parametrize("name", sorted(set(resume.FREE) - DURATION))
def test_other_settings_change_silently(name):
  assert changed(name) != make()
  assert resume.check_resume(dataclasses.asdict(make()), changed(name), "w") == []


@pytest.mark.parametrize("name, values", [("train.ema_decay", (0.9, 0.99)), ("train.on_spike", ("skip", "stop"))])
def test_what_has_a_part_of_the_state_may_change_but_not_begin_or_end(name, values):
  off, (first, second) = with_setting(make(), name, resume.OFF[name]), (with_setting(make(), name, v) for v in values)
  assert len(resume.check_resume(dataclasses.asdict(first), second, "w")) == 1
  for before, now in ((off, first), (first, off)):
    with pytest.raises(UserError, match=f"config.{name} = "):
      resume.check_resume(dataclasses.asdict(before), now, "w")


def tokenizer(fingerprint):
  return types.SimpleNamespace(fingerprint=fingerprint)


def test_a_workdir_whose_config_is_damaged_or_gone(tmp_path):
  resume.check_workdir(tmp_path, make(), tokenizer("a"))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json is not valid JSON .*; put back the one .*, or remove it"):
    resume.check_workdir(tmp_path, make(), tokenizer("a"))


def test_other_text_is_told_before_the_sizes_that_follow_from_it(tmp_path):
  pytest.importorskip("tokenizers")
  from lmjax.data.tokenizer import byte_tokenizer
  byte_tokenizer().save(tmp_path / "tokenizer.json")
  (tmp_path / "config.json").write_text(config_lib.to_json(make()))
  resume.check_workdir(tmp_path, make(), byte_tokenizer())
  with pytest.raises(UserError, match="The text has changed since .*, and with it the tokenizer; to go on"):
    resume.check_workdir(tmp_path, changed("model.vocab_size"), tokenizer("other"))
  with pytest.raises(UserError, match="config.data.tokenizer = 'bpe', but now it is 'other'"):
    resume.check_workdir(tmp_path, changed("data.tokenizer"), tokenizer("other"))


def test_only_a_finished_result_counts(tmp_path):
  assert resume.finished_result(tmp_path) is None
  (tmp_path / "result.json").write_text(json.dumps({"status": "interrupted", "step": 3}))
  assert resume.finished_result(tmp_path) is None
  (tmp_path / "result.json").write_text(json.dumps({"status": "finished", "step": 3}))
  assert resume.finished_result(tmp_path) == {"status": "finished", "step": 3}
