"""The best checkpoint of a run by a metric of its evaluations: kept for good, and what readers of the run take.

`best.json` in the workdir names it. It is written when the checkpoint is there.
"""

import dataclasses
import json
import math
from typing import Any, Mapping

from etils import epath

from lmjax.config import EvalConfig, UserError
from lmjax.config_checks import nearest
from lmjax.scores import higher_is_better

_FILE = "best.json"


@dataclasses.dataclass(frozen=True)
class Best:
  """The best evaluation so far.

  Attributes:
    step: when it was; None before the first.
    value: of the metric.
    waited: evaluations since then.
  """
  step: int | None = None
  value: float | None = None
  waited: int = 0

  def after(self, step: int, values: Mapping[str, float], cfg: EvalConfig) -> "Best":
    """Returns the best with another evaluation seen; one that is not better by more than `best_min_change` waits.

    Args:
      step: of the evaluation.
      values: its metrics by name.
      cfg: with the metric's name and whether it is to be small or large, which else follows from the name.

    Raises:
      UserError: where the evaluation has no such metric.
    """
    if cfg.best_metric not in values:
      raise UserError(f"config.eval.best_metric is {cfg.best_metric!r}, which the evaluations do not give"
                      f"{nearest(cfg.best_metric, values)}")
    value = float(values[cfg.best_metric])
    mode = cfg.best_mode or ("max" if higher_is_better(cfg.best_metric) else "min")
    gain = math.inf if self.value is None else (self.value - value) * (1 if mode == "min" else -1)
    if gain > cfg.best_min_change:
      return Best(step, value)
    return dataclasses.replace(self, waited=self.waited + 1)

  def is_over(self, cfg: EvalConfig) -> bool:
    """Has it waited for as many evaluations as `patience` allows?"""
    return cfg.patience is not None and self.waited >= cfg.patience


class KeepStep:
  """A preservation policy of Orbax: keeps the checkpoint of `step`, which may be set at any time."""

  def __init__(self):
    self.step: int | None = None

  def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
    """Returns which of the checkpoints to keep."""
    del context
    return [checkpoint.step == self.step for checkpoint in checkpoints]


def write(workdir: epath.Path, best: Best) -> None:
  """Names the best checkpoint of a run."""
  temporary = workdir / f"{_FILE}.tmp"
  temporary.write_text(json.dumps({"step": best.step, "value": best.value}) + "\n")
  temporary.replace(workdir / _FILE)


def read_step(workdir: epath.Path) -> int | None:
  """Returns the step of the best checkpoint, or None where the run names none."""
  path = epath.Path(workdir) / _FILE
  try:
    return json.loads(path.read_text())["step"] if path.exists() else None
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{path} is damaged ({e}); remove it, and the newest checkpoint is taken.") from e
