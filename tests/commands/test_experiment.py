"""Tests of lmjax.commands.experiment: what --config and its overrides make, and what each mistake is told."""

from absl import flags
import pytest

from lmjax.commands import experiment
from lmjax.config import UserError

EXPERIMENT = """\
from lmjax.config import base_config
def get_config(arg="plain"):
  c = base_config()
  c.train.num_steps = 10
  if arg == "typo":
    c.optim.lerning_rate = 1.0
  if arg == "group":
    c.optimm.learning_rate = 1.0
  if arg == "unknown":
    c.optim.zzzzzz = 1.0
  if arg == "type":
    c.optim.learning_rate = "a"
  if arg == "raises":
    1 / 0
  if arg == "nothing":
    return None
  return c
"""


@pytest.fixture
def path(tmp_path):
  (tmp_path / "exp.py").write_text(EXPERIMENT)
  return str(tmp_path / "exp.py")


def read(*argv):
  flag_values = flags.FlagValues()
  experiment.define_config_flags(flag_values)
  flag_values(["lmjax", *experiment.rewrite_overrides(argv)])
  return experiment.read_config(flag_values)


def test_the_file_alone(path):
  config = read(f"--config={path}")
  assert config.train.num_steps == 10 and config.optim.learning_rate == 1e-3


@pytest.mark.parametrize("override, group, name, value", [
    ("--config.train.num_steps=1e3", "train", "num_steps", 1000),
    ("--config.train.num_steps=1_000", "train", "num_steps", 1000),
    ("-config.train.num_steps=7", "train", "num_steps", 7),
    ("--config.optim.learning_rate=3e-4", "optim", "learning_rate", 3e-4),
    ("--config.optim.learning_rate=1", "optim", "learning_rate", 1.0),
    ("--config.optim.clip_norm=None", "optim", "clip_norm", None),
    ("--config.checkpoint.restore_from=none", "checkpoint", "restore_from", None),
    ("--config.model.remat_policy=none", "model", "remat_policy", "none"),
    ("--config.train.num_tokens=None", "train", "num_steps", 10),
    ("--config.model.num_kv_heads=2", "model", "num_kv_heads", 2),
    ("--config.model.scan_layers=false", "model", "scan_layers", False),
    ("--noconfig.model.scan_layers", "model", "scan_layers", False),
    ("--config.model.gated_mlp", "model", "gated_mlp", True),
    ("--config.data.source=a b=c*.txt", "data", "source", "a b=c*.txt"),
    ("--config.data.source=12", "data", "source", "12"),
    ("--config.checkpoint.restore_from=runs/a", "checkpoint", "restore_from", "runs/a"),
    ("--config.eval.sets=train", "eval", "sets", ("train",)),
    ("--config.eval.sets=train,validation", "eval", "sets", ("train", "validation")),
    ("--config.eval.sets=('train','mine=x.txt,y.txt')", "eval", "sets", ("train", "mine=x.txt,y.txt")),
    ("--config.eval.sets=mine=/x/y.txt", "eval", "sets", ("mine=/x/y.txt",)),
    ("--config.data.weights=2", "data", "weights", (2,)),
    ("--config.optim.weight_decay_policy=(('a',0.5),)", "optim", "weight_decay_policy", (("a", 0.5),)),
])
def test_an_override(path, override, group, name, value):
  result = getattr(getattr(read(f"--config={path}", override), group), name)
  assert result == value and type(result) is type(value)


def test_the_order_of_the_flags_does_not_matter(path):
  assert read("--config.seed", "3", f"--config={path}").seed == 3


def test_a_tuple_given_in_parts_is_collected_and_a_number_given_twice_is_replaced(path):
  config = read(f"--config={path}", "--config.eval.sets=train", "--config.eval.sets=validation", "--config.seed=1",
                "--config.seed=2")
  assert config.eval.sets == ("train", "validation") and config.seed == 2


def test_a_duration_in_other_units_replaces_that_of_the_file(path):
  train = read(f"--config={path}", "--config.train.num_tokens=1e6").train
  assert (train.num_steps, train.num_tokens) == (None, 1e6)


@pytest.mark.parametrize("override, message", [
    ("--config.optim.lerning_rate=1", "is not a setting; did you mean 'optim.learning_rate'?"),
    ("--config.learning_rate=1", "did you mean 'optim.learning_rate'?"),
    ("--config.zzz=1", "--config.zzz is not a setting; --help_config lists them all."),
    ("--config.optim=1", "--config.optim is a group of settings; write --config.optim.NAME=VALUE."),
    ("--config.optim.learning_rate", "--config.optim.learning_rate has no value"),
    ("--config.optim.learning_rate=fast", "is 'fast', but it must be a value of type float."),
    ("--config.train.num_steps=1.5", "is '1.5', but it must be a value of type int."),
    ("--config.model.scan_layers=perhaps", "is 'perhaps', but it must be true or false."),
    ("--noconfig.optim.learning_rate", "is of type float; write --config.optim.learning_rate=VALUE."),
    ("--config.train.batch_size=None", "config.train.batch_size is None, but it needs a value of type int."),
    ("--config.train.batch_size=0", "config.train.batch_size is 0, but it must be at least 1 sequences."),
    ("--config.train.num_steps=None", "The length of the run is not set"),
    ("--config.data.weights=(1,", "must be a tuple such as"),
])
def test_a_wrong_override(path, override, message):
  with pytest.raises(UserError) as e:
    read(f"--config={path}", override)
  assert message in str(e.value) and "\n" not in str(e.value)


def test_a_value_is_missing_where_the_next_flag_stands(path):
  with pytest.raises(UserError, match="--config.seed has no value"):
    read("--config.seed", f"--config={path}")


@pytest.mark.parametrize("arg, message", [
    ("typo", "line 6, uses a setting 'lerning_rate' that does not exist; did you mean 'learning_rate'?"),
    ("group", "line 8, uses a setting 'optimm' that does not exist; did you mean 'optim'?"),
    ("unknown", "line 10, uses a setting 'zzzzzz' that does not exist; --help_config lists them all."),
    ("type", "line 12, raised TypeError (Could not override field 'learning_rate'"),
    ("raises", "line 14, raised ZeroDivisionError (division by zero); mend the file."),
    ("nothing", "returned NoneType, but it must return the ConfigDict"),
])
def test_a_mistake_in_the_file(path, arg, message):
  with pytest.raises(UserError) as e:
    read(f"--config={path}:{arg}")
  assert message in str(e.value) and path in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, argument, message", [
    ("def get_config(: pass", "", "line 1, is not valid Python: invalid syntax."),
    ("x = 1", "", "has no function get_config()"),
    ("import no_such_module", "", "line 1, raised ModuleNotFoundError (No module named 'no_such_module'); mend"),
    ("def get_config(): return {}", "", "returned dict, but it must return the ConfigDict"),
    ("def get_config(): return {}", ":small", "takes no argument, but 'small' was given; write --config="),
    ("def get_config(size): return {}", "", "needs an argument; write --config="),
    ("from lmjax.config import UserError\ndef get_config(size): raise UserError('No size x.')", ":x", "No size x."),
])
def test_a_file_that_is_no_experiment(tmp_path, text, argument, message):
  (tmp_path / "exp.py").write_text(text)
  with pytest.raises(UserError) as e:
    read(f"--config={tmp_path / 'exp.py'}{argument}")
  assert message in str(e.value)


@pytest.mark.parametrize("name", ["missing.py", ".", ""])
def test_a_path_that_is_no_file(name):
  with pytest.raises(UserError, match="names no file .*such as experiments/quickstart.py"):
    read(f"--config={name}")
