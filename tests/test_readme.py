"""What the README shows of the code is the code."""

import pathlib
import re

from lmjax import sweeps
from lmjax.config import base_config
from lmjax.data.task import parse_task
from lmjax.models import families
from lmjax.sweeps import sweep as sweeps_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_a_family_is_shown_as_it_was_added():
  *_, preset, table = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
  assert table == (ROOT / "lmjax/convert/olmo2.py").read_text()
  source = (ROOT / "lmjax/models/families.py").read_text()
  assert all(part.strip() in source for part in preset.split("\n\n\n"))
  assert "def olmo2(" in preset and len((preset + table).splitlines()) < 60


def test_a_task_is_declared_as_is_shown():
  shown = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
  config = base_config()
  exec(shown, {"config": config})
  task = parse_task(config.data.tasks[0], {})
  assert task.columns == ("title", "body", "stars") and task.num_labels == 2


def test_a_sweep_is_declared_as_is_shown():
  shown = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
  names = {**vars(sweeps)}
  exec(shown, names)
  sweep = sweeps_lib.resolve(names["get_sweep"]())
  first = sweeps_lib.planned_settings(sweep)
  assert len(first) == 8 and {"optim.learning_rate", "model.num_layers", "seed", "optim.name"} <= first[0].keys()


def test_every_preset_and_experiment_is_named():
  assert not [name for name in families.PRESETS if f"`{name}`" not in README]
  assert not [path.name for path in (ROOT / "experiments").rglob("*.py") if path.name not in README]
