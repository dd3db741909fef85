"""Does the best learning rate stay where it is over widths under muP, and over depths under CompleteP?

    python tests/benchmarks/mup_transfer.py --out=DIR              # one GPU
    python tests/benchmarks/mup_transfer.py --out=DIR --tiny       # a try in a minute on a CPU
    python tests/benchmarks/mup_transfer.py --draw=DIR/transfer.json --out=docs

Trains Llamas of 4 layers at widths of 128 to 1024 under the standard parametrization and muP, and of width 256 at 4 to
16 layers under muP and CompleteP, each at nine learning rates, a factor of two apart, from two seeds: all of a size at
once, vmapped. 300 steps of 2,048 bytes of the standard library's source, warmup of 30, then down to a tenth; the loss
is that of a held-out part. DIR/transfer.json is written anew after each size. Needs no data loader.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import config as config_lib
from lmjax import partitioning, train
from lmjax.models import families
from lmjax.scaling import coordinate_check, plots

RATES = [2.0 ** power for power in range(-12, -3)]
BASE_WIDTH, BASE_DEPTH = 128, 4


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--out", required=True)
  parser.add_argument("--draw")
  parser.add_argument("--tiny", action="store_true")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  if args.draw:
    draw(json.loads(pathlib.Path(args.draw).read_text()), out)
    return
  rates, widths, depths, steps, batch, length = RATES, (128, 256, 512, 1024), (4, 8, 16), 300, 16, 128
  if args.tiny:
    rates, widths, depths, steps, batch, length = RATES[3:8:2], (32, 64), (2, 4), 20, 4, 32
  runs = [("width", width, BASE_DEPTH, kind) for width in widths for kind in ("standard", "mup")]
  runs += [("depth", min(256, widths[-1]), depth, kind) for depth in depths for kind in ("mup", "completep")]
  text, found, trained, began = bytes_of_stdlib(), [], {}, time.time()
  for axis, width, depth, kind in runs:
    # At the base size all parametrizations are one, and at the base depth those that differ in depth.
    same = "mup" if depth == BASE_DEPTH and (width == BASE_WIDTH or kind == "completep") else kind
    if (size := (same, width, depth)) not in trained:
      trained[size] = np.asarray(train_all(experiment(same, width, depth, steps, batch, length), rates, text))
    losses = trained[size]
    found.append({"axis": axis, "parametrization": kind, "size": width if axis == "width" else depth,
                  "learning_rates": rates, "losses": np.where(np.isfinite(losses), losses, np.nan).tolist(),
                  "seconds": time.time() - began, "device": jax.devices()[0].device_kind})
    (out / "transfer.json").write_text(json.dumps(found, indent=2).replace("NaN", "null"))
    mean = losses.mean(axis=0)
    print(f"{time.time() - began:5.0f} s  {kind:9} width {width:4} depth {depth:2}  best 2^"
          f"{np.log2(rates[int(np.nanargmin(mean))]):.0f}  " + " ".join(f"{loss:.3f}" for loss in mean), flush=True)


def bytes_of_stdlib(limit: int = 16_000_000) -> np.ndarray:
  """Returns source of the standard library as one array of bytes, its files in order of name."""
  paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
  paths += sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py"))
  return np.frombuffer(b"".join(path.read_bytes() for path in paths)[:limit], np.uint8)


def experiment(kind: str, width: int, depth: int, steps: int, batch: int, length: int) -> config_lib.Config:
  config = config_lib.base_config()
  config.model.update(families.llama_style(), num_layers=depth, embed_dim=BASE_WIDTH, num_heads=BASE_WIDTH // 32,
                      tie_embeddings=False, vocab_size=256, parametrization=kind, base_embed_dim=BASE_WIDTH,
                      base_num_layers=BASE_DEPTH, remat_policy="none", attention_impl="xla")
  config.data.update(seq_len=length)
  config.train.update(num_steps=steps, batch_size=batch)
  config.mesh.update(data=1)
  config = config_lib.resolve_durations(config_lib.resolve_model(config_lib.from_config_dict(config), 256), 1)
  return dataclasses.replace(config, model=coordinate_check.at_width(config.model, width, "heads"))


def train_all(config: config_lib.Config, rates: list[float], text: np.ndarray, num_seeds: int = 2) -> jax.Array:
  """Returns held-out losses [seeds, rates]."""
  steps, batch, length = config.train.num_steps, config.train.batch_size, config.data.seq_len
  held_out = len(text) // 20
  rows = lambda low, high, count, seed: np.stack([
      text[at:at + length + 1] for at in np.random.default_rng(seed).integers(low, high - length - 1, count * batch)
  ]).reshape(count, batch, length + 1)
  training, validation = rows(held_out, len(text), steps, 0), rows(0, held_out, 8 if steps > 50 else 1, 1)
  warmup = steps // 10
  schedule = np.minimum(np.arange(1, steps + 1) / warmup, 1 - 0.9 * (np.arange(steps) - warmup) / (steps - warmup))
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  with partitioning.use_mesh(mesh):
    setup = train.build(config, mesh)

    def example(row):
      tokens = row.astype(jnp.int32)
      return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((batch, length), jnp.float32)}

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    @functools.partial(jax.vmap, in_axes=(None, 0, None, None))
    def run(seed, rate, training, validation):
      key = jax.random.key(seed)
      params = train.nn.unbox(train.init_params(setup.model, key))

      def step(state, inputs):
        row, factor = inputs
        hparams = {"learning_rate": rate * factor, "weight_decay": 0.1, "seed": seed}
        return train._train_step(setup, state, example(row), hparams)[0], None

      state, _ = jax.lax.scan(step, setup.start(params, key), (training, jnp.float32(schedule)))
      loss = lambda row: setup.objective.loss(setup.model, state.params, example(row), config.objective)[0]
      return jnp.sum(jax.lax.map(loss, validation)) / (validation.shape[0] * batch * length)

    return run(jnp.arange(num_seeds, dtype=jnp.uint32), jnp.float32(rates), training, validation)


def draw(found: list[dict], out: pathlib.Path) -> None:
  """Draws the curves of each axis and parametrization."""
  panels = {}
  for run in found:
    losses = np.mean([[np.nan if loss is None else loss for loss in row] for row in run["losses"]], axis=0)
    curves = panels.setdefault((run["axis"], run["parametrization"]), {})
    curves[run["size"]] = (run["learning_rates"], losses.tolist())
  (out / "mup_transfer.png").write_bytes(plots.transfer(
      [(f"{kind}, by {axis}", axis, curves) for (axis, kind), curves in panels.items()]))


if __name__ == "__main__":
  main()
