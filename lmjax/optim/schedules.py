"""Learning-rate schedules, as plain functions of the step that run on the host.

The compiled training step takes the learning rate as an input, so that a sweep over schedules compiles once.
"""

import math
from typing import Callable

from lmjax.config import OptimConfig


def make_schedule(cfg: OptimConfig, num_steps: int) -> Callable[[int], float]:
  """Returns the learning rate as a function of the update's index, 0 for the first.

  Warmup is linear and reaches the peak with update `warmup_steps - 1`. After it:

  * constant: the peak.
  * linear, cosine (Loshchilov and Hutter 2016, arXiv 1608.03983): down to the final ratio at the last update.
  * inverse_sqrt: peak * sqrt(w / update), w being the warmup, at least 1 (Vaswani et al. 2017, section 5.3).
  * wsd: the peak, then linearly down to the final ratio over `decay_steps`, by default a fifth of the run
    (Hu et al. 2024, arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392).

  Args:
    cfg: with durations in steps.
    num_steps: length of the run.
  """
  warmup = cfg.warmup_steps or 0
  decay = num_steps // 5 if cfg.decay_steps is None else cfg.decay_steps
  final = cfg.final_learning_rate_ratio

  def fall(done: float) -> float:
    return final + (1 - final) * (1 - done)

  def cosine(done: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

  # Each takes the update's index, counted from the end of warmup, and how many there are, so that the last is at 1.
  shapes = {
      "constant": lambda i, n: 1.0,
      "linear": lambda i, n: fall(i / max(n - 1, 1)),
      "cosine": lambda i, n: cosine(i / max(n - 1, 1)),
      "inverse_sqrt": lambda i, n: math.sqrt(max(warmup, 1) / (i + max(warmup, 1))),
      "wsd": lambda i, n: fall(max(0.0, (i - (n - decay) + 1) / max(decay, 1))),
  }
  shape = shapes[cfg.schedule]

  def learning_rate(step: int) -> float:
    if step < warmup:
      return cfg.learning_rate * (step + 1) / warmup
    length = max(num_steps - warmup, 1)
    return cfg.learning_rate * shape(min(step - warmup, length - 1), length)

  return learning_rate
