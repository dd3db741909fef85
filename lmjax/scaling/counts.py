"""The conventions of scaling laws: what counts as compute, and whose parameters.

Kaplan et al. 2020 (arXiv 2001.08361) leave the embeddings out of N, Hoffmann et al. 2022 (arXiv 2203.15556) count all;
with small models the exponents differ by that alone (Pearce and Song 2024, arXiv 2406.12907). Both take C = 6 N D, a
multiplication and an addition for each parameter and token in the forward pass and twice that in the backward pass.
"""

import dataclasses

import numpy as np

PARAM_COLUMNS = {"total": "num_params", "non_embedding": "num_params_non_embedding", "active": "num_params_active"}
ATTENTION_COLUMNS = ("model.num_layers", "model.embed_dim", "data.seq_len")


@dataclasses.dataclass(frozen=True)
class FlopCount:
  """How compute follows from size and tokens: C = (k N + attention) D.

  Attributes:
    per_param_token: k, 6 by both papers.
    attention: FLOPs of attention's scores a token, [R], or 0.
  """
  per_param_token: float = 6.0
  attention: np.ndarray | float = 0.0

  def flops(self, size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the compute of training with so many parameters and tokens."""
    return (self.per_param_token * size + self.attention) * tokens

  def tokens(self, size: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """Returns the tokens that so much compute pays for."""
    return flops / (self.per_param_token * size + self.attention)


def attention_flops(num_layers: np.ndarray, width: np.ndarray, seq_len: np.ndarray) -> np.ndarray:
  """Returns the training FLOPs a token of causal attention's scores and sums, 6 layers width length.

  Per layer a token's query meets (T + 1) / 2, about T / 2, keys; scores and sums are 2 products of 2 FLOPs for each of
  the width's entries, and the backward pass doubles the forward one: 3 * 2 * 2 * T / 2 * width (Kaplan et al. 2020,
  table 1, whose 2 layers width length is the forward pass).
  """
  return 6.0 * num_layers * width * seq_len
