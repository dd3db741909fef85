"""Mixtral at its published sizes: `mixtral.py:SIZE`, one of 8x7B, 8x22B.

    lmjax train --config=experiments/mixtral.py:8x7B --workdir=gs://BUCKET/mixtral \\
        --config.data.source='/data/*.parquet' --config.data.tokenizer=/data/tokenizer.json

Hardware: 8x7B has 46.7 billion parameters, of which 12.9 billion act on a token; with gradients and Adam's moments in
float32 they are 750 GB (8x22B: 2.2 TB), which this file divides over eight ways of experts and the rest by fsdp. The
number of devices must be a multiple of eight, and four microbatches of 1024 sequences must divide over them.
The paper (Jiang et al. 2024, arXiv 2401.04088) tells nothing of its training. Optimizer and schedule are those of
llama.py; the load-balancing loss has the weight of the released config.json, and the squared log-normaliser of the
routers that of Zoph et al. 2022 (arXiv 2202.08906). No token is dropped.
How long it takes and what it reaches has not been measured; a first trial:
`--config.train.num_steps=20 --config.optim.warmup_steps=2`.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(size="8x7B"):
  config = base_config()
  config.model.update(families.mixtral(size), remat_policy="full")
  config.data.update(seq_len=4096)
  config.objective.update(router_balance=0.02, router_z_loss=1e-3)
  config.optim.update(learning_rate=3e-4, warmup_steps=2000, eps=1e-5)
  config.train.update(num_tokens=20e9, batch_size=1024, grad_accum_steps=4)
  config.eval.update(every_steps=500, batch_size=256)
  config.checkpoint.update(every_steps=500)
  config.mesh.update(data=1, fsdp=-1, expert=8)
  return config
