"""Learning rate, batch and depth at once: a grid of the three from one command, or a search that stops what is behind.

    lmjax sweep --config=experiments/sweeps/depth.py --workdir=runs/depth --workers=2
    lmjax sweep --config=experiments/sweeps/depth.py --workdir=runs/depth_tpe --driver=tpe --num_trials=10 --pruner=asha
    lmjax sweep --config=experiments/sweeps/depth.py:pod --workdir=runs/depth_pod --pruner=asha

`cpu`, the default, trains models of 64 channels, `pod` models of 768 on a thousand million tokens (see learning_rate.py
for what a worker wants).
Hardware: any for `cpu`, where the 18 trials of the grid took 2.6 minutes on two busy CPU cores. `pod` has not been run.
"""

from lmjax.config import base_config
from lmjax.config_checks import check_one_of
from lmjax.models import families
from lmjax.sweeps import Sweep, grid

_SIZES = ("cpu", "pod")


def get_config(size="cpu"):
  check_one_of("experiments/sweeps/depth.py has no size", size, _SIZES)
  config = base_config()
  if size == "pod":
    config.model.update(families.llama_style(), embed_dim=768, num_heads=12)
    config.data.update(tokenizer="bpe", tokenizer_vocab_size=32000, seq_len=1024)
    config.optim.update(warmup_tokens=50e6)
    config.train.update(num_tokens=1e9)
    config.eval.update(every_tokens=100e6, batch_size=64)
    config.checkpoint.update(every_tokens=100e6)
    config.mesh.update(data=1, fsdp=-1)
  else:
    config.model.update(families.llama_style(), embed_dim=64, num_heads=4)
    config.data.update(tokenizer="bytes", seq_len=64)
    config.optim.update(warmup_tokens=4096)
    config.train.update(num_tokens=65536, sample_length=0)
    config.eval.update(every_tokens=16384, num_batches=4, final_num_batches=16)
    config.checkpoint.update(every_tokens=32768)
  return config


def get_sweep(size="cpu"):
  lists = (([6e-4, 1.2e-3, 2.4e-3], [256, 512], [4, 8, 16]) if size == "pod" else
           ([3e-3, 1e-2, 3e-2], [8, 16], [1, 2, 4]))
  return Sweep(grid(dict(zip(("optim.learning_rate", "train.batch_size", "model.num_layers"), lists))))
