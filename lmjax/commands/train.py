"""train an experiment

Goes on from the last checkpoint where --workdir has one.

  lmjax train --config=experiments/quickstart.py --workdir=runs/quickstart
  lmjax train --config=experiments/gpt2.py:124M --workdir=runs/gpt2 --config.optim.learning_rate=3e-4
"""


