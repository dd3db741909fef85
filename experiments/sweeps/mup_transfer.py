"""Does the best learning rate stay where it is: over widths under muP, over depths under CompleteP?

    lmjax sweep --config=experiments/sweeps/mup_transfer.py --workdir=runs/mup_width --workers=2
    lmjax sweep --config=experiments/sweeps/mup_transfer.py:cpu-depth --workdir=runs/mup_depth --workers=2
    lmjax sweep --config=experiments/sweeps/mup_transfer.py:pod-width --workdir=runs/mup_pod --workers=2

`cpu`, the default and the same as `cpu-width`, has widths of 32 to 256 under the standard parametrization and muP,
`cpu-depth` depths of 2 to 8 under muP and CompleteP, each at seven learning rates, a factor of two apart; `pod` or
`pod-width` and `pod-depth` have widths of 256 to 2048 and depths of 4 to 16 (see learning_rate.py for what a worker
wants). Heads keep their width.
tests/benchmarks/mup_transfer.py does the like on one GPU within minutes, all learning rates of a size at once.
Hardware: any for `cpu`. `pod` has not been run.
"""

from lmjax.config import base_config
from lmjax.config_checks import check_one_of
from lmjax.models import families
from lmjax.sweeps import Sweep, grid, product, values, zipped

_SIZES = ("cpu", "cpu-width", "cpu-depth", "pod", "pod-width", "pod-depth")
# Base width and depth, widths, depths, head_dim.
_SHAPES = {"cpu": (32, 2, (32, 64, 128, 256), (2, 4, 8), 16), "pod": (256, 4, (256, 512, 1024, 2048), (4, 8, 16), 64)}


def get_config(what="cpu"):
  check_one_of("experiments/sweeps/mup_transfer.py has no size", what, _SIZES)
  size, _, _ = what.partition("-")
  base_width, base_depth, _, _, head_dim = _SHAPES[size]
  config = base_config()
  config.model.update(families.llama_style(), embed_dim=base_width, num_layers=base_depth, head_dim=head_dim,
                      num_heads=base_width // head_dim, tie_embeddings=False, base_embed_dim=base_width,
                      base_num_layers=base_depth)
  config.train.update(sample_length=0)
  if size == "pod":
    config.data.update(tokenizer="bpe", tokenizer_vocab_size=32000, seq_len=1024)
    config.optim.update(warmup_tokens=50e6)
    config.train.update(num_tokens=1e9, batch_size=256)
    config.eval.update(batch_size=64)
    config.mesh.update(data=1, fsdp=-1)
  else:
    config.data.update(tokenizer="bytes", seq_len=64)
    config.optim.update(warmup_steps=20)
    config.train.update(num_steps=200, batch_size=16)
    config.eval.update(final_num_batches=16)
  return config


def get_sweep(what="cpu"):
  size, _, axis = what.partition("-")
  _, _, widths, depths, head_dim = _SHAPES[size]
  rates = grid({"optim.learning_rate": [2.0 ** power for power in range(-10, -3)]})
  if axis == "depth":
    sizes = grid({"model.parametrization": ["mup", "completep"], "model.num_layers": list(depths)})
    return Sweep(product(sizes, rates))
  sizes = zipped(values("model.embed_dim", widths), values("model.num_heads", [width // head_dim for width in widths]))
  return Sweep(product(grid({"model.parametrization": ["standard", "mup"]}), sizes, rates))
