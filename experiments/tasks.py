"""A small model that learns labelled tasks from scratch: `tasks.py:TASK`, such as those of the standard library.

    lmjax train --config=experiments/tasks.py:stdlib/packages --workdir=runs/packages
    lmjax train --config=experiments/tasks.py:stdlib/packages,stdlib/identifiers --workdir=runs/both

A task is a name in lmjax/data/task_specs.py; several, with commas between, share a body and have a head each. Tasks of
labels get an encoder, those of texts an encoder-decoder.
Hardware: any; two CPU cores take less than five minutes. What each of the four offline tasks reaches, and what doing
nothing clever does, is in the README.
"""

from lmjax.config import base_config
from lmjax.data.task_specs import set_tasks
from lmjax.models import families

# Tokens of an example, examples of a step, and steps.
_SIZES = {"stdlib/packages": (256, 16, 400), "stdlib/identifiers": (128, 32, 400), "stdlib/answers": (256, 16, 600),
          "stdlib/docstrings": (128, 16, 900)}


def get_config(tasks="stdlib/packages"):
  config = set_tasks(base_config(), tasks)
  writes = config.model.head == "lm"
  small = dict(num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=512, vocab_size=None)
  if writes:
    config.model.update({**families.t5_1_1("small"), **small, "num_layers": 3, "num_decoder_layers": 3})
  else:
    config.model.update({**families.bert("base"), **small, "embedding_dim": None, "head": config.model.head})
  seq_len, batch_size, num_steps = _SIZES.get(tasks, (128, 32, 500))
  config.model.update(dropout=0.1, max_positions=None)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=2048 if writes else 4096, seq_len=seq_len)
  config.optim.update(learning_rate=2e-3 if writes else 1e-3, warmup_steps=50, schedule="linear",
                      final_learning_rate_ratio=0.0, beta2=0.98, weight_decay=0.01)
  config.train.update(num_steps=num_steps, batch_size=batch_size, sample_length=0)
  config.eval.update(every_steps=num_steps // 4, num_batches=8)
  return config
