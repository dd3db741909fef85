"""Which learning rate: eight of them, a factor of two apart, with three seeds each or, at `pod`, one.

    lmjax sweep --config=experiments/sweeps/learning_rate.py --workdir=runs/learning_rate --workers=2
    lmjax sweep --config=experiments/sweeps/learning_rate.py:pod --workdir=runs/learning_rate_pod

`cpu`, the default, trains experiments/debug.py's model, `pod` GPT-2 of 124M parameters on 2.5 thousand million tokens,
for which each worker wants a host of four or eight chips of its own: start the second command on each, with the folder
on a file system that they share. `--dry_run` lists the trials with their FLOPs. `--driver=tpe --num_trials=16` searches
the same lists by what it has seen.
Hardware: any for `cpu`, where 24 trials took 3.5 minutes on two busy CPU cores. `pod` has not been run.
"""

from lmjax.config import base_config
from lmjax.config_checks import check_one_of
from lmjax.models import families
from lmjax.sweeps import Sweep, grid

_SIZES = ("cpu", "pod")


def get_config(size="cpu"):
  check_one_of("experiments/sweeps/learning_rate.py has no size", size, _SIZES)
  config = base_config()
  if size == "pod":
    config.model.update(families.gpt2("124M"), vocab_size=50304, dropout=0.0)
    config.data.update(tokenizer="bpe", tokenizer_vocab_size=50257, seq_len=1024)
    config.optim.update(warmup_tokens=100e6)
    config.train.update(num_tokens=2.5e9, batch_size=512, grad_accum_steps=8)
    config.eval.update(every_steps=500, batch_size=64)
    config.checkpoint.update(every_steps=500)
    config.mesh.update(data=1, fsdp=-1)
  else:
    config.model.update(num_layers=2, embed_dim=64, num_heads=4)
    config.data.update(tokenizer="bytes", seq_len=64)
    config.optim.update(warmup_steps=10)
    config.train.update(num_steps=100, batch_size=8, sample_length=0)
    config.eval.update(every_steps=50, num_batches=4, final_num_batches=16)
    config.checkpoint.update(every_steps=50)
  return config


def get_sweep(size="cpu"):
  top, seeds = (2.4e-3, [0]) if size == "pod" else (6.4e-2, [0, 1, 2])
  return Sweep(grid({"optim.learning_rate": [top / 2 ** i for i in reversed(range(8))], "seed": seeds}))
