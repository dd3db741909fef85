"""Checkpoints: exact round trips, what is kept, other meshes, kills, and damage that is never taken for data."""

import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from etils import epath
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import checkpoint
from lmjax.checkpoint import arrays, record
from lmjax.config import CheckpointConfig, UserError


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  ema: Any
  spike: Any


def make_state(seed: int, width: int = 48, ema: bool = True, optimizer: str = "adamw") -> State:
  """A state of a few kB with stacked, bfloat16, scalar and masked leaves, all different for each seed."""
  keys = jax.random.split(jax.random.key(seed), 4)
  params = {"decoder": {"layers": {"kernel": jax.random.normal(keys[0], (2, 16, width)),
                                   "scale": jax.random.normal(keys[1], (2, width)).astype(jnp.bfloat16)}},
            "embed": {"embedding": jax.random.normal(keys[2], (64, 16))}}
  tx = OPTIMIZERS[optimizer]
  _, opt_state = tx.update(jax.tree.map(lambda p: 0.5 * p, params), tx.init(params), params)
  average = jax.tree.map(lambda p: (0.9 * p).astype(p.dtype), params) if ema else None
  return State(jnp.int32(seed), params, opt_state, average, jnp.float32(0.1) * seed)


def _labels(params):
  return jax.tree.map(lambda p: "matrix" if p.ndim == 3 else "other", params)


OPTIMIZERS = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)),
    "masked": optax.chain(optax.masked(optax.scale_by_adam(), {"decoder": False, "embed": True}), optax.scale(-1.0)),
    "muon-like": optax.partition({"matrix": optax.trace(0.95), "other": optax.adamw(1e-3)}, _labels),
}


def abstract_of(state: Any) -> Any:
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def assert_same(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def write_run(workdir: Any, steps: tuple[int, ...] = (10, 20), **config) -> None:
  """Makes a run with a checkpoint at each of `steps`, the state of each made from its step."""
  checkpointer = checkpoint.Checkpointer(workdir, CheckpointConfig(**config))
  for step in steps:
    checkpointer.save(step, make_state(step), {"step": step})
  checkpointer.close()


def restore(workdir: Any, abstract: Any = None, **config) -> Any:
  checkpointer = checkpoint.Checkpointer(workdir, CheckpointConfig(**config))
  try:
    return checkpointer.restore(abstract_of(make_state(0)) if abstract is None else abstract)
  finally:
    checkpointer.close()


def folders(workdir: Any) -> list[str]:
  return sorted(path.name for path in (pathlib.Path(workdir) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
  """A run with checkpoints at 10 and 20, for tests that copy it before they break it."""
  workdir = tmp_path_factory.mktemp("run")
  write_run(workdir)
  return workdir


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_round_trip_is_bit_exact(tmp_path, optimizer, ema, async_save):
  state = make_state(3, ema=ema, optimizer=optimizer)
  meta = {"seed": 7, "config": {"model": {"num_layers": 2, "head_dim": None}}, "data": [1, 2.5, "x"]}
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig(async_save=async_save))
  checkpointer.save(5, state, meta)
  restored, restored_meta = checkpointer.restore(abstract_of(state))
  checkpointer.close()
  assert_same(restored, state)
  assert restored_meta == meta


def test_typed_random_keys_survive(tmp_path):
  state = {"threefry": jax.random.key(1), "rbg": jax.random.split(jax.random.key(2, impl="rbg"), 3)}
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
  checkpointer.save(1, state, {})
  restored, _ = checkpointer.restore(abstract_of(state))
  checkpointer.close()
  assert restored["rbg"].dtype == state["rbg"].dtype
  assert jax.random.bits(restored["threefry"]) == jax.random.bits(state["threefry"])
  assert jax.random.bits(restored["rbg"][2]) == jax.random.bits(state["rbg"][2])


def test_special_floats_keep_their_bits(tmp_path):
  bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32)
  state = {"x": jnp.asarray(bits.view(np.float32))}
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
  checkpointer.save(1, state, {})
  restored, _ = checkpointer.restore(abstract_of(state))
  checkpointer.close()
  assert np.asarray(restored["x"]).view(np.uint32).tolist() == bits.tolist()


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.arange(2_000_000, dtype=jnp.float32)
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
  checkpointer.save(1, {"x": x}, {})
  for _ in range(20):
    x = advance(x)
  x.block_until_ready()
  restored, _ = checkpointer.restore({"x": abstract_of(x)})
  checkpointer.close()
  assert np.array_equal(restored["x"], np.arange(2_000_000, dtype=np.float32))


def test_a_save_leaves_the_memory_of_the_state_free():
  state = make_state(3)
  copy = arrays.Staging().copy(state)
  assert_same(copy, state)
  for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(state)):
    assert a.sharding == b.sharding
    assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()


def test_saves_share_memory_whatever_their_sizes():
  staging = arrays.Staging()
  large = np.arange(3 * arrays._COPY_BYTES // 8, dtype=np.float32) + 1  # More than one thread's piece.
  first = staging.copy({"x": jnp.asarray(large), "y": jnp.int8(1)})
  assert np.array_equal(first["x"], large)
  memory = staging._memory
  second = staging.copy({"x": jnp.asarray(-large), "y": jnp.int8(2)})
  assert staging._memory is memory
  assert np.array_equal(second["x"], -large) and int(second["y"]) == 2
  start = memory.ctypes.data
  for leaf in jax.tree.leaves(second):
    assert start <= leaf.unsafe_buffer_pointer() < start + memory.nbytes, "Nothing was copied a second time."
  third = staging.copy({"x": jnp.zeros(2 * large.size, jnp.float32)})
  assert not np.any(third["x"]) and staging._memory.nbytes > memory.nbytes


def test_no_checkpoint_is_a_fresh_start(tmp_path):
  assert checkpoint.latest_step(tmp_path / "run") is None
  assert restore(tmp_path / "run") is None


@pytest.mark.parametrize("every_steps, steps", [(4, [4, 8]), (None, [])])
def test_should_save(tmp_path, every_steps, steps):
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig(every_steps=every_steps))
  assert [step for step in range(10) if checkpointer.should_save(step)] == steps
  checkpointer.close()


@pytest.mark.parametrize("keep_last, keep_every, kept", [(1, None, [60]), (2, None, [50, 60]), (1, 20, [20, 40, 60]),
                                                         (2, 30, [30, 50, 60])])
def test_which_are_kept(tmp_path, keep_last, keep_every, kept):
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every))
  for step in (10, 20, 30, 40, 50, 60):
    checkpointer.save(step, {"x": jnp.float32(step)}, {})
  checkpointer.close()
  assert folders(tmp_path) == [str(step) for step in kept]
  assert checkpoint.latest_step(tmp_path) == 60


def test_kept_across_a_restart(tmp_path):
  write_run(tmp_path, (10, 20), keep_last=2)
  write_run(tmp_path, (30,), keep_last=2)
  assert folders(tmp_path) == ["20", "30"]


def test_saving_a_step_again_changes_nothing(tmp_path):
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
  checkpointer.save(1, {"x": jnp.float32(1)}, {"first": True})
  checkpointer.save(1, {"x": jnp.float32(2)}, {"first": False})
  restored, meta = checkpointer.restore({"x": abstract_of(jnp.float32(0))})
  checkpointer.close()
  assert (float(restored["x"]), meta) == (1.0, {"first": True})


def test_quiet(tmp_path, capfd, caplog):
  with caplog.at_level(logging.WARNING):
    write_run(tmp_path)
    restore(tmp_path)
    write_run(tmp_path, (30,))
  assert not caplog.records
  assert capfd.readouterr().err == ""


# Damage.


FILES = ("checksums.json", "_METADATA", "_sharding", "manifest.ocdbt", "d/*", "ocdbt.process_0/manifest.ocdbt",
         "ocdbt.process_0/d/*", "array_metadatas/*")


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


DAMAGES = {"delete": pathlib.Path.unlink, "truncate": truncate, "flip": flip,
           "empty": lambda path: path.write_bytes(b"")}


def test_the_table_of_files_is_complete(two_checkpoints):
  state = two_checkpoints / "checkpoints" / "20" / "state"
  listed = {path for pattern in FILES for path in state.glob(pattern)} | {state / "commit_success.txt"}
  assert {path for path in state.rglob("*") if path.is_file()} <= listed


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_falls_back_with_one_warning(two_checkpoints, tmp_path, caplog, damage):
  template = two_checkpoints / "checkpoints" / "20" / "state"
  names = [path.relative_to(template) for pattern in FILES for path in template.glob(pattern)]
  assert len(names) >= len(FILES)
  for i, name in enumerate(names):
    workdir = tmp_path / str(i)
    shutil.copytree(two_checkpoints, workdir)
    DAMAGES[damage](workdir / "checkpoints" / "20" / "state" / name)
    caplog.clear()
    state, meta = restore(workdir)
    assert_same(state, make_state(10))
    assert meta == {"step": 10}
    assert folders(workdir) == ["10", "damaged-20"]
    message, = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"The checkpoint of step 20 in {workdir}/checkpoints is damaged: ")
    assert name.name in message


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_files_outside_the_state_do_not_matter(two_checkpoints, tmp_path, damage):
  for i, path in enumerate(p for p in (two_checkpoints / "checkpoints" / "20").iterdir() if p.is_file()):
    workdir = tmp_path / str(i)
    shutil.copytree(two_checkpoints, workdir)
    DAMAGES[damage](workdir / "checkpoints" / "20" / path.name)
    state, _ = restore(workdir)
    assert_same(state, make_state(20))


def test_a_flip_of_any_byte_is_seen(two_checkpoints, tmp_path):
  shutil.copytree(two_checkpoints, tmp_path / "run")
  folder = tmp_path / "run" / "checkpoints" / "20" / "state"
  files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt")
  rng = random.Random(0)
  for _ in range(100):
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    where = rng.randrange(len(data))
    data[where] ^= 1 << rng.randrange(8)
    original = path.read_bytes()
    path.write_bytes(data)
    assert record.damage(epath.Path(folder), 0, 1), f"bit flip at {path}:{where}"
    path.write_bytes(original)
  assert record.damage(epath.Path(folder), 0, 1) is None


def test_a_damaged_step_can_be_saved_again(two_checkpoints, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  for _ in range(2):
    truncate(workdir / "checkpoints" / "20" / "state" / "_METADATA")
    checkpointer = checkpoint.Checkpointer(workdir, CheckpointConfig())
    _, meta = checkpointer.restore(abstract_of(make_state(0)))
    assert meta == {"step": 10}
    checkpointer.save(20, make_state(20), {"step": 20})
    state, _ = checkpointer.restore(abstract_of(make_state(0)))
    checkpointer.close()
    assert_same(state, make_state(20))
  assert folders(workdir) == ["10", "20", "damaged-20", "damaged-20-2"]


def test_all_damaged_is_an_error_and_stays_one(two_checkpoints, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  for step in ("10", "20"):
    flip(workdir / "checkpoints" / step / "state" / "_METADATA")
  for _ in range(2):
    with pytest.raises(UserError, match=r"All checkpoints in .* are damaged \(step 20: _METADATA .*; step 10: "):
      restore(workdir)
    assert folders(workdir) == ["10", "20"]


# Another config.


def test_another_shape_is_an_error_and_not_damage(two_checkpoints, caplog):
  with pytest.raises(UserError, match=r"step 20 .* params/decoder/layers/kernel of shape \(2, 16, 48\), but the config "
                                      r"makes it \(2, 16, 32\)"):
    restore(two_checkpoints, abstract_of(make_state(0, width=32)))
  with pytest.raises(UserError, match="has ema/decoder/layers/kernel, which the config does not"):
    restore(two_checkpoints, abstract_of(make_state(0, ema=False)))
  with pytest.raises(UserError, match="has no opt_state/inner_states/"):
    restore(two_checkpoints, abstract_of(make_state(0, optimizer="muon-like")))
  state = make_state(0)
  state.params["embed"]["embedding"] = state.params["embed"]["embedding"].astype(jnp.bfloat16)
  with pytest.raises(UserError, match="params/embed/embedding in float32, but the config makes it bfloat16"):
    restore(two_checkpoints, abstract_of(state))
  assert folders(two_checkpoints) == ["10", "20"]
  assert not caplog.records


# Parameters alone.


def test_restore_params(two_checkpoints, tmp_path):
  params = abstract_of(make_state(0).params)
  assert_same(checkpoint.restore_params(two_checkpoints, params), make_state(20).ema)
  assert_same(checkpoint.restore_params(two_checkpoints, params, prefer_ema=False), make_state(20).params)
  assert_same(checkpoint.restore_params(two_checkpoints, params, 10, prefer_ema=False), make_state(10).params)
  assert_same(checkpoint.restore_params(two_checkpoints, params, 10), make_state(10).ema)
  checkpointer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
  checkpointer.save(1, make_state(1, ema=False), {})
  checkpointer.close()
  assert_same(checkpoint.restore_params(tmp_path, params), make_state(1).params)


def test_restore_params_casts(two_checkpoints):
  params = make_state(20).params
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  assert_same(checkpoint.restore_params(two_checkpoints, abstract_of(half), prefer_ema=False), half)


def test_restore_params_errors(two_checkpoints, tmp_path):
  params = abstract_of(make_state(0).params)
  with pytest.raises(UserError, match="There is no folder .*nowhere"):
    checkpoint.restore_params(tmp_path / "nowhere", params)
  with pytest.raises(UserError, match="has no checkpoints"):
    checkpoint.restore_params(tmp_path, params)
  with pytest.raises(UserError, match="no checkpoint of step 15; it has those of 10, 20"):
    checkpoint.restore_params(two_checkpoints, params, 15)
  with pytest.raises(UserError, match=r"embedding of shape \(64, 16\), but the config makes it \(128, 16\)"):
    other = dict(params, embed={"embedding": abstract_of(jnp.zeros((128, 16)))})
    checkpoint.restore_params(two_checkpoints, other)


def test_reading_parameters_never_renames(two_checkpoints, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  flip(workdir / "checkpoints" / "20" / "state" / "_METADATA")
  params = abstract_of(make_state(0).params)
  assert_same(checkpoint.restore_params(workdir, params), make_state(10).ema)
  assert len(caplog.records) == 1
  with pytest.raises(UserError, match="step 20 .* is damaged: _METADATA"):
    checkpoint.restore_params(workdir, params, 20)
  assert folders(workdir) == ["10", "20"]


# Other processes.


MESH_SCRIPT = """
import sys, json
from etils import epath
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lmjax import checkpoint
from lmjax.checkpoint import arrays
from lmjax.config import CheckpointConfig

def specs(shape, mesh_shape):
  devices = np.array(jax.devices()[:shape[0] * shape[1]]).reshape(shape)
  mesh = Mesh(devices, ("a", "b"))
  return {name: NamedSharding(mesh, spec) for name, spec in mesh_shape.items()}

value = {"x": np.arange(256 * 192, dtype=np.float32).reshape(256, 192), "y": np.arange(8, dtype=np.int32),
         "z": np.float32(3)}
layouts = [((1, 1), {"x": P(), "y": P(), "z": P()}),
           ((8, 1), {"x": P("a"), "y": P("a"), "z": P()}),
           ((2, 4), {"x": P("b", "a"), "y": P("b"), "z": P()}),
           ((4, 2), {"x": P(("a", "b")), "y": P(), "z": P()}),
           ((1, 4), {"x": P(None, "b"), "y": P("b"), "z": P()})]
def bytes_read():
  lines = open("/proc/self/io").read().splitlines()
  return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

count = most = 0
for i, (shape, spec) in enumerate(layouts):
  shardings = specs(shape, spec)
  run = checkpoint.Checkpointer(f"{sys.argv[1]}/{i}", CheckpointConfig())
  run.save(1, {k: jax.device_put(v, shardings[k]) for k, v in value.items()}, {})
  run.wait()
  for other_shape, other_spec in layouts:
    target = specs(other_shape, other_spec)
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=target[k]) for k, v in value.items()}
    folder = epath.Path(f"{sys.argv[1]}/{i}/checkpoints/1/state")
    before = bytes_read()
    values = arrays.read(folder, abstract)
    most = max(most, bytes_read() - before)
    restored, _ = run.restore(abstract)
    assert jax.tree.all(jax.tree.map(np.array_equal, values, restored))
    for k, v in value.items():
      assert restored[k].sharding == target[k], (k, restored[k].sharding)
      assert np.array_equal(restored[k], v), k
      count += 1
  run.close()
print(json.dumps([count, most]))
"""


def python(script: str, *args: str, devices: int = 1, **kwargs) -> subprocess.Popen:
  env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
             PYTHONPATH=str(pathlib.Path(checkpoint.__file__).parents[1]))
  return subprocess.Popen([sys.executable, "-c", script, *args], env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **kwargs)


def test_restore_onto_any_mesh(tmp_path):
  process = python(MESH_SCRIPT, str(tmp_path), devices=8)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  count, most = json.loads(out)
  assert count == 5 * 5 * 3
  # Each byte of the arrays is read once, whatever the layouts; the rest is the database's index.
  size = 256 * 192 * 4 + 8 * 4 + 4
  assert size <= most < 1.2 * size
  assert err == ""


def test_what_is_read_for_the_devices_of_a_process():
  left, right, far = ((0, 4), (0, 2)), ((0, 4), (2, 4)), ((0, 4), (6, 8))
  assert arrays.regions([left]) == {left}
  assert arrays.regions([left, right, left]) == {((0, 4), (0, 4))}
  assert arrays.regions([left, far]) == {left, far}, "what lies between is for others"
  assert arrays.regions([((0, 2), (0, 2)), ((2, 4), (2, 4))]) == {((0, 2), (0, 2)), ((2, 4), (2, 4))}
  assert arrays.regions([()]) == {()}


SAVING_SCRIPT = """
import sys
import jax.numpy as jnp
from lmjax import checkpoint
from lmjax.config import CheckpointConfig

run = checkpoint.Checkpointer(sys.argv[1], CheckpointConfig())
step = checkpoint.latest_step(sys.argv[1]) or 0
print("ready", flush=True)
while True:
  step += 1
  run.save(step, {"x": jnp.full((200_000,), step, jnp.float32), "step": jnp.int32(step)}, {"step": step})
"""


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path, caplog):
  rng = random.Random(0)
  abstract = {"x": abstract_of(jnp.zeros((200_000,), jnp.float32)), "step": abstract_of(jnp.int32(0))}
  previous = 0
  for _ in range(3):
    process = python(SAVING_SCRIPT, str(tmp_path))
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    while (checkpoint.latest_step(tmp_path) or 0) <= previous:  # On a busy machine the first save takes its time.
      assert process.poll() is None
      time.sleep(0.02)
    time.sleep(rng.random())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state, meta = restore(tmp_path, abstract)
    step = meta["step"]
    assert step > previous
    assert int(state["step"]) == step and np.all(np.asarray(state["x"]) == step)
    assert [name for name in folders(tmp_path) if not name.isdigit()] == [], "half-written folders are cleared"
    previous = step
  assert not caplog.records


FULL_DISK_SCRIPT = """
import os, resource, signal, sys
import jax.numpy as jnp
from lmjax import checkpoint
from lmjax.config import CheckpointConfig, UserError

run = checkpoint.Checkpointer(sys.argv[1], CheckpointConfig(async_save=sys.argv[2] == "async"))
run.save(1, {"x": jnp.ones((10,))}, {})
run.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
  run.save(2, {"x": jnp.ones((1_000_000,))}, {})
  run.wait()
except UserError as e:
  print(e)
run.close()
"""


@pytest.mark.parametrize("how", ["async", "sync"])
def test_a_refused_write_is_one_sentence_and_leaves_nothing(tmp_path, how):
  process = python(FULL_DISK_SCRIPT, str(tmp_path), how)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  assert out == (f"A checkpoint could not be written to {tmp_path}/checkpoints (File too large); make room or give "
                 "another workdir, and start again: the run goes on from its last checkpoint.\n")
  assert folders(tmp_path) == ["1"]


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match="run/checkpoints cannot be written"):
    checkpoint.Checkpointer(tmp_path / "run", CheckpointConfig())


PROCESSES_SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
workdir, index, count, port = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
from lmjax import checkpoint
from lmjax.config import CheckpointConfig

mesh = Mesh(np.array(jax.devices()), ("a",))
shardings = {"x": NamedSharding(mesh, P("a")), "y": NamedSharding(mesh, P())}
run = checkpoint.Checkpointer(workdir, CheckpointConfig())
value = {"x": np.arange(4096, dtype=np.float32).reshape(64, 64), "y": np.float32(3)}
found = run.restore({k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[k]) for k, v in value.items()})
step = 0
if found is not None:
  state, meta = found
  step = meta["step"]
  for k, v in value.items():
    assert all(np.array_equal(shard.data, v[shard.index] + step) for shard in state[k].addressable_shards), k
for new in (step + 1, step + 2):
  state = {k: jax.make_array_from_callback(v.shape, shardings[k], lambda i: v[i] + new) for k, v in value.items()}
  run.save(new, state, {"step": new})
run.close()
print(step)
"""


def run_processes(workdir: pathlib.Path, count: int) -> list[str]:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [python(PROCESSES_SCRIPT, str(workdir), str(i), str(count), str(port)) for i in range(count)]
  outputs = []
  for process in processes:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    outputs.append(out.split()[-1])
  return outputs


@pytest.mark.slow
def test_processes_may_change_in_number_and_agree_on_damage(tmp_path):
  assert run_processes(tmp_path, 2) == ["0", "0"]
  assert run_processes(tmp_path, 1) == ["2"]
  assert run_processes(tmp_path, 2) == ["4", "4"]
  written, = (tmp_path / "checkpoints" / "6" / "state").glob("ocdbt.process_1/manifest.ocdbt")
  flip(written)
  assert run_processes(tmp_path, 2) == ["5", "5"]
  assert folders(tmp_path) == ["6", "7", "damaged-6"]
