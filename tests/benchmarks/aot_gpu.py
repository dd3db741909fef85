"""Compiles the training step for H100s on a machine that has none, and says what the program is made of.

    python tests/benchmarks/aot_gpu.py [--shapes=llama,gpt2] [--devices=1|8] [--hlo=FOLDER] [--json=FILE]

Needs `pip install "jax[cuda13]"` (4.6 GB) and no GPU. A row a shape: seconds to compile, peak memory of a device, how
often a fused attention kernel stands in the program, forward and backward (once each: a second forward would be one
that the backward pass makes again), matrix products by the type of their operands, kernels that transpose an array as
large as the residual stream, the largest float32 array against [B, T, V], and, on eight devices, the collectives.
Nothing is run: the kernels are chosen without timing them, so this says nothing about speed.
"""

import argparse
import collections
import math
import os
import pathlib
import re
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # Before JAX starts: no driver answers here.

import harness

from lmjax import config as config_lib
from lmjax import partitioning, plan, train
from lmjax.models import families
from lmjax.plan.batches import abstract_batch
from lmjax.plan.topologies import GPU_TARGETS, described_devices, parse_topology

SHAPES = {
    # name: preset, sequence length, sequences a device.
    "llama": (families.llama("3.2-1B"), 2048, 8),
    "gpt2": (families.gpt2("124M"), 1024, 32),
}
_MEMORY_BYTES = GPU_TARGETS["h100"]["memory"]


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument("--shapes", default="llama,gpt2", help="of llama (3.2-1B) and gpt2 (124M)")
  parser.add_argument("--devices", type=int, default=1, help="H100s, over which the state is split")
  parser.add_argument("--batch_size", type=int, help="sequences a device")
  parser.add_argument("--remat_policy", default="products")
  parser.add_argument("--hlo", help="folder for the compiled programs as text")
  args = parser.parse_args()
  rows = [compiled_row(name, args) for name in args.shapes.split(",")]
  harness.report(f"The training step compiled for {args.devices} described H100(s), remat_policy={args.remat_policy}",
                 rows)


def compiled_row(name: str, args: argparse.Namespace) -> dict[str, Any]:
  preset, seq_len, batch_size = SHAPES[name]
  batch_size = args.batch_size or batch_size
  config = make_config(preset, seq_len, batch_size * args.devices, args.remat_policy)
  mesh = partitioning.make_mesh(config.mesh, described_devices(parse_topology(f"h100-{args.devices}")))
  setup = train.build(config, mesh)
  start = time.perf_counter()
  lowered = plan.lower(setup, abstract_batch(config, mesh))
  traced = time.perf_counter() - start
  compiled = lowered.compile(plan.UNTIMED)
  text = compiled.as_text()
  if args.hlo:
    folder = pathlib.Path(args.hlo)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{args.devices}-{args.remat_policy}.txt").write_text(text)
  logits = 4 * batch_size * seq_len * config.model.vocab_size
  largest, largest_size = largest_float32(text)
  memory = compiled.memory_analysis()
  return {"shape": name, "sequences": batch_size, "trace s": traced,
          "compile s": time.perf_counter() - start - traced, "peak GiB": memory.peak_memory_in_bytes / 2 ** 30,
          "of memory": memory.peak_memory_in_bytes / _MEMORY_BYTES, **attention_kernels(text), **products(text),
          "transposes": transposes(text, batch_size * seq_len * config.model.embed_dim), "largest f32": largest,
          "of [B, T, V]": largest_size / logits, **collectives(text)}


def make_config(preset: dict, seq_len: int, batch_size: int, remat_policy: str) -> config_lib.Config:
  base = config_lib.base_config()
  base.model.update(preset)
  base.model.remat_policy = remat_policy
  base.data.seq_len, base.train.batch_size, base.train.num_steps = seq_len, batch_size, 1000
  base.mesh.data, base.mesh.fsdp = 1, -1
  return config_lib.resolve_durations(config_lib.resolve_model(config_lib.from_config_dict(base), 2), 10 ** 9)


def attention_kernels(text: str) -> dict[str, int]:
  targets = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
  backward = sum("Backward" in target for target in targets)
  return {"fmha forward": len(targets) - backward, "fmha backward": backward}


def products(text: str) -> dict[str, int]:
  """Counts matrix products, by library and by the type of the left operand."""
  types = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[", text, re.M))
  counts = collections.Counter()
  for operand in re.findall(r'custom-call\(%?([\w.\-]+)[^\n]*custom_call_target="__cublas', text):
    counts[f"cublas {types.get(operand, '?')}"] += 1
  for operand in re.findall(r" dot\(%?([\w.\-]+)", text):
    counts[f"dot {types.get(operand, '?')}"] += 1
  return dict(sorted(counts.items()))


def transposes(text: str, elements: int) -> int:
  """Counts kernels that transpose an array of at least so many elements."""
  shapes = re.findall(r"^ *(?:ROOT )?%[\w.]*transpose\w*fusion[\w.]* = \(?\w+\[([\d,]+)\].* fusion\(", text, re.M)
  return sum(math.prod(map(int, shape.split(","))) >= elements for shape in shapes)


def largest_float32(text: str) -> tuple[str, int]:
  """Returns the largest float32 array that some instruction makes, and its bytes."""
  shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
  size = lambda shape: 4 * math.prod(map(int, shape.split(",")))
  largest = max(shapes, key=size)
  return f"[{largest}]", size(largest)


def collectives(text: str) -> dict[str, int]:
  names = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", text)
  counts = collections.Counter(f"{name}{' async' if start else ''}" for name, start in names)
  return dict(sorted(counts.items()))


if __name__ == "__main__":
  main()
