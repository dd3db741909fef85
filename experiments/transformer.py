"""The Transformer of Vaswani et al. 2017 (arXiv 1706.03762) as a translator: `transformer.py:SIZE`, base or big.

    lmjax train --config=experiments/transformer.py --workdir=runs/transformer --config.data.data_dir=/data/tfds

It learns WMT 2014 from English to German as TFDS has it (wmt14_translate/de-en, prepared as array_record where there
is a network); another pair is `--config.data.tasks=wmt14/en-fr`, and any of texts a task of kind text_to_text (see
lmjax/data/task.py). A model with biases of attention too converts from and to Hugging Face's Marian:
`--config.model.qkv_bias=True --config.model.out_bias=True`.

Hardware: base keeps 1 GB of parameters, gradients and Adam's moments in float32, big 3.4 GB. Batch and schedule follow
sections 5.1 to 5.4 of the paper: 25,000 tokens of each side a step, 100,000 steps (big 300,000), Adam with betas 0.9
and 0.98, 4000 steps of warmup and then the inverse root, label smoothing of 0.1, dropout of 0.1 (big 0.3), and one
vocabulary of some 37,000 pieces for both languages. Sentences are padded to 128 tokens and not sorted by their length,
so that a batch of 768 has about as many as the paper's.
How long it takes and what it reaches here has not been measured; the paper has 27.3 BLEU (big 28.4) from English to
German on newstest2014, after 12 hours (big 3.5 days) on eight P100.
"""

from lmjax.config import base_config
from lmjax.data.task_specs import set_tasks
from lmjax.models import families


def get_config(size="base"):
  config = base_config()
  big = size == "big"
  config.model.update(families.transformer(size), dropout=0.3 if big else 0.1)
  set_tasks(config, "wmt14/en-de")
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=37000, seq_len=128)
  config.objective.update(label_smoothing=0.1)
  # The paper's rate is width^-0.5 * min(step^-0.5, step * warmup^-1.5).
  config.optim.update(schedule="inverse_sqrt", learning_rate=(config.model.embed_dim * 4000) ** -0.5, warmup_steps=4000,
                      beta1=0.9, beta2=0.98, eps=1e-9, weight_decay=0.0, clip_norm=None)
  config.train.update(num_steps=300_000 if big else 100_000, batch_size=768, sample_length=0)
  config.eval.update(every_steps=1000)
  config.checkpoint.update(every_steps=1000)
  return config
