"""How long a user waits: for `lmjax --help`, and from `lmjax train` to the first step of the quickstart.

    python tests/benchmarks/startup.py [--quick] [--rounds=N] [--json=FILE]

Every run is a process of its own, timed from outside. The first step is over when metrics.jsonl has its line; the
process is stopped then. Cold means an empty cache folder (the text is tokenised, everything is compiled), warm the
cache that the cold run has left, with its token store and its compiled programs.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import harness

LIMIT = 600  # Seconds after which a run that has not made its first step counts as stuck.


def main() -> None:
  args = harness.parser(__doc__).parse_args()
  rounds = args.rounds or (3 if args.quick else 7)
  rows, notes = commands(rounds)
  with tempfile.TemporaryDirectory() as folder:
    rows += first_step(pathlib.Path(folder), rounds)
  harness.report("Start-up", rows, notes)


def commands(rounds: int) -> tuple[list[dict], str]:
  """Returns rows for what starts and ends at once, and what was missing."""
  lines = {
      "lmjax --help": ["-m", "lmjax", "--help"],
      "lmjax train --help": ["-m", "lmjax", "train", "--help"],
      "python -c pass": ["-c", "pass"],
      "python -c 'import jax'": ["-c", "import jax"],
      "python -c 'import lmjax.train'": ["-c", "import lmjax.train"],
      "python -c 'import transformers.trainer'": ["-c", "import transformers.trainer"],
  }
  variants, missing = {}, []
  for name, arguments in lines.items():
    run = lambda arguments=arguments: subprocess.run(
        [sys.executable, *arguments], env=environment(), cwd=harness.ROOT, check=True, capture_output=True)
    try:
      run()
    except subprocess.CalledProcessError:
      missing.append(f"{name} does not run here.")
      continue
    variants[name] = run
  seconds = harness.medians(harness.interleave(variants, rounds))
  return [{"what": name, "seconds": taken} for name, taken in seconds.items()], " ".join(missing)


def first_step(folder: pathlib.Path, rounds: int) -> list[dict]:
  """Returns the seconds from the start of the process to the end of the first step, cold and warm."""
  cache = folder / "cache"
  cold = train_until_first_step(folder / "cold", cache)
  warm = harness.interleave(
      {"warm": lambda: train_until_first_step(pathlib.Path(tempfile.mkdtemp(dir=folder)), cache)}, rounds)["warm"]
  return [{"what": "quickstart to its first step, cold", "seconds": cold},
          {"what": "quickstart to its first step, warm", "seconds": harness.medians({"warm": warm})["warm"],
           "fastest": min(warm), "slowest": max(warm)}]


def train_until_first_step(workdir: pathlib.Path, cache: pathlib.Path) -> float:
  """Starts a run, and stops it when its first line of metrics is there; returns the seconds that took."""
  command = [sys.executable, "-m", "lmjax", "train", "--config=experiments/quickstart.py", f"--workdir={workdir}",
             "--config.train.log_every_steps=1"]
  metrics = workdir / "metrics.jsonl"
  start = time.perf_counter()
  process = subprocess.Popen(command, env=environment(LMJAX_CACHE_DIR=str(cache)), cwd=harness.ROOT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  try:
    while not (metrics.exists() and metrics.stat().st_size):
      if process.poll() is not None:
        raise RuntimeError(f"The run ended before its first step: {process.stderr.read()}")
      if time.perf_counter() - start > LIMIT:
        raise RuntimeError(f"The run has not made a step in {LIMIT} seconds.")
      time.sleep(0.01)
    return time.perf_counter() - start
  finally:
    process.kill()
    process.communicate()


def environment(**extra: str) -> dict[str, str]:
  """Returns this process's environment with the repository importable, and large pages as launch/local.sh sets them."""
  paths = [str(harness.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **extra}


if __name__ == "__main__":
  main()
