"""XLNet at its published sizes: `xlnet.py:SIZE`, base or large.

    lmjax data --config=experiments/xlnet.py --config.data.source='/data/*.txt' \\
        --config.data.tokenizer=/data/tokenizer.json

Permutation language modelling, which XLNet learns by, is not among the objectives yet: `lmjax train` refuses this file.
So far it serves `lmjax data`, and a model that is converted from or to Hugging Face's.

Hardware: base keeps 1.9 GB of parameters, gradients and Adam's moments in float32, large 5.8 GB, and the scores of
every layer are kept whole: the length squared, for each head. Batch and schedule follow Yang et al. 2019 (arXiv
1906.08237, section 3.1 and table 8): 500,000 steps of 8192 texts of 512 tokens on 512 chips of TPU v3, which took the
large model 5.5 days; Adam with a weight decay of 0.01 and an epsilon of 1e-6, a rate of 4e-4 that falls in a line to
nothing after 40,000 steps of warmup, and dropout of 0.1. Half of a batch is read backwards, and the first 256 tokens of
a text go into the memory, of 384, as in the code released with it. The vocabulary has 32,000 pieces.
How long it takes and what it reaches here has not been measured.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(size="base"):
  config = base_config()
  config.model.update(families.xlnet(size), dropout=0.1, remat_policy="full", reverse_half=True, memory_len=384,
                      memory_reuse_len=256)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=32000, seq_len=512)
  config.optim.update(schedule="linear", learning_rate=4e-4, warmup_steps=40_000, final_learning_rate_ratio=0.0,
                      beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01)
  config.train.update(num_steps=500_000, batch_size=8192, grad_accum_steps=16, sample_length=0)
  config.eval.update(every_steps=5000, batch_size=512)
  config.checkpoint.update(every_steps=5000)
  config.mesh.update(data=1, fsdp=-1)
  return config
