"""How fast a training step is, against what a user would pick instead, on the same machine and in the same run.

    python tests/benchmarks/train_step.py [--quick] [--rounds=N] [--json=FILE] [--shapes=base,long,wide]
        [--peers=torch,torch_compile,plain_jax,FILE.py:FUNCTION] [--family=llama --embed_dim=2048 ...]

Every variant trains the same architecture on the same batch with AdamW and clipping: forward, backward, update. One
call runs `--steps_per_call` steps and waits for the last one's loss.

Peers:
  torch, torch_compile: transformers' model in PyTorch, eager and compiled, with its sdpa attention.
  plain_jax: the step that a good JAX user would write in an hour (plain_jax.py): a scan over layers,
    jax.nn.dot_product_attention, optax's cross-entropy and AdamW.
  FILE.py:FUNCTION: any other; the function takes a Shape (see shapes.py) and returns one that runs a step and returns
    what holds its loss, to be read with float().
"""

import argparse
import dataclasses
import importlib.util
import math
import pathlib
from typing import Any, Callable

import harness
import jax
import numpy as np
from shapes import SHAPES, Shape

from lmjax import config as config_lib
from lmjax import metrics, partitioning, train


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument("--shapes", help=f"some of {', '.join(SHAPES)}, with commas; all that fit a CPU by default")
  parser.add_argument("--peers", default="torch,torch_compile,plain_jax", help="what to compare with, with commas")
  parser.add_argument("--steps_per_call", type=int, default=1, help="steps between two waits for a loss")
  parser.add_argument("--remat_policy", help="config.model.remat_policy; its default where not given")
  for field in dataclasses.fields(Shape):
    parser.add_argument(f"--{field.name}", type=type(field.default), help="changes every shape")
  args = parser.parse_args()
  changes = {field.name: value for field in dataclasses.fields(Shape)
             if (value := getattr(args, field.name)) is not None}
  names = (args.shapes or ("tiny" if args.quick else "base,long,wide")).split(",")
  rows, notes = [], []
  for name in names:
    shape = dataclasses.replace(SHAPES[name], **changes)
    rows += compare(name, shape, args, notes)
  harness.report("One training step", rows, "\n".join(dict.fromkeys(notes)))


def compare(name: str, shape: Shape, args: argparse.Namespace, notes: list[str]) -> list[dict[str, Any]]:
  """Times all variants of one shape in turn; returns a row for each."""
  steps = {"lmjax": lmjax_step(shape, args.remat_policy)}
  for peer in args.peers.split(",") if args.peers else []:
    try:
      steps[peer] = make_peer(peer, shape)
      float(steps[peer]())
    except Exception as e:  # A peer that cannot run here is said to be missing, whatever its reason.
      steps.pop(peer, None)
      notes.append(f"Not compared with {peer}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
  losses = {variant: float(step()) for variant, step in steps.items()}

  def call(step: Callable[[], Any]) -> Callable[[], None]:
    def several():
      for _ in range(args.steps_per_call):
        loss = step()
      float(loss)
    return several

  seconds = harness.medians(harness.interleave(
      {variant: call(step) for variant, step in steps.items()}, args.rounds or (3 if args.quick else 9)))
  tokens = shape.batch_size * shape.seq_len * args.steps_per_call
  flops = tokens * metrics.flops_per_token(lmjax_config(shape).model, shape.seq_len)
  peak = metrics.peak_flops(jax.devices()[:1])
  rows = []
  for variant, time in seconds.items():
    row = {"shape": name, "variant": variant, "ms a step": 1e3 * time / args.steps_per_call,
           "tokens/s": tokens / time, "TFLOP/s": flops / time / 1e12,
           "lmjax's speed / its": time / seconds["lmjax"], "loss": losses[variant]}
    rows.append(row | ({"MFU": flops / time / peak} if peak else {}))
  notes.append(f"{name}: {shape}. FLOPs count causal attention by half.")
  return rows


def make_peer(peer: str, shape: Shape) -> Callable[[], Any]:
  """Returns the step of a peer by its name, or by FILE.py:FUNCTION."""
  file, _, function = peer.rpartition(":")
  if file:
    path = pathlib.Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)(shape)
  if peer == "plain_jax":
    import plain_jax
    return plain_jax.make_step(shape)
  import torch_peer
  return torch_peer.make_step(shape, compiled={"torch": False, "torch_compile": True}[peer])


def lmjax_config(shape: Shape, remat_policy: str | None = None) -> config_lib.Config:
  """Returns the resolved config of a shape."""
  config = config_lib.base_config()
  config.model.update(shape.model_settings(), vocab_size=shape.vocab_size, dtype=shape.dtype)
  if remat_policy:
    config.model.remat_policy = remat_policy
  config.data.seq_len = shape.seq_len
  config.train.update(num_steps=1000, batch_size=shape.batch_size)
  config.optim.update(name="adamw", learning_rate=shape.learning_rate, clip_norm=1.0)
  return config_lib.resolve_durations(
      config_lib.resolve_model(config_lib.from_config_dict(config), shape.vocab_size), tokens_per_epoch=10 ** 9)


def lmjax_step(shape: Shape, remat_policy: str | None) -> Callable[[], jax.Array]:
  """Returns the step that `lmjax train` runs, on one device and one batch that stays there."""
  config = lmjax_config(shape, remat_policy)
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  setup = train.build(config, mesh)
  state, step = train.init_state(setup), train.make_train_step(setup)
  tokens = shape.tokens()
  batch = partitioning.global_batch(
      mesh, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:],
             "weights": np.ones((shape.batch_size, shape.seq_len), np.float32)}, shape.batch_size)
  hparams = {"learning_rate": np.float32(shape.learning_rate), "weight_decay": np.float32(0.1), "seed": np.uint32(0)}

  def run() -> jax.Array:
    nonlocal state
    with partitioning.use_mesh(mesh):
      state, out = step(state, batch, hparams)
    return out["loss"]

  first = float(run())
  assert abs(first - math.log(shape.vocab_size)) < 1, f"The first loss is {first}."
  return run


if __name__ == "__main__":
  main()
