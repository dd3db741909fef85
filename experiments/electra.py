"""ELECTRA at its published sizes, on any text: `electra.py:SIZE`, small, base or large.

    lmjax train --config=experiments/electra.py:small --workdir=/tmp/electra --config.data.source='corpus/*.txt'

It learns by replaced token detection (lmjax/objectives/replaced_tokens.py): a generator of a quarter of the size, of
base a third, fills masked tokens in, and the discriminator tells which are not the original ones. `lmjax convert` makes
of the workdir a Hugging Face folder with the discriminator, which is what is fine-tuned.
Hardware: small needs 0.2 GB for parameters, gradients and Adam's moments in float32, base 1.9 GB, large 5.7 GB; what a
batch needs comes on top, and shrinks with grad_accum_steps. On a CPU `lmjax data` takes half a minute the first time
on the standard library's source, nearly all of it for the tokenizer.
Batch and schedule follow the paper (table 6 and section 3.3): Adam with 10,000 steps of warmup, falling linearly to 0,
decay of 0.01 and dropout of 0.1; small has sequences of 128 tokens, and large hides 25% of them, the others 15%. Of
those 15% stay what they are, as in the code released with it. The vocabulary has as many tokens as the published
one (30,522 rows, padded to 30,592), so that a BERT tokenizer.json fits; the one trained here is a byte-level BPE. How
long training takes and what it reaches has not been measured.
"""

from lmjax.config import base_config
from lmjax.models import families

# Learning rate, sequences of a batch, tokens of a sequence, steps, share of hidden tokens.
_TRAINING = {"small": (5e-4, 128, 128, 1_000_000, 0.15), "base": (2e-4, 256, 512, 766_000, 0.15),
             "large": (2e-4, 2048, 512, 400_000, 0.25)}


def get_config(size="small"):
  config = base_config()
  config.model.update(families.electra_pretraining(size), vocab_size=30592, dropout=0.1)
  learning_rate, batch_size, seq_len, num_steps, mask_rate = _TRAINING[size]
  config.objective.update(name="replaced_tokens", mask_rate=mask_rate, mask_random=0.0, mask_same=0.15)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=30522, seq_len=seq_len)
  config.optim.update(learning_rate=learning_rate, schedule="linear", warmup_steps=10_000,
                      final_learning_rate_ratio=0.0, beta2=0.999, eps=1e-6, weight_decay=0.01)
  config.train.update(num_steps=num_steps, batch_size=batch_size, grad_accum_steps=8)
  config.eval.update(every_steps=10_000, batch_size=32)
  config.checkpoint.update(every_steps=10_000)
  return config
