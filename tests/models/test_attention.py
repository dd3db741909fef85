"""Masks against tables written by hand, and every implementation against plain arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import ModelConfig, UserError
from lmjax.models import attention, blockwise, rope
from lmjax.models.attention import AttentionSpec, dot_product_attention


def seen(spec: AttentionSpec, length: int, **kwargs) -> list[str]:
  """Which keys each query attends to, as rows of 0 and 1: with equal scores and one-hot values, weights show it."""
  q = np.zeros((1, length, 1, length), np.float32)
  v = np.eye(length, dtype=np.float32)[None, :, None, :]
  run = jax.jit(lambda q, v: dot_product_attention(q, q, v, spec, **kwargs)[0, :, 0],
                compiler_options={"xla_backend_optimization_level": 0})
  rows = np.asarray(run(q, v))
  return ["".join("1" if w > 0 else "0" for w in row) for row in rows]


# One row a query, one character a key. Documents of two, one and three tokens; then two tokens of padding.
SEGMENTS = jnp.array([[1, 1, 2, 3, 3, 3, 0, 0]])
LEFT_PADDED = jnp.array([[-1, -1, 0, 1, 2, 3]])
MASKS = {
    "causal": (AttentionSpec(), 4, {}, ["1000",
                                        "1100",
                                        "1110",
                                        "1111"]),
    "bidirectional": (AttentionSpec(causal=False), 3, {}, ["111", "111", "111"]),
    "window of one": (AttentionSpec(window=1), 3, {}, ["100", "010", "001"]),
    "window of two": (AttentionSpec(window=2), 5, {}, ["10000",
                                                       "11000",
                                                       "01100",
                                                       "00110",
                                                       "00011"]),
    "window as long as the row": (AttentionSpec(window=4), 4, {}, ["1000", "1100", "1110", "1111"]),
    "bidirectional window": (AttentionSpec(causal=False, window=2), 5, {}, ["11111",
                                                                           "11111",
                                                                           "01111",
                                                                           "00111",
                                                                           "00011"]),
    "documents": (AttentionSpec(), 8, dict(segment_ids_BT=SEGMENTS), ["10000000",
                                                                      "11000000",
                                                                      "00100000",
                                                                      "00010000",
                                                                      "00011000",
                                                                      "00011100",
                                                                      "00000010",
                                                                      "00000011"]),
    "documents and a window": (AttentionSpec(window=2), 8, dict(segment_ids_BT=SEGMENTS), ["10000000",
                                                                                           "11000000",
                                                                                           "00100000",
                                                                                           "00010000",
                                                                                           "00011000",
                                                                                           "00001100",
                                                                                           "00000010",
                                                                                           "00000011"]),
    "bidirectional documents": (
        AttentionSpec(causal=False), 8, dict(segment_ids_BT=SEGMENTS), ["11000000",
                                                                        "11000000",
                                                                        "00100000",
                                                                        "00011100",
                                                                        "00011100",
                                                                        "00011100",
                                                                        "00000011",
                                                                        "00000011"]),
    "a prefix": (AttentionSpec(), 5, dict(prefix_BS=jnp.array([[True, True, True, False, False]])), ["11100",
                                                                                                    "11100",
                                                                                                    "11100",
                                                                                                    "11110",
                                                                                                    "11111"]),
    "a prefix and a window": (
        AttentionSpec(window=2), 5, dict(prefix_BS=jnp.array([[True, True, True, False, False]])), ["11100",
                                                                                                   "11100",
                                                                                                   "01100",
                                                                                                   "00110",
                                                                                                   "00011"]),
    "documents with prefixes": (
        AttentionSpec(), 8, dict(segment_ids_BT=SEGMENTS, prefix_BS=jnp.array([[1, 1, 1, 1, 1, 0, 0, 0]]) > 0),
        ["11000000",
         "11000000",
         "00100000",
         "00011000",
         "00011000",
         "00011100",
         "00000010",
         "00000011"]),
    "documents in an order of their own": (
        AttentionSpec(), 4, dict(segment_ids_BT=jnp.array([[2, 1, 2, 1]])), ["1000",
                                                                            "0100",
                                                                            "1010",
                                                                            "0101"]),
    "positions": (
        AttentionSpec(), 4, dict(query_positions_BT=jnp.array([[0, 2, 1, 3]]),
                                 key_positions_BS=jnp.array([[0, 2, 1, 3]])), ["1000",
                                                                              "1110",
                                                                              "1010",
                                                                              "1111"]),
    "positions and a window": (
        AttentionSpec(window=2), 4, dict(query_positions_BT=jnp.array([[0, 2, 1, 3]]),
                                         key_positions_BS=jnp.array([[0, 2, 1, 3]])), ["1000",
                                                                                      "0110",
                                                                                      "1010",
                                                                                      "0101"]),
}


@pytest.mark.parametrize("implementation, chunk", [("xla", None), ("chunked", 2), ("chunked", 3)])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_written_by_hand(name, implementation, chunk, monkeypatch):
  monkeypatch.setattr(blockwise, "_BLOCK", chunk)
  spec, length, described, table = MASKS[name]
  assert seen(spec, length, implementation=implementation, **described) == table
  # Squashing scores and lowering them with distance hide nothing and show nothing.
  changed = dataclasses.replace(spec, softcap=0.5, alibi=True)
  assert seen(changed, length, implementation=implementation, **described) == table


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_rows_of_a_batch_have_masks_of_their_own(implementation):
  q = jnp.zeros((2, 3, 1, 3))
  v = jnp.broadcast_to(jnp.eye(3)[None, :, None, :], (2, 3, 1, 3))
  segments = jnp.array([[1, 1, 1], [1, 2, 2]])
  y = dot_product_attention(q, q, v, AttentionSpec(), segment_ids_BT=segments, implementation=implementation)
  half, third = 1 / 2, 1 / 3
  np.testing.assert_allclose(y[0, :, 0], [[1, 0, 0], [half, half, 0], [third, third, third]], atol=1e-6)
  np.testing.assert_allclose(y[1, :, 0], [[1, 0, 0], [0, 1, 0], [0, half, half]], atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_keys_at_negative_positions_are_seen_by_nobody(implementation):
  rows = seen(AttentionSpec(), 6, query_positions_BT=LEFT_PADDED, key_positions_BS=LEFT_PADDED,
              implementation=implementation)
  # What the padding itself sees is read by nobody.
  assert rows[2:] == ["001000", "001100", "001110", "001111"]


def test_a_query_sees_the_slots_of_a_cache_that_are_filled():
  """Two new tokens at positions 3 and 4; slots of a cache of eight, the last three empty."""
  slots = jnp.array([[0, 1, 2, 3, 4, -1, -1, -1]])
  q, k = jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 8, 1, 8))
  v = jnp.eye(8)[None, :, None, :]
  def rows(spec):
    y = dot_product_attention(q, k, v, spec, query_positions_BT=jnp.array([[3, 4]]), key_positions_BS=slots,
                              implementation="xla")
    return ["".join("1" if w > 0 else "0" for w in row) for row in y[0, :, 0]]
  assert rows(AttentionSpec()) == ["11110000", "11111000"]
  assert rows(AttentionSpec(window=3)) == ["01110000", "00111000"]


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=37), AttentionSpec(softcap=2.0),
                                  AttentionSpec(alibi=True), AttentionSpec(causal=False)])
def test_implementations_equal_plain_arithmetic(implementation, spec):
  B, T, N, K, H = 2, 300, 6, 2, 8
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (np.asarray(jax.random.normal(key, (B, T, n, H))) for key, n in zip(keys, (N, K, K)))
  got = jax.jit(lambda *x: dot_product_attention(*x, spec, implementation=implementation))(q, k, v)
  slopes = attention.alibi_slopes(N)
  for n in range(N):
    scores = np.matmul(q[:, :, n], k[:, :, n // 3].swapaxes(1, 2)).astype(np.float64) / np.sqrt(H)
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
    np.testing.assert_allclose(np.asarray(got)[:, :, n], np.matmul(weights, v[:, :, n // 3]), atol=2e-5)


def test_alibi_slopes_are_the_papers():
  np.testing.assert_allclose(attention.alibi_slopes(8), [2.0 ** -i for i in range(1, 9)])
  # For 12 heads: those of 8, then every other one of those of 16.
  np.testing.assert_allclose(attention.alibi_slopes(12)[8:], [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5])


def test_rotary_scores_depend_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
  def score(i, j):
    turn = lambda x, at: rope.rotate(x, *rope.rotary_angles(ModelConfig(head_dim=16), jnp.array([[at]])))
    return float(jnp.vdot(turn(q, i), turn(k, j)))
  assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
  assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)
  assert score(7, 7) == pytest.approx(float(jnp.vdot(q, k)), abs=1e-5)


def test_cudnn_refuses_by_name_what_it_cannot_do():
  x = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
  with pytest.raises(UserError, match="attention_softcap"):
    dot_product_attention(x, x, x, AttentionSpec(softcap=1.0), implementation="cudnn")
