"""Llama at its published sizes: `llama.py:SIZE`, one of 2-7B, 2-13B, 2-70B, 3-8B, 3-70B, 3.2-1B, 3.2-3B.

    lmjax train --config=experiments/llama.py:3.2-1B --workdir=gs://BUCKET/llama \\
        --config.data.source='/data/*.parquet' --config.data.tokenizer=/data/tokenizer.json

Hardware: 3.2-1B keeps 20 GB of parameters, gradients and Adam's moments in float32, 8B some 130 GB: fsdp, which this
file turns on, divides that by the number of devices. Optimizer and schedule follow Touvron et al. 2023 (arXiv
2307.09288, section 2.2): AdamW with betas 0.9 and 0.95, 2000 steps of warmup, cosine to a tenth, four million tokens a
step.
How long it takes and what it reaches has not been measured; a first trial:
`--config.train.num_steps=20 --config.optim.warmup_steps=2`.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(size="3.2-1B"):
  config = base_config()
  config.model.update(families.llama(size), remat_policy="full")
  config.data.update(seq_len=4096)
  config.optim.update(learning_rate=3e-4, warmup_steps=2000, eps=1e-5)
  config.train.update(num_tokens=20e9, batch_size=1024, grad_accum_steps=4)
  config.eval.update(every_steps=500, batch_size=128)
  config.checkpoint.update(every_steps=500)
  config.mesh.update(data=1, fsdp=-1)
  return config
