"""What runs say while they train: loss against compute from metrics.jsonl, its envelope, and the noise of gradients.

A curve is of the first evaluation set's loss where a run is evaluated often enough in the loop, else of the smoothed
training loss. What the envelope of curves says holds for runs whose learning rate has not decayed at these points: a
decayed run of the same compute is better (Hoffmann et al. 2022, arXiv 2203.15556, section 3.1 and appendix B).
"""

import dataclasses
from typing import Any, Sequence

from etils import epath
import numpy as np

from lmjax.records import read_lines
from lmjax.scaling.laws import Points
from lmjax.scaling.minima import power_law
from lmjax.scaling.noise import gradient_noise
from lmjax.scaling.runs import Table

_FEWEST = 3  # Evaluations that make a curve.
_MOST = 2000  # Steps of one, for smoothing takes the square of their number.
_WIDTH = 0.15  # Of the smoothing, in log compute: loss falls by power laws.
_GRID = 60  # Computes at which the envelope is read.


@dataclasses.dataclass(frozen=True)
class Curve:
  """A run while it trains.

  Attributes:
    name: of the run.
    size: number of parameters.
    tokens: seen so far, [steps].
    flops: spent so far, [steps].
    loss: [steps].
    evaluated: whether it is of evaluations, and not of smoothed training loss.
  """
  name: str
  size: float
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  evaluated: bool


def while_training(table: Table, points: Points) -> tuple[list[Curve], dict[str, Any]]:
  """Returns the curves of a sweep's runs, of one kind, and what `lmjax fit` prints of them and of their gradients.

  Args:
    table: of the sweep; that of a file has no curves.
    points: of the runs, by whose convention compute is counted.
  """
  files = [epath.Path(folder) / "metrics.jsonl" for folder in table.folders]
  lines = [read_lines(file) if file.exists() else [] for file in files]
  made = [curve(name, points.size[i], rows, points.flops[i] / points.tokens[i])
          for i, (name, rows) in enumerate(zip(table.names, lines))]
  curves = _alike([one for one in made if one is not None])
  told = {"curve_envelope": curve_envelope(curves), "critical_batch": None}
  if lines:
    column = table.columns.get
    settings = zip(column("train.batch_size", ()), column("data.seq_len", ()), column("train.grad_accum_steps", ()))
    noise = [critical_batch(name, rows, batch * length, count)
             for name, rows, (batch, length, count) in zip(table.names, lines, settings)]
    known = [i for i, one in enumerate(noise) if one]
    if known:
      tokens = [table.columns["num_tokens"][i] for i in known]
      told["critical_batch"] = {"runs": [noise[i] for i in known],
                                "law": critical_batch_law([noise[i] for i in known], tokens)}
  return curves, told


def curve(name: str, size: float, lines: Sequence[dict[str, Any]], flops_per_token: float) -> Curve | None:
  """Returns a run's curve; None where its lines make none.

  Args:
    name: of the run.
    size: its parameters.
    lines: of its metrics.jsonl.
    flops_per_token: by which its compute is counted.
  """
  trained = [line for line in lines if _is_number(line.get("loss")) and line.get("num_tokens") and line.get("step")]
  if len(trained) < _FEWEST:
    return None
  tokens_a_step = trained[-1]["num_tokens"] / trained[-1]["step"]
  losses = next((key for line in lines for key in line if key.endswith("/loss")), None)
  evaluations = [line for line in lines if losses and _is_number(line.get(losses))]
  evaluated = len(evaluations) >= _FEWEST
  rows, key = (evaluations, losses) if evaluated else (trained[::-(-len(trained) // _MOST)], "loss")
  steps = np.array([row["step"] for row in rows], float)
  loss = np.array([row[key] for row in rows], float)
  return Curve(name, size, steps * tokens_a_step, steps * tokens_a_step * flops_per_token,
               loss if evaluated else smoothed(np.log(steps), loss), evaluated)


def smoothed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns y averaged over x by a normal kernel of width 0.15, each time by a line, which no slope biases."""
  found = np.empty_like(y)
  for i, middle in enumerate(x):
    weights = np.exp(-0.5 * ((x - middle) / _WIDTH) ** 2)
    design = np.stack([np.ones_like(x), x - middle], axis=1) * np.sqrt(weights)[:, None]
    found[i] = np.linalg.lstsq(design, y * np.sqrt(weights), rcond=None)[0][0]
  return found


def curve_envelope(curves: Sequence[Curve]) -> dict[str, Any] | None:
  """Returns the envelope of curves: for each compute the run of least loss, and power laws of what it is.

  Curves of training loss are left out where others are of evaluations. Computes at which one run has all curves to
  itself tell of nothing but that run, and are left out.

  Args:
    curves: of runs.

  Returns:
    `flops`, `loss` and `run` of the envelope, with power laws of loss, size and tokens; None where fewer than two
    runs are on it.
  """
  curves = _alike(curves)
  if len(curves) < 2:
    return None
  low, high = min(one.flops[0] for one in curves), max(one.flops[-1] for one in curves)
  rows = []
  for flops in np.geomspace(low, high, _GRID):
    known = [(_at(one, one.loss, flops), _at(one, one.tokens, flops), one) for one in curves
             if one.flops[0] <= flops <= one.flops[-1]]
    if len(known) > 1:
      loss, tokens, best = min(known, key=lambda row: row[0])
      rows.append((flops, loss, best.size, tokens, best.name))
  if len({row[-1] for row in rows}) < 2:
    return None
  flops, loss, size, tokens = (np.array(column) for column in list(zip(*rows))[:4])
  law = lambda values: dataclasses.asdict(power_law(flops, values))
  return {"of": "evaluations" if curves[0].evaluated else "smoothed training loss",
          "runs": list(dict.fromkeys(row[-1] for row in rows)), "flops": flops.tolist(), "losses": loss.tolist(),
          "run": [row[-1] for row in rows],
          # Points of one curve share its noise, so that intervals from their scatter would be too short.
          **{name: {k: v for k, v in law(values).items() if "interval" not in k}
             for name, values in (("loss", loss), ("size", size), ("tokens", tokens))}}


def _alike(curves: Sequence[Curve]) -> list[Curve]:
  """Returns the curves without those of training loss where others are of evaluations."""
  return [one for one in curves if one.evaluated or not any(other.evaluated for other in curves)]


def _at(one: Curve, values: np.ndarray, flops: float) -> float:
  return float(np.exp(np.interp(np.log(flops), np.log(one.flops), np.log(values))))


def critical_batch(name: str, lines: Sequence[dict[str, Any]], batch_tokens: float, count: int
                   ) -> dict[str, Any] | None:
  """Returns what a run's gradients say of the critical batch size, in tokens, over the second half of its steps.

  The noise grows while the loss falls, and the second half is what most of the tokens are spent on. Steps are taken to
  be independent of each other.

  Args:
    name: of the run.
    lines: of its metrics.jsonl, with `square_small` and `square_big` (train.gradient_noise).
    batch_tokens: of a whole batch.
    count: microbatches in it.

  Returns:
    What is printed; None where the run has recorded no norms.
  """
  rows = [line for line in lines if _is_number(line.get("square_small")) and _is_number(line.get("square_big"))]
  rows = rows[len(rows) // 2:]
  if not rows:
    return None
  found = gradient_noise(np.array([row["square_small"] for row in rows]), np.array([row["square_big"] for row in rows]),
                         batch_tokens / count, batch_tokens)
  return {"run": name, "tokens": found.critical_batch_size, "interval": list(found.interval), "steps": len(rows),
          "loss": float(np.mean([row["loss"] for row in rows])), "squared_norm": found.squared_norm,
          "noise": found.noise}


def critical_batch_law(found: Sequence[dict[str, Any]], num_tokens: Sequence[float]) -> dict[str, Any] | None:
  """Returns the power law of critical batch sizes in the tokens of the runs; None where fewer than three are known."""
  known = [(d, one["tokens"]) for one, d in zip(found, num_tokens) if one["tokens"]]
  if len({d for d, _ in known}) < 3:
    return None
  x, y = (np.array(column, float) for column in zip(*known))
  return {"formula": "critical batch = coefficient * num_tokens^exponent", **dataclasses.asdict(power_law(x, y))}


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and bool(np.isfinite(value)) and value > 0
