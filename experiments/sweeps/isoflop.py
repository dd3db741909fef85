"""Compute-optimal runs at several budgets, for a scaling law: what `lmjax isoflop` lays out, as a sweep.

    lmjax sweep --config=experiments/sweeps/isoflop.py --workdir=runs/isoflop
    lmjax fit --input=runs/isoflop --flops=train_flops --tokens=num_tokens --plot=isoflop.png
    lmjax sweep --config=experiments/sweeps/isoflop.py:pod --workdir=runs/isoflop_pod
    lmjax isoflop --config=experiments/sweeps/isoflop.py:pod --budgets=1e18,3e18,1e19,3e19

`ladder` is the real thing on two cores, models of Python's own source: runs of a few sizes and horizons are fitted,
and the last run, of eight times the compute of any other and 67 times that of the first, is held out:

    lmjax sweep --config=experiments/sweeps/isoflop.py:ladder --workdir=runs/ladder --workers=2 --stack=1
    lmjax fit --input=runs/ladder --flops=train_flops --tokens=num_tokens --hold_out=1 --plot=docs/ladder.png

On the ladder the width is what grows, over one layer with heads of 16, and muP carries one learning rate to all widths;
the batch grows with the tokens by the Step Law. The rate falls to zero (Bergsma et al. 2025, arXiv 2502.15938), so that
a loss belongs to its own horizon. N counts all parameters: they are tied, so that 6 N is what a token costs but for
attention (Pearce and Song 2024, arXiv 2406.12907, on why that matters for small models), and C is counted exactly.

Why one layer: two and more can learn to look up what followed the same tokens before (induction heads, Olsson et al.
2022, arXiv 2209.11895), all at once. Of three layers the widest of the longest runs learned it and no fitted one did
(tests/benchmarks/repeated_tokens.py), so that their law foretold 2.320 for what came to 2.082. A law holds within a
regime, and its residuals do not tell where that ends. The README has what this ladder foretold, and how far off others
were.

Hardware: any for `cpu`; two cores for `ladder`. `pod` has not been run.
"""

from lmjax.config import base_config
from lmjax.config_checks import check_one_of
from lmjax.models import families
from lmjax.sweeps import Sweep, chain, product, values
from lmjax.sweeps.ladder import ladder

_SIZES = ("cpu", "pod", "ladder")
CPU, POD = (6e10, 2e11, 6e11), (1e18, 3e18, 1e19, 3e19)
# Rungs of the ladder: a budget, its widths, and how many seeds.
FITTED = ((6e11, (32, 48), 2), (1.2e12, (32, 48, 64), 2), (2.4e12, (32, 48, 64, 80), 2), (4.8e12, (48, 64, 80, 96), 2))
FORETOLD = (4e13, (160,), 1)


def get_config(size="cpu"):
  check_one_of("experiments/sweeps/isoflop.py has no size", size, _SIZES)
  config = base_config()
  if size == "pod":
    config.model.update(families.llama_style(), num_layers=12, embed_dim=768, num_heads=6, mlp_dim=2048)
    config.data.update(tokenizer="bpe", tokenizer_vocab_size=32000, seq_len=2048)
    config.optim.update(schedule="linear", final_learning_rate_ratio=0.0)
    config.train.update(num_tokens=1e9)
    config.eval.update(batch_size=64)
    config.mesh.update(data=1, fsdp=-1)
    return config
  layers = 1 if size == "ladder" else 2
  config.model.update(families.llama_style(), num_layers=layers, embed_dim=32, num_heads=2, mlp_dim=96,
                      scan_layers=False, qk_norm="head", init_std=0.05, parametrization="completep", base_embed_dim=32,
                      base_num_layers=layers)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=512, seq_len=128)
  config.optim.update(name="muon", learning_rate=0.03 if size == "ladder" else 0.015, schedule="linear",
                      final_learning_rate_ratio=0.0, warmup_steps=10)
  config.train.update(num_steps=600, batch_size=10, sample_length=0)
  config.eval.update(batch_size=64, final_num_batches=48 if size == "ladder" else 8)
  return config


def get_sweep(size="cpu"):
  config = get_config(size)
  if size == "pod":  # The devices share the batch.
    return Sweep(ladder(config, POD, total=1e21, batch_multiple=64))
  if size == "ladder":
    rung = lambda budget, width: ladder(config, (budget,), (1,), aspect=width, rate="own")
    return Sweep(chain(*(product(rung(budget, width), values("seed", range(seeds)))
                         for budget, widths, seeds in (*FITTED, FORETOLD) for width in widths)))
  return Sweep(ladder(config, CPU, sizes=3))
