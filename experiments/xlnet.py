"""XLNet at its published sizes: `xlnet.py:SIZE`, base or large.

    lmjax train --config=experiments/xlnet.py --workdir=/tmp/xlnet --config.data.source='/data/*.txt' \\
        --config.data.tokenizer=/data/tokenizer.json

It learns by permutation language modelling with a memory (lmjax/objectives/permutation_lm.py): a sixth of the tokens is
predicted, in spans. An example has 1024 tokens, of which the first 512 are read for their memory. The paper's pairs of
segments, with [SEP] and [CLS], are left out: a text is a piece of the corpus as it is.

Hardware: base keeps 1.9 GB of parameters, gradients and Adam's moments in float32, large 5.8 GB, and the scores of
every layer are kept whole: the length squared, for each head. Batch and schedule follow Yang et al. 2019 (arXiv
1906.08237, section 3.1 and table 8): 500,000 steps of 8192 texts of 512 tokens on 512 chips of TPU v3, which took the
large model 5.5 days; Adam with a weight decay of 0.01 and an epsilon of 1e-6, a rate of 4e-4 that falls in a line to
nothing after 40,000 steps of warmup, and dropout of 0.1. Half of the texts are read backwards, and the memory holds 384
tokens, as in the code released with it; there it gathers the first 256 of one text after another, each of which begins
where those end, and here it is the last of the text before. The vocabulary has 32,000
pieces.
How long it takes and what it reaches here has not been measured.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(size="base"):
  config = base_config()
  config.model.update(families.xlnet(size), dropout=0.1, remat_policy="full", reverse_half=True, memory_len=384)
  config.objective.update(name="permutation_lm", memory=True)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=32000, seq_len=512)
  config.optim.update(schedule="linear", learning_rate=4e-4, warmup_steps=40_000, final_learning_rate_ratio=0.0,
                      beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01)
  config.train.update(num_steps=500_000, batch_size=8192, grad_accum_steps=16, sample_length=0)
  config.eval.update(every_steps=5000, batch_size=512)
  config.checkpoint.update(every_steps=5000)
  config.mesh.update(data=1, fsdp=-1)
  return config
