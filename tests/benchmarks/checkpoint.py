"""How long a save holds up training, how fast checkpoints are written, and how much is read to restore one.

    python tests/benchmarks/checkpoint.py [--quick] [--rounds=N] [--json=FILE]

Saving: a state is trained on, with a step of about a tenth of a second, and saved by `Checkpointer`, waiting for the
files (sync) or not (async). An async save blocks from the call to its return; what else it costs is how much longer
than usual the steps take until the files are there. Beside it the same bytes are written to one file and fsynced, which
is what the disk can do, and copied in memory, which is what no save can be faster than.

Restoring: in a process with 8 virtual devices, a state laid out in one way is restored in another. What the process
reads is counted by the system (rchar of /proc/self/io): first to verify the checksums, then to restore.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable

from etils import epath
import harness
import jax
import jax.numpy as jnp
import numpy as np

from lmjax import checkpoint
from lmjax.checkpoint import record
from lmjax.config import CheckpointConfig

LAYOUTS = ("rows", "columns", "replicated", "one device", "rows x columns")


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument("--restore_in", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.restore_in:
    print(json.dumps(restoring(pathlib.Path(args.restore_in), args.quick)))
    return
  rounds = args.rounds or (3 if args.quick else 9)
  with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
    rows = saving(pathlib.Path(folder) / "saving", 1 if args.quick else 6, rounds)
    rows += restoring_rows(pathlib.Path(folder), args.quick)
  harness.report("Checkpoints", rows)


def make_state(num_layers: int, width: int = 512, vocab: int = 8192) -> dict[str, Any]:
  """Returns parameters of a GPT-2's shapes, and two moments as large."""
  def params(seed: int) -> dict[str, jax.Array]:
    shapes = {"embed": (vocab, width), "query": (num_layers, width, 8, width // 8),
              "key": (num_layers, width, 8, width // 8), "value": (num_layers, width, 8, width // 8),
              "out": (num_layers, 8, width // 8, width), "up": (num_layers, width, 4 * width),
              "down": (num_layers, 4 * width, width), "norm": (num_layers, width)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  return {"step": np.int32(0), "params": params(0), "mu": params(1), "nu": params(2)}


def num_bytes(state: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(state))


# Saving.


@jax.jit
def _work(x: jax.Array) -> jax.Array:
  return jax.lax.fori_loop(0, 8, lambda _, y: jnp.tanh(y @ y) * 0.1, x)


def _update(state: dict[str, Any]) -> dict[str, Any]:
  return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)


class Loop:
  """A stand-in for training: matrix products of about a tenth of a second, then an update of the donated state."""

  def __init__(self, state: dict[str, Any]):
    self._update = jax.jit(_update, donate_argnums=0)
    self._x = jnp.ones((1024, 1024), jnp.float32)
    self.state = jax.device_put(state)

  def step(self) -> float:
    start = time.perf_counter()
    work = _work(self._x)
    self.state = self._update(self.state)
    jax.block_until_ready((work, self.state))
    return time.perf_counter() - start


def saving(folder: pathlib.Path, num_layers: int, rounds: int) -> list[dict]:
  loop = Loop(make_state(num_layers))
  size = num_bytes(loop.state)
  savers = {how: checkpoint.Checkpointer(folder / how, CheckpointConfig(async_save=how == "async"))
            for how in ("sync", "async")}
  blocked = {"sync": [], "async": []}
  written, slower = [], []
  steps = itertools.count(1)
  loop.step()

  def sync() -> None:
    blocked["sync"].append(harness.timed(lambda: savers["sync"].save(next(steps), loop.state, {})))

  def asynchronous() -> None:
    usual = harness.medians({"step": [loop.step() for _ in range(5)]})["step"]
    start = time.perf_counter()
    savers["async"].save(next(steps), loop.state, {})
    returned = time.perf_counter()
    blocked["async"].append(returned - start)
    taken = [loop.step()]
    while savers["async"]._manager.is_saving_in_progress():
      taken.append(loop.step())
    written.append(time.perf_counter() - start)
    slower.append(sum(taken) - len(taken) * usual)
    savers["async"].wait()

  arrays = jax.tree.leaves(jax.tree.map(np.array, loop.state))
  copies = [np.array(x) for x in arrays]
  variants = {"sync": sync, "async": asynchronous, "file": lambda: write_file(folder / "file", arrays),
              "copy": lambda: [np.copyto(a, b) for a, b in zip(copies, arrays)]}
  for call in variants.values():
    call()
  for values in (blocked["sync"], blocked["async"], written, slower):
    values.clear()
  seconds = harness.interleave(variants, rounds)
  for saver in savers.values():
    saver.close()
  middle = harness.medians({**blocked, "written": written, "slower": slower, "file": seconds["file"],
                            "copy": seconds["copy"]})
  whole, rate = middle["sync"], lambda taken: size / taken / 1e6
  return [
      {"what": "sync save", "seconds": whole, "of sync": 1.0, "MB/s": rate(whole)},
      {"what": "async save, until it returns", "seconds": middle["async"], "of sync": middle["async"] / whole},
      {"what": "async save, steps after it slower by", "seconds": middle["slower"],
       "of sync": middle["slower"] / whole},
      {"what": "async save, until the files are there", "seconds": middle["written"],
       "of sync": middle["written"] / whole, "MB/s": rate(middle["written"])},
      {"what": "one file with the same bytes, fsynced", "seconds": middle["file"], "of sync": middle["file"] / whole,
       "MB/s": rate(middle["file"])},
      {"what": "a copy in memory, into pages in use", "seconds": middle["copy"], "of sync": middle["copy"] / whole,
       "MB/s": rate(middle["copy"])},
  ]


def write_file(path: pathlib.Path, arrays: list[np.ndarray]) -> None:
  path.unlink(missing_ok=True)
  with open(path, "wb") as file:
    for array in arrays:
      file.write(array.data)
    file.flush()
    os.fsync(file.fileno())


# Restoring.


def restoring_rows(folder: pathlib.Path, quick: bool) -> list[dict]:
  """Runs `restoring` in a process with 8 devices."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
         "PYTHONPATH": str(harness.ROOT)}
  command = [sys.executable, __file__, f"--restore_in={folder / 'restoring'}", *(["--quick"] if quick else [])]
  process = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(process.stdout.splitlines()[-1])


def restoring(folder: pathlib.Path, quick: bool) -> list[dict]:
  state = make_state(1 if quick else 6)
  state["params"] = {name: x for name, x in state["params"].items() if name != "norm"}
  rows = []
  for saved, wanted in (("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("rows", "replicated"),
                        ("replicated", "columns"), ("one device", "rows x columns"), ("rows x columns", "rows")):
    workdir = folder / saved
    if not workdir.exists():
      save(workdir, lay_out(state, saved))
    rows.append(restore(workdir, state, saved, wanted))
  return rows


def lay_out(state: Any, layout: str) -> Any:
  return jax.tree.map(lambda x: jax.device_put(x, sharding(layout, x.shape)), state)


def sharding(layout: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
  """Splits the last two axes of a shape, those that 8 divides, over 8 devices."""
  P = jax.sharding.PartitionSpec
  devices = jax.devices()
  if layout == "one device":
    return jax.sharding.SingleDeviceSharding(devices[0])
  mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("a", "b"))
  whole = [None] * max(0, len(shape) - 2)
  both = ("a", "b")
  specs = {"rows": P(*whole, both, None), "columns": P(*whole, None, both), "replicated": P(),
           "rows x columns": P(*whole, "a", "b")}
  return jax.sharding.NamedSharding(mesh, specs[layout] if len(shape) > 1 and shape[-2] % 8 == 0 else P())


def save(workdir: pathlib.Path, state: Any) -> None:
  saver = checkpoint.Checkpointer(workdir, CheckpointConfig(async_save=False))
  saver.save(1, state, {})
  saver.close()


def restore(workdir: pathlib.Path, state: Any, saved: str, wanted: str) -> dict:
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(wanted, x.shape)), state)
  files = [path for path in (workdir / "checkpoints" / "1").rglob("*") if path.is_file()]
  stored = sum(path.stat().st_size for path in files)
  saver = checkpoint.Checkpointer(workdir, CheckpointConfig())
  step_folder = workdir / "checkpoints" / "1" / "state"
  verifying, verify_bytes = counted(lambda: record.damage(epath.Path(step_folder), 0, 1))
  restored = []
  whole, whole_bytes = counted(lambda: restored.append(jax.block_until_ready(saver.restore(abstract)[0])))
  saver.close()
  for found, expected in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state)):
    assert np.array_equal(found, expected)
  return {"what": f"restore, {saved} to {wanted}", "seconds": whole, "of which verifying": verifying,
          "MB/s": stored / whole / 1e6, "read to verify": verify_bytes / stored,
          "read to restore": (whole_bytes - verify_bytes) / stored}


def counted(call: Callable[[], Any]) -> tuple[float, int]:
  """Returns the seconds that a call takes and the bytes that this process reads in it."""
  before = bytes_read()
  seconds = harness.timed(call)
  return seconds, bytes_read() - before


def bytes_read() -> int:
  lines = pathlib.Path("/proc/self/io").read_text().splitlines()
  return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


if __name__ == "__main__":
  main()
