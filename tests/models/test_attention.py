"""Masks against tables written by hand, and every implementation against plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.models import attention
from lmjax.models.attention import AttentionSpec, dot_product_attention


def seen(spec: AttentionSpec, length: int, **kwargs) -> list[str]:
  """Which keys each query attends to, as rows of 0 and 1: with equal scores and one-hot values, weights show it."""
  q = jnp.zeros((1, length, 1, length))
  v = jnp.eye(length)[None, :, None, :]
  rows = dot_product_attention(q, q, v, spec, **kwargs)[0, :, 0]
  return ["".join("1" if w > 0 else "0" for w in row) for row in rows]


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_masks_are_those_written_by_hand(implementation, monkeypatch):
  monkeypatch.setattr(attention, "_CHUNK", 2)
  kw = dict(implementation=implementation)
  assert seen(AttentionSpec(causal=True), 4, **kw) == ["1000", "1100", "1110", "1111"]
  assert seen(AttentionSpec(causal=False), 3, **kw) == ["111", "111", "111"]
  assert seen(AttentionSpec(window=2), 5, **kw) == ["10000", "11000", "01100", "00110", "00011"]
  assert seen(AttentionSpec(window=1), 3, **kw) == ["100", "010", "001"]
  segments = jnp.array([[1, 1, 2, 2, 2]])
  assert seen(AttentionSpec(), 5, segment_ids_BT=segments, **kw) == ["10000", "11000", "00100", "00110", "00111"]
  assert seen(AttentionSpec(window=2), 5, segment_ids_BT=segments, **kw) == [
      "10000", "11000", "00100", "00110", "00011"]


def test_keys_at_negative_positions_are_seen_by_nobody():
  at = jnp.array([[-1, 0, 1, 2]])
  rows = seen(AttentionSpec(), 4, query_positions_BT=at, key_positions_BS=at)
  assert rows[1:] == ["0100", "0110", "0111"]


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=37), AttentionSpec(softcap=2.0),
                                  AttentionSpec(alibi=True), AttentionSpec(causal=False)])
def test_implementations_equal_plain_arithmetic(implementation, spec):
  B, T, N, K, H = 2, 300, 6, 2, 8
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K)))
  got = dot_product_attention(q, k, v, spec, implementation=implementation)
  slopes = attention.alibi_slopes(N)
  for n in range(N):
    scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // 3]).astype(np.float64) / np.sqrt(H)
    if spec.softcap:
      scores = spec.softcap * np.tanh(scores / spec.softcap)
    t, s = np.indices((T, T))
    if spec.alibi:
      scores = scores - slopes[n] * np.abs(t - s)
    mask = np.ones((T, T), bool)
    mask &= (s <= t) if spec.causal else True
    mask &= (t - s < spec.window) if spec.window else True
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(got[:, :, n], np.einsum("bts,bsh->bth", weights, v[:, :, n // 3]), atol=2e-5)


def test_alibi_slopes_are_the_papers():
  np.testing.assert_allclose(attention.alibi_slopes(8), [2.0 ** -i for i in range(1, 9)])
  # For 12 heads: those of 8, then every other one of those of 16.
  np.testing.assert_allclose(attention.alibi_slopes(12)[8:], [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5])


def test_rotary_scores_depend_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
  def score(i, j):
    turn = lambda x, at: attention.rotate(x, *attention.rotary_angles(jnp.array([[at]]), 16, 10_000.0))
    return float(jnp.vdot(turn(q, i), turn(k, j)))
  assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
  assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)
  assert score(7, 7) == pytest.approx(float(jnp.vdot(q, k)), abs=1e-5)


def test_cudnn_refuses_by_name_what_it_cannot_do():
  x = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
  with pytest.raises(UserError, match="attention_softcap"):
    dot_product_attention(x, x, x, AttentionSpec(softcap=1.0), implementation="cudnn")
