"""ELECTRA at its published sizes, on any text: `electra.py:SIZE`, small (14M), base (110M) or large (335M).

    lmjax data --config=experiments/electra.py:small --config.data.source='corpus/*.txt'

The model is the discriminator, which tells tokens that were replaced; `small-generator` and its like are the narrower
models that replace them. Training both at once, the objective of Clark et al. 2020 (arXiv 2003.10555), is not among the
objectives yet, so that `lmjax train` refuses this file and says so; what stands here is the model, the data and the
schedule. `lmjax convert` takes an ELECTRA of Hugging Face's, and `lmjax.load` applies it.
Hardware: small needs 0.2 GB for parameters, gradients and Adam's moments in float32, base 1.8 GB, large 5.4 GB; what a
batch needs comes on top, and shrinks with grad_accum_steps. On a CPU `lmjax data` takes half a minute the first time
on the standard library's source, nearly all of it for the tokenizer.
Batch and schedule follow the paper (table 6 and section 3.3): Adam with 10,000 steps of warmup, falling linearly to 0,
decay of 0.01 and dropout of 0.1; small has sequences of 128 tokens. The vocabulary has as many tokens as the published
one (30,522 rows, padded to 30,592), so that a BERT tokenizer.json fits; the one trained here is a byte-level BPE. How
long training takes and what it reaches has not been measured.
"""

from lmjax.config import base_config
from lmjax.models import families

# Learning rate, sequences of a batch, tokens of a sequence, steps.
_TRAINING = {"small": (5e-4, 128, 128, 1_000_000), "base": (2e-4, 256, 512, 766_000),
             "large": (2e-4, 2048, 512, 400_000)}


def get_config(size="small"):
  config = base_config()
  config.model.update(families.electra(size), vocab_size=30592, dropout=0.1)
  learning_rate, batch_size, seq_len, num_steps = _TRAINING[size.removesuffix("-generator")]
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=30522, seq_len=seq_len)
  config.optim.update(learning_rate=learning_rate, schedule="linear", warmup_steps=10_000,
                      final_learning_rate_ratio=0.0, beta2=0.999, eps=1e-6, weight_decay=0.01)
  config.train.update(num_steps=num_steps, batch_size=batch_size, grad_accum_steps=8)
  config.eval.update(every_steps=10_000, batch_size=32)
  config.checkpoint.update(every_steps=10_000)
  return config
