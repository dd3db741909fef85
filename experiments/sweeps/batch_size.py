"""Which batch, and which learning rate with it, at equal tokens: what of the two goes together.

    lmjax sweep --config=experiments/sweeps/batch_size.py --workdir=runs/batch_size --workers=2
    lmjax sweep --config=experiments/sweeps/batch_size.py:pod --workdir=runs/batch_size_pod

Lengths are in tokens, so that a trial with a larger batch makes fewer steps. `cpu`, the default, trains
experiments/debug.py's model, `pod` GPT-2 of 124M parameters (see learning_rate.py for what a worker wants).
Hardware: any for `cpu`, where 16 trials took 3.5 minutes on two busy CPU cores. `pod` has not been run.
"""

from lmjax.config import base_config
from lmjax.config_checks import check_one_of
from lmjax.models import families
from lmjax.sweeps import Sweep, grid

_SIZES = ("cpu", "pod")


def get_config(size="cpu"):
  check_one_of("experiments/sweeps/batch_size.py has no size", size, _SIZES)
  config = base_config()
  if size == "pod":
    config.model.update(families.gpt2("124M"), vocab_size=50304, dropout=0.0)
    config.data.update(tokenizer="bpe", tokenizer_vocab_size=50257, seq_len=1024)
    config.optim.update(warmup_tokens=100e6)
    config.train.update(num_tokens=2.5e9)
    config.eval.update(every_tokens=250e6, batch_size=64)
    config.checkpoint.update(every_tokens=250e6)
    config.mesh.update(data=1, fsdp=-1)
  else:
    config.model.update(num_layers=2, embed_dim=64, num_heads=4)
    config.data.update(tokenizer="bytes", seq_len=64)
    config.optim.update(warmup_tokens=4096)
    config.train.update(num_tokens=65536, sample_length=0)
    config.eval.update(num_batches=4, final_num_batches=16)
  return config


def get_sweep(size="cpu"):
  batches, rates = (([128, 256, 512, 1024], [3e-4, 6e-4, 1.2e-3, 2.4e-3]) if size == "pod" else
                    ([4, 8, 16, 32], [3e-3, 6e-3, 1.2e-2, 2.4e-2]))
  return Sweep(grid({"train.batch_size": batches, "optim.learning_rate": rates}))
