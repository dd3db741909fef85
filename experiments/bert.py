"""BERT at its published sizes, on any text: `bert.py:SIZE`, base (110M) or large (340M).

    lmjax train --config=experiments/bert.py:base --workdir=runs/bert --config.data.source='corpus/*.txt'

It learns masked tokens and whether one text follows another (Devlin et al. 2018, arXiv 1810.04805); RoBERTa's way is
`--config.objective.sentence_pairs=none --config.model.head=lm`, whole words `--config.objective.mask_unit=word`.
Hardware: base needs 1.8 GB for parameters, gradients and Adam's moments in float32, large 5.4 GB; what a batch needs
comes on top, and shrinks with grad_accum_steps. On a CPU `lmjax data` takes half a minute the first time on the
standard library's source, nearly all of it for the tokenizer.
Batch and schedule follow the paper (appendix A.2): 256 sequences of 512 tokens, a million steps of Adam at 1e-4 with
10,000 of warmup, falling linearly to 0, decay of 0.01 and dropout of 0.1; epsilon is that of its code. The paper's
first 900,000 steps had 128 tokens: `--config.data.seq_len=128`. The vocabulary has as many tokens as the published one
(30,522 rows, padded to 30,592), so that a BERT tokenizer.json fits; the one trained here is a byte-level BPE.
How long training takes and what it reaches has not been measured.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(size="base"):
  config = base_config()
  config.model.update(families.bert(size), vocab_size=30592, dropout=0.1)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=30522, seq_len=512)
  config.objective.update(name="masked_lm", sentence_pairs="next")
  config.optim.update(learning_rate=1e-4, schedule="linear", warmup_steps=10_000, final_learning_rate_ratio=0.0,
                      beta2=0.999, eps=1e-6, weight_decay=0.01)
  config.train.update(num_steps=1_000_000, batch_size=256, grad_accum_steps=8)
  config.eval.update(every_steps=10_000, batch_size=32)
  config.checkpoint.update(every_steps=10_000)
  return config
