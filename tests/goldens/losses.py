"""The losses of experiments/debug.py for each optimizer, as they come out on this machine.

    python tests/goldens/losses.py

prints {"versions": ..., "losses": {optimizer: [the loss of step 1, of step 2, ...]}} as JSON, the losses as hexadecimal
floats. Of debug.py three things are changed: the text, because the standard library's source differs between patch
versions of Python; the learning rates, so that every optimizer learns; and the batch and vocabulary, see below.

A float32 sum depends on the order in which it is added up, which XLA chooses by the machine. Therefore this runs in a
process of its own with code for AVX2 whatever more the processor has (oneDNN, which makes Eigen's products, writes its
code as it runs and is told by itself), without the kernels and functions that are chosen by processor (YNNPACK is what
XLA uses for matrix products where it may), and with one thread for a product, however many cores there are. Optimising
the code would take most of the time, and be one more thing to vary. What is left is Eigen, which cuts the sums of a
product by the size of the first cache; no sum here has more than 257 terms, which it should leave whole with 32 KiB.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1 "
                 "--xla_cpu_max_isa=AVX2 --xla_cpu_prefer_vector_width=256 "
                 "--xla_cpu_multi_thread_eigen=false --xla_cpu_enable_platform_dependent_math=false "
                 "--xla_cpu_experimental_ynn_fusion_type= --xla_cpu_use_xnnpack=false --xla_cpu_use_onednn=false",
}
LEARNING_RATES = {"adamw": 3e-3, "adafactor": 3e-2, "lion": 1e-3, "sgd": 0.3, "muon": 3e-3, "schedule_free": 1e-2,
                  "sophia": 3e-3}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokenizers")
NUM_STEPS = 100


def versions() -> dict[str, str]:
  """Returns the versions that the losses depend on."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def text() -> str:
  """Returns 60,000 characters to learn from, the same ones everywhere."""
  animals = ("cat", "dog", "fox", "hen", "owl", "yak", "élan")
  return "".join(f"The {animals[i % 7]} saw {i * i % 101} {animals[i * i % 7]}s, and {i % 3} of them ran away.\n\n"
                 for i in range(1500))


def losses(optimizer: str, folder: pathlib.Path) -> list[str]:
  """Trains in a folder and returns the loss of every step."""
  from lmjax import train
  from lmjax.commands.experiment import load_experiment
  from lmjax.config import from_config_dict
  (folder / "text.txt").write_text(text(), encoding="utf-8")
  config = load_experiment(str(ROOT / "experiments" / "debug.py"))
  config.data.update(source=str(folder / "text.txt"), cache_dir=str(folder / "cache"))
  config.optim.update(name=optimizer, learning_rate=LEARNING_RATES[optimizer])
  if optimizer == "schedule_free":
    config.optim.schedule = "constant"
  config.model.vocab_size = 257
  config.train.update(batch_size=4, num_steps=NUM_STEPS, log_every_steps=1, sample_length=0, compilation_cache=False)
  config.eval.sets = ()
  config.tracking.tensorboard = False
  train.train_and_evaluate(from_config_dict(config), str(folder / optimizer))
  records = [json.loads(line) for line in (folder / optimizer / "metrics.jsonl").read_text().splitlines()]
  return [record["loss"].hex() for record in records if "loss" in record]


def main() -> None:
  os.environ.update(ENVIRONMENT)
  sys.path.insert(0, str(ROOT))
  with tempfile.TemporaryDirectory() as folder:
    found = {optimizer: losses(optimizer, pathlib.Path(folder)) for optimizer in LEARNING_RATES}
  json.dump({"versions": versions(), "losses": found}, sys.stdout, indent=1)


if __name__ == "__main__":
  main()
