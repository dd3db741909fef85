"""The critical batch size from the noise of gradients."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class GradientNoise:
  """What gradients at two batch sizes tell.

  Attributes:
    squared_norm: |G|^2 of the true gradient.
    noise: tr(Sigma), the variance of one example's gradient, summed over parameters.
    critical_batch_size: tr(Sigma) / |G|^2, in the unit of the batch sizes; None where the mean of |G|^2 is not above 0,
      so that more steps are needed.
    interval: of it, 95%; an end is None where it is not bounded.
  """
  squared_norm: float
  noise: float
  critical_batch_size: float | None
  interval: tuple[float | None, float | None]


def gradient_noise(small_squared_norms: np.ndarray, big_squared_norms: np.ndarray, small_batch: float,
                   big_batch: float) -> GradientNoise:
  """Estimates the simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.

  |G_B|^2 has the mean |G|^2 + tr(Sigma) / B, so two batch sizes give both unknowns without bias; their ratio is taken
  of the means over all steps, for the ratio of one step's estimates is biased and may be negative. Its interval is
  Fieller's.

  Args:
    small_squared_norms: squared norms of gradients of small batches, one a step: of a microbatch, or of one device.
    big_squared_norms: of the whole batches of the same steps.
    small_batch: size of a small batch, in examples or tokens.
    big_batch: size of a whole batch.

  Returns:
    The estimate.

  Raises:
    ValueError: where the big batch is not larger, or the steps differ in number.
  """
  small, big = np.asarray(small_squared_norms, float), np.asarray(big_squared_norms, float)
  if not 0 < small_batch < big_batch:
    raise ValueError(f"The batches have {small_batch} and {big_batch} examples, but the second must be the larger.")
  if small.shape != big.shape or small.ndim != 1 or not len(small):
    raise ValueError(f"There are {small.shape} and {big.shape} norms, but each step must have one of both.")
  squared = (big_batch * big - small_batch * small) / (big_batch - small_batch)
  noise = (small - big) / (1 / small_batch - 1 / big_batch)
  ratio = float(noise.mean() / squared.mean()) if squared.mean() > 0 else None
  return GradientNoise(float(squared.mean()), float(noise.mean()), ratio, _fieller(noise, squared))


def _fieller(above: np.ndarray, below: np.ndarray) -> tuple[float | None, float | None]:
  """Returns the 95% interval of the ratio of two means: all ratios r for which mean(above - r below) may be 0."""
  from scipy import special
  if len(above) < 3:
    return None, None
  n = len(above)
  t = special.stdtrit(n - 1, 0.975)
  covariance = np.cov(above, below) / n
  square = below.mean() ** 2 - t ** 2 * covariance[1, 1]
  cross = above.mean() * below.mean() - t ** 2 * covariance[0, 1]
  constant = above.mean() ** 2 - t ** 2 * covariance[0, 0]
  if square <= 0 or below.mean() <= 0:  # The mean below may be 0.
    return None, None
  root = np.sqrt(max(cross ** 2 - square * constant, 0.0))
  return float((cross - root) / square), float((cross + root) / square)
