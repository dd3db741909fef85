"""check that activations do not grow with width or depth

Trains the experiment for a few steps from its initial weights, at a constant learning rate, at each of several widths
(mlp_dim and heads in proportion) and depths, under its config.model.parametrization and under the standard one, on the
same batches. Prints how the change of every activation since the start goes with the size, as an exponent, and its
standard error over the seeds: within 0.05 of zero where it does not. Writes DIR/coordcheck.json and DIR/coordcheck.png.

  lmjax coordcheck --config=experiments/debug.py --workdir=runs/coordcheck --config.model.parametrization=mup \\
    --config.model.base_embed_dim=64
  lmjax coordcheck --config=FILE --workdir=DIR --widths=128,512 --depths=2,4,8 --steps=8 --seeds=1
"""

import dataclasses
import itertools
import json
import math
from typing import Any

from absl import flags, logging

from lmjax.commands import experiment
from lmjax.config import Config, UserError

REQUIRED = ("config", "workdir")
POSITIONAL = None

_DEPTHS = ["2", "4", "8", "16"]


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)
  flags.DEFINE_string("workdir", None, "Folder or object-store URL that the numbers and the picture are written to.",
                      flag_values=flag_values)
  flags.DEFINE_list("widths", ["64", "128", "256", "512", "1024"], "Values of embed_dim; empty checks no width.",
                    flag_values=flag_values)
  flags.DEFINE_list("depths", None, f"Values of num_layers; empty checks no depth. Not given, {','.join(_DEPTHS)} for "
                    "the parametrization completep and none for others.", flag_values=flag_values)
  flags.DEFINE_integer("steps", 4, "Steps of each.", flag_values=flag_values)
  flags.DEFINE_integer("seeds", 3, "Initial weights of each, over which is averaged.", flag_values=flag_values)
  flags.DEFINE_string("grow", "heads", "What grows with the width: heads, which are more, or head_dim.",
                      flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  config = experiment.read_config(flag_values)
  kinds = dict.fromkeys([config.model.parametrization, "standard"])
  depths = _DEPTHS if flag_values.depths is None and "completep" in kinds else flag_values.depths
  sizes = {"width": _sizes("widths", flag_values.widths), "depth": _sizes("depths", depths or [])}
  sizes = {axis: values for axis, values in sizes.items() if values}
  if not sizes:
    raise UserError("--widths and --depths are both empty, so that there is nothing to check; give one of them.")
  for name in ("steps", "seeds"):
    if flag_values[name].value < 1:
      raise UserError(f"--{name} is {flag_values[name].value}, but it must be at least 1.")
  if flag_values.grow not in ("heads", "head_dim"):
    raise UserError(f"--grow is {flag_values.grow!r}, but it must be heads or head_dim.")

  from etils import epath

  from lmjax.scaling import coordinate_check, plots
  from lmjax.workdir import write_whole
  config, batches = _prepare(config, flag_values.workdir, flag_values.steps)
  sized = lambda axis, size: (coordinate_check.at_width(config.model, size, flag_values.grow) if axis == "width" else
                              coordinate_check.at_depth(config.model, size))
  # All sizes are made before the first is trained, so that what is wrong with one is told at once.
  models = {(axis, kind): [dataclasses.replace(sized(axis, size), parametrization=kind) for size in values]
            for axis, values in sizes.items() for kind in kinds}
  workdir = epath.Path(flag_values.workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"The workdir {workdir} cannot be made ({e.strerror}); give a folder that can.") from e
  found = {axis: {} for axis in sizes}
  for (axis, kind), each in models.items():
    logging.info("Training under %s at %s %s.", kind, axis, ", ".join(map(str, sizes[axis])))
    runs = []
    for size, model in zip(sizes[axis], each):
      runs.append(_measure(dataclasses.replace(config, model=model), batches, flag_values.seeds))
      _check_finite(runs[-1], f"{axis} {size} under {kind}", config.optim.learning_rate)
    found[axis][kind] = {"sizes": sizes[axis], "activations": coordinate_check.summarize(sizes[axis], runs)}
  report = {"steps": flag_values.steps, "seeds": flag_values.seeds, "learning_rate": config.optim.learning_rate,
            "tolerance": coordinate_check.TOLERANCE, "found": found, "config": dataclasses.asdict(config)}
  write_whole(workdir / "coordcheck.json", json.dumps(report, indent=2) + "\n")
  (workdir / "coordcheck.png").write_bytes(plots.coordinates(list(found.items())))
  for axis, by_kind in found.items():
    print("\n".join(lines(axis, by_kind, flag_values.steps, coordinate_check.TOLERANCE)))


def lines(axis: str, by_kind: dict[str, Any], steps: int, tolerance: float) -> list[str]:
  """Returns the table of slopes of one axis."""
  sizes = next(iter(by_kind.values()))["sizes"]
  names = list(next(iter(by_kind.values()))["activations"])
  slopes = {kind: [one["activations"][name]["slope"] for name in names] for kind, one in by_kind.items()}
  errors = {kind: [one["activations"][name]["slope_error"] for name in names] for kind, one in by_kind.items()}
  cell = lambda value, error: f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}")
  width = max(map(len, names))
  rows = [f"Change after {steps} steps as a power of the {axis}, over {sizes[0]} to {sizes[-1]}:",
          f"  {'':<{width}}" + "".join(f"  {kind:>15}" for kind in by_kind)]
  for name, row, row_errors in zip(names, zip(*slopes.values()), zip(*errors.values())):
    rows.append(f"  {name:<{width}}" + "".join(f"  {cell(*one):>15}" for one in zip(row, row_errors)))
  within = {kind: sum(abs(value) <= tolerance for value in values) for kind, values in slopes.items()}
  return [*rows, f"  {f'within {tolerance} of 0':<{width}}" + "".join(
      f"  {f'{count} of {len(names)}':>15}" for count in within.values())]


def _sizes(flag: str, texts: list[str]) -> list[int]:
  if not all(text.strip().isdecimal() and int(text) for text in texts):
    raise UserError(f"--{flag} is {','.join(texts)!r}, but it must be whole numbers with commas between.")
  sizes = sorted({int(text) for text in texts})
  if len(sizes) == 1:
    raise UserError(f"--{flag} has {sizes[0]} alone, but a slope needs two sizes or more; add some.")
  return sizes


def _prepare(config: Config, workdir: str, steps: int) -> tuple[Config, list[Any]]:
  """Returns the config with its sizes resolved and the first batches of its training."""
  from lmjax import partitioning, train
  from lmjax.loop import train_batches
  config = train.prepare(config)
  data = train.open_data(config, workdir)
  config = train.resolved(config, data)
  batches = train_batches(config, data, partitioning.make_mesh(config.mesh), 0)
  return config, list(itertools.islice(batches, steps))


def _check_finite(seeds: list[dict[str, Any]], of: str, rate: float) -> None:
  """Raises a UserError where training has broken a model, so that it has no slope and no picture."""
  for run in seeds:
    for name, one in run.items():
      if not all(math.isfinite(value) for values in one.values() for value in values):
        raise UserError(f"The activations {name} of {of} are not finite at config.optim.learning_rate = {rate:g}; give "
                        "a lower one.")


def _measure(config: Config, batches: list[Any], num_seeds: int) -> list[dict[str, Any]]:
  import numpy as np

  from lmjax import objectives, partitioning, train
  from lmjax.scaling import coordinate_check
  mesh = partitioning.make_mesh(config.mesh)
  with partitioning.use_mesh(mesh):
    setup = train.build(config, mesh)
    hparams = {"learning_rate": np.float32(config.optim.learning_rate), "seed": np.uint32(config.seed),
               "weight_decay": np.float32(config.optim.weight_decay)}
    rows = [partitioning.global_batch(mesh, batch, config.train.batch_size) for batch in batches]
    loss = lambda model, params, batch: setup.objective.loss(
        model, params, objectives.balance(setup.objective, batch, config.objective), config.objective)
    seeds = range(config.seed, config.seed + num_seeds)
    states = (train.init_state(setup._replace(config=dataclasses.replace(config, seed=seed))) for seed in seeds)
    return coordinate_check.measure(setup.model, loss, states, train.make_train_step(setup), rows, hparams)
