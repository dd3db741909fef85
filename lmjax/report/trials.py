"""The trials of a sweep as its report has them, and what can be asked of them."""

import dataclasses
import math
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax.records import curves_of, read_lines
from lmjax.report.page import large
from lmjax.sweeps.rows import Row
from lmjax.sweeps.space import is_number

# Settings that are no part of what is compared: repeats of the same.
_REPEATS = ("seed",)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A trial.

  Attributes:
    row: what the sweep says of it.
    result: its run's result.json; {} where there is none.
    folder: of its run.
    command: that makes its run again.
  """
  row: Row
  result: Mapping[str, Any]
  folder: epath.Path
  command: str

  @property
  def number(self) -> int:
    return self.row.number

  @property
  def value(self) -> float | None:
    """The metric, where the trial has come to its end."""
    return self.row.value if self.row.state == "complete" else None

  @property
  def seconds(self) -> float | None:
    """Device seconds of the run, starts and evaluations too, its share of what ran together; None where not known."""
    found = [value for name, value in self.result.items() if name.startswith("seconds_") and value is not None]
    share = self.result.get("num_devices", 1) / self.result.get("num_together", 1)
    return sum(found) * share if found else None

  def curves(self, most: int = 2000) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns (steps, values) of each metric that the run has logged; of long runs about `most` steps."""
    path = self.folder / "metrics.jsonl"
    return curves_of(read_lines(path, most)) if path.exists() else {}


def short(field: str) -> str:
  """Returns the last part of a setting's name, where that says what it is."""
  last = field.rpartition(".")[2]
  return field if last == "name" else last


def searched(trials: Sequence[Trial]) -> dict[str, list[Any]]:
  """Returns the settings that differ among trials, each with its values in order."""
  found: dict[str, list[Any]] = {}
  for trial in trials:
    for field, value in trial.row.settings.items():
      if value not in found.setdefault(field, []):
        found[field].append(value)
  return {field: ordered(values) for field, values in found.items() if len(values) > 1}


def ordered(values: Sequence[Any]) -> list[Any]:
  """Returns values in their order: numbers by size, and others by what they are called."""
  return sorted(values) if all(map(is_number, values)) else sorted(values, key=str)


def words(value: Any) -> str:
  """Writes the value of a setting."""
  if value is None or not isinstance(value, float):
    return "–" if value is None else str(value)
  return large(value) if abs(value) >= 1e4 else f"{value:.4g}"


def is_log(values: Sequence[Any]) -> bool:
  """Returns whether numbers are told apart by their ratios rather than by their differences."""
  return len(values) > 1 and all(map(is_number, values)) and min(values) > 0 and max(values) / min(values) >= 4


def best_of(trials: Sequence[Trial], mode: str) -> tuple[float, list[Trial]] | None:
  """Returns the best mean over seeds of the same settings, and the trials it is of; None where none is complete."""
  groups: dict[str, list[Trial]] = {}
  for trial in trials:
    if trial.value is not None:
      key = repr(sorted((f, repr(v)) for f, v in trial.row.settings.items() if f not in _REPEATS))
      groups.setdefault(key, []).append(trial)
  means = [(float(np.mean([trial.value for trial in group])), group) for group in groups.values()]
  return (min if mode == "min" else max)(means, key=lambda pair: pair[0]) if means else None


def importance(trials: Sequence[Trial]) -> tuple[str, dict[str, float]] | str:
  """Returns how much of the metric's variance each setting explains, or a sentence that says why it cannot be told.

  By functional ANOVA over a forest (Hutter et al. 2014, Proceedings of ICML), or, where scikit-learn is missing, by
  PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255); both are Optuna's.

  Args:
    trials: of a sweep.

  Returns:
    (name of the method, shares by setting, the largest first).
  """
  import optuna
  done = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
  fields = [field for field in searched(done) if all(field in trial.row.settings for trial in done)]
  if len(done) < 4 or not fields:
    return "Fewer than four trials with different settings are complete, which is too few to tell what matters."
  if len({trial.value for trial in done}) == 1:
    return "All complete trials have the same value, so nothing can be told of what matters."
  values = {field: [trial.row.settings[field] for trial in done] for field in fields}
  distributions = {field: _distribution(found) for field, found in values.items()}
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  study = optuna.create_study()
  study.add_trials([optuna.trial.create_trial(
      value=trial.value, distributions=distributions,
      params={field: _param(trial.row.settings[field], distributions[field]) for field in fields}) for trial in done])
  try:
    import sklearn  # noqa: F401
    name, evaluator = "functional ANOVA", optuna.importance.FanovaImportanceEvaluator(seed=0)
  except ImportError:
    name, evaluator = "PED-ANOVA", optuna.importance.PedAnovaImportanceEvaluator()
  return name, optuna.importance.get_param_importances(study, evaluator=evaluator)


def _distribution(values: Sequence[Any]) -> Any:
  from optuna.distributions import CategoricalDistribution, FloatDistribution
  if all(map(is_number, values)):
    return FloatDistribution(min(values), max(values), log=is_log(values))
  return CategoricalDistribution(list(dict.fromkeys(map(repr, values))))


def _param(value: Any, distribution: Any) -> Any:
  return repr(value) if hasattr(distribution, "choices") else float(value)
