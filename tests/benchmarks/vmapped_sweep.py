"""Times a sweep over learning rates of experiments/debug.py: trained together, one after another, and as single runs.

    python tests/benchmarks/vmapped_sweep.py [--quick]

Variants are the commands that a user types, Python's start and compiling included: `lmjax sweep`, whose worker trains
all trials together; `lmjax sweep --stack=1`, whose worker trains one after another; and `lmjax train` once for each
rate. The text is tokenised before; each variant begins with an empty cache of compiled programs, of which the single
runs after the first one profit. Losses of the sweeps and of the single runs are compared step by step. The programs of
a training step that a variant has compiled are counted in its cache.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import harness
import numpy as np

EXPERIMENT = """\
import runpy
from lmjax.sweeps import Sweep, values

def get_config():
  config = runpy.run_path({debug!r})["get_config"]()
  config.train.update(num_steps={steps}, log_every_steps=1)
  return config

def get_sweep():
  return Sweep(values("optim.learning_rate", {rates}))
"""


def run(folder: pathlib.Path, *argv: str) -> np.ndarray:
  """Returns seconds that a command takes, and those of the processor, with programs compiled into folder/compiled."""
  environment = {**os.environ, "PYTHONPATH": str(harness.ROOT), "LMJAX_CACHE_DIR": str(folder.parent / "cache"),
                 "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
  start = np.array([time.perf_counter(), _processor_seconds()])
  done = subprocess.run([sys.executable, "-m", "lmjax", *argv], env=environment, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(done.stderr)
  return np.array([time.perf_counter(), _processor_seconds()]) - start


def _processor_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def losses(workdir: pathlib.Path) -> list[float]:
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [record["loss"] for record in records if "loss" in record]


def programs(folder: pathlib.Path) -> int:
  """Returns how many programs of a training step were compiled."""
  names = [path.name for path in (folder / "compiled").iterdir()]
  return sum(name.startswith(("jit__train_step", "jit__update")) and not name.endswith("atime") for name in names)


def main() -> None:
  quick = harness.parser(__doc__).parse_args().quick
  steps, count = (20, 4) if quick else (50, 16)
  rates = [1e-4 * 10 ** (2.5 * i / (count - 1)) for i in range(count)]
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    (root / "experiment.py").write_text(EXPERIMENT.format(
        debug=str(harness.ROOT / "experiments" / "debug.py"), steps=steps, rates=rates))
    config, folders = f"--config={root / 'experiment.py'}", {name: root / name for name in ("stack", "turn", "own")}
    run(root / "data", "data", config)
    seconds = {
        "stack": run(folders["stack"], "sweep", config, f"--workdir={folders['stack'] / 'sweep'}"),
        "turn": run(folders["turn"], "sweep", config, f"--workdir={folders['turn'] / 'sweep'}", "--stack=1"),
        "own": sum(run(folders["own"], "train", config, f"--config.optim.learning_rate={rate!r}",
                       f"--workdir={folders['own'] / str(i)}") for i, rate in enumerate(rates))}
    apart = {name: max(abs(a - b) for i in range(count) for a, b in zip(
        losses(folders[name] / "sweep" / "trials" / f"{i:03}"), losses(folders["own"] / str(i)), strict=True))
             for name in ("stack", "turn")}
    words = {"stack": "together", "turn": "one after another, in a worker", "own": f"{count} single runs"}
    harness.report(f"{count} learning rates of debug.py, {steps} steps", [
        {"how": words[name], "seconds": seconds[name][0], "share of single runs": seconds[name][0] / seconds["own"][0],
         "processor seconds": seconds[name][1], "their share": seconds[name][1] / seconds["own"][1],
         "programs of the step": programs(folders[name]), "largest difference of a loss": f"{apart.get(name, 0.0):.1e}"}
        for name in words])


if __name__ == "__main__":
  main()
