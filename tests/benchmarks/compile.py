"""How long a training step takes to compile, and how little of that is due to depth.

    python tests/benchmarks/compile.py [--quick] [--rounds=N] [--json=FILE]

Layers are scanned, so that a deeper model is the same program with a larger count. Depths are compiled in turn, from
nothing: no compilation cache is read or written. Tracing and lowering are part of the time.
"""

import dataclasses

import harness
import jax
from shapes import SHAPES
from train_step import lmjax_config

from lmjax import partitioning, train

DEPTHS = (6, 48)


def main() -> None:
  args = harness.parser(__doc__).parse_args()
  shape = dataclasses.replace(SHAPES["tiny"] if args.quick else SHAPES["base"], batch_size=4)
  seconds = harness.medians(harness.interleave(
      {depth: lambda depth=depth: compile_step(dataclasses.replace(shape, num_layers=depth)) for depth in DEPTHS},
      args.rounds or 3))
  rows = [{"layers": depth, "seconds": time, f"of {DEPTHS[0]} layers": time / seconds[DEPTHS[0]]}
          for depth, time in seconds.items()]
  harness.report("Compiling one training step", rows, f"{shape}")


def compile_step(shape) -> None:
  jax.clear_caches()
  config = lmjax_config(shape)
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  setup = train.build(config, mesh)
  tokens = jax.ShapeDtypeStruct((shape.batch_size, shape.seq_len), "int32")
  weights = jax.ShapeDtypeStruct((shape.batch_size, shape.seq_len), "float32")
  hparams = {"learning_rate": jax.ShapeDtypeStruct((), "float32"),
             "weight_decay": jax.ShapeDtypeStruct((), "float32"), "seed": jax.ShapeDtypeStruct((), "uint32")}
  with partitioning.use_mesh(mesh):
    batch = {"inputs": tokens, "targets": tokens, "weights": weights}
    train.make_train_step(setup).lower(setup.state_shapes, batch, hparams).compile()


if __name__ == "__main__":
  main()
