"""Makes launch/plans/NAME.json, the plans of shipped experiments on machines that are not here.

    python tests/benchmarks/plans.py [NAME ...]

Needs libtpu, and for those on GPUs JAX's CUDA plugin. The large ones take minutes each on two CPU cores.
"""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "plans"
# name: (experiment, machine, settings)
PLANS = {
    "debug-v5e-4": ("debug.py", "v5e-4", "mesh.data=1 mesh.fsdp=4"),
    "quickstart-v6e-8": ("quickstart.py", "v6e-8", "mesh.data=2 mesh.fsdp=2 mesh.tensor=2"),
    "debug-2xv5e-4": ("debug.py", "2xv5e-4", "mesh.replica=2 mesh.data=1 mesh.fsdp=4"),
    "gpt2-1.5B-v5e-16": ("gpt2.py:1.5B", "v5e-16", "mesh.data=1 mesh.fsdp=16"),
    "llama-3-8B-v5p-128": ("llama.py:3-8B", "v5p-128", ""),
    "llama-3-8B-v6e-64": ("llama.py:3-8B", "v6e-64", "model.remat_policy=full"),
    "mixtral-8x7B-v5e-256": ("mixtral.py:8x7B", "v5e-256", ""),
    "t5-11B-v4-256": ("t5.py:11B", "v4-256", ""),
    "llama-3-70B-v5p-512": ("llama.py:3-70B", "v5p-512", "model.remat_policy=full eval.batch_size=256"),
    "llama-3-8B-32k-v6e-256": ("llama.py:3-8B", "v6e-256", "data.seq_len=32768 train.batch_size=256 "
                               "train.grad_accum_steps=1 model.remat_policy=full eval.batch_size=256"),
    "llama-3-8B-32k-context-v6e-256": ("llama.py:3-8B", "v6e-256", "data.seq_len=32768 train.batch_size=64 "
                                       "train.grad_accum_steps=1 model.remat_policy=full eval.batch_size=64 "
                                       "mesh.data=1 mesh.fsdp=64 mesh.context=4"),
    "gpt2-1.5B-2xv5e-16": ("gpt2.py:1.5B", "2xv5e-16", "mesh.replica=2 mesh.data=1 mesh.fsdp=16"),
    "llama-3-8B-h100-8": ("llama.py:3-8B", "h100-8", "model.remat_policy=full"),
}


def command(name: str, target: pathlib.Path) -> list[str]:
  """Returns the command that makes a plan."""
  experiment, topology, settings = PLANS[name]
  return ["plan", f"--config={ROOT / 'experiments' / experiment}", f"--topology={topology}", f"--json={target}",
          *(f"--config.{setting}" for setting in settings.split())]


if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  for plan in sys.argv[1:] or PLANS:
    print(f"{plan}: lmjax {' '.join(command(plan, FOLDER / f'{plan}.json'))}", flush=True)
    subprocess.run([sys.executable, "-m", "lmjax", *command(plan, FOLDER / f"{plan}.json")], cwd=ROOT, check=False)
