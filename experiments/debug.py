"""A model that trains in seconds, for trying a change end to end: `debug.py`, or `debug.py:FAMILY` for any family.

    lmjax train --config=experiments/debug.py --workdir=/tmp/debug
    lmjax train --config=experiments/debug.py:gemma --workdir=/tmp/debug_gemma

A family is the name of a preset in lmjax/models/families.py; it trains by its own objective, at a few hundred thousand
parameters.
Hardware: any; on two CPU cores a few seconds once the standard library's source is tokenised (bytes, no training of a
tokenizer). The loss falls from 5.6 to below 3.5 nats a byte.
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config(family=None):
  config = base_config()
  if family is None:
    config.model.update(num_layers=2, embed_dim=64, num_heads=4)
  else:
    config.model.update(families.debug(families.preset(family)))
    config.objective.update(families.objective_of(config.model))
  config.data.update(tokenizer="bytes", seq_len=64)
  config.optim.update(learning_rate=3e-3, warmup_steps=10)
  config.train.update(num_steps=100, batch_size=8, sample_length=40)
  config.eval.update(num_batches=4, final_num_batches=16)
  return config
