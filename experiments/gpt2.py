"""GPT-2 at its published sizes, on any text: `gpt2.py:SIZE`, one of 124M, 355M, 774M, 1.5B.

    lmjax train --config=experiments/gpt2.py:124M --workdir=runs/gpt2 --config.data.source='corpus/*.txt' \\
        --config.mesh.data=1 --config.mesh.fsdp=-1

Hardware: 124M needs 1.5 GB for parameters and Adam's moments in float32; the larger sizes want fsdp over several
devices. Batch and schedule follow Brown et al. 2020 (arXiv 2005.14165, table 2.1): half a million tokens a step, cosine
to a tenth. The published vocabulary is kept (50,257 rows, padded to 50,304), so a GPT-2 tokenizer.json fits; the one
trained here has as many tokens.
How long it takes and what it reaches has not been measured; a first trial:
`--config.train.num_steps=20 --config.optim.warmup_steps=2`.
"""

from lmjax.config import base_config
from lmjax.models import families

_LEARNING_RATES = {"124M": 6e-4, "355M": 3e-4, "774M": 2.5e-4, "1.5B": 2e-4}


def get_config(size="124M"):
  config = base_config()
  config.model.update(families.gpt2(size), vocab_size=50304, dropout=0.0)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=50257, seq_len=1024)
  config.optim.update(learning_rate=_LEARNING_RATES[size], warmup_tokens=375e6)
  config.train.update(num_tokens=10e9, batch_size=512, grad_accum_steps=8)
  config.eval.update(every_steps=500, batch_size=64)
  config.checkpoint.update(every_steps=1000)
  return config
