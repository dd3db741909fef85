"""T5 at its published sizes: `t5.py:SIZE`, one of small, base, large, 3B, 11B, or 1.1-small ... 1.1-XXL for T5 1.1.

    lmjax train --config=experiments/t5.py --workdir=/tmp/t5 --config.data.source='/data/*.txt' \\
        --config.data.tokenizer=/data/tokenizer.json

Hardware: base keeps 1.8 GB of parameters and gradients in float32, 11B some 90 GB (Adafactor's moments are small):
fsdp, which this file turns on, divides that by the number of devices. Batch, length and schedule follow Raffel et al.
2019 (arXiv 1910.10683, section 3.1): 2^19 steps of 128 texts of 512 tokens, Adafactor, whose steps are relative to the
parameters, and a learning rate of 1 / sqrt(max(step, 10^4)), which is level for ten thousand steps before it falls
(here it rises to that level instead). It learns by span corruption: 568 tokens of text, of which 15% are taken out in
spans of 3 on average, make 512 for the encoder and 114 for the decoder. The vocabulary has 32,000 pieces and 100
sentinels; one trained here has the pieces, and gets the 28 sentinels that such a text needs.
How long it takes and what it reaches has not been measured.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(size="base"):
  config = base_config()
  config.model.update(families.t5_1_1(size.removeprefix("1.1-")) if size.startswith("1.1-") else families.t5(size))
  # Version 1.1 was pre-trained without dropout.
  config.model.update(dropout=0.0 if size.startswith("1.1-") else 0.1)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=32000, seq_len=512)
  config.objective.update(name="span_corruption", noise_density=0.15, mean_span_length=3.0)
  config.optim.update(name="adafactor", schedule="inverse_sqrt", learning_rate=1e-2, warmup_steps=10_000,
                      weight_decay=0.0, clip_norm=None)
  config.train.update(num_steps=2**19, batch_size=128, sample_length=0)
  config.eval.update(every_steps=5000, batch_size=128)
  config.checkpoint.update(every_steps=5000)
  config.mesh.update(data=1, fsdp=-1)
  return config
