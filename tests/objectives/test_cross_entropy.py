"""The chunked loss against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.objectives.cross_entropy import LossOptions, cross_entropy

B, T, D, V = 3, 24, 16, 40


def inputs():
  keys = jax.random.split(jax.random.key(0), 4)
  return (jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D)),
          jax.random.randint(keys[2], (B, T), 0, V), jax.random.uniform(keys[3], (B, T)).round(1))


def plain(x, w, targets, weights, options):
  """The textbook's formulas on all logits at once."""
  logits = x @ w.T
  if options.softcap:
    logits = options.softcap * jnp.tanh(logits / options.softcap)
  log_probs = jax.nn.log_softmax(logits)
  target = (1 - options.label_smoothing) * jax.nn.one_hot(targets, V) + options.label_smoothing / V
  loss = -(target * log_probs).sum(-1) + options.z_loss * jax.nn.logsumexp(logits, -1) ** 2
  return (loss * weights).sum()


@pytest.mark.parametrize("options", [
    LossOptions(), LossOptions(chunk=8), LossOptions(chunk=7), LossOptions(chunk=1),
    LossOptions(z_loss=0.1, label_smoothing=0.2, softcap=3.0, chunk=6)])
def test_equals_the_plain_loss_under_a_cotangent_that_is_not_one(options):
  x, w, targets, weights = inputs()
  ours = lambda x, w: -2.5 * cross_entropy(x, w, targets, weights, options)[0]
  theirs = lambda x, w: -2.5 * plain(x, w, targets, weights, options)
  assert float(ours(x, w)) == pytest.approx(float(theirs(x, w)), rel=1e-5)
  for a, b in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(theirs, (0, 1))(x, w)):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_reports_sums_without_smoothing_and_z_loss():
  x, w, targets, weights = inputs()
  _, sums = cross_entropy(x, w, targets, weights, LossOptions(z_loss=0.1, label_smoothing=0.2, chunk=8))
  log_probs = jax.nn.log_softmax(x @ w.T)
  nll = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
  assert float(sums["loss"]) == pytest.approx(float((nll * weights).sum()), rel=1e-5)
  hits = (x @ w.T).argmax(-1) == targets
  assert float(sums["accuracy"]) == pytest.approx(float((hits * weights).sum()), rel=1e-5)
  assert float(sums["weight"]) == pytest.approx(float(weights.sum()))
  z_loss = 0.1 * jax.nn.logsumexp(x @ w.T, -1) ** 2
  assert float(sums["z_loss"]) == pytest.approx(float((z_loss * weights).sum()), rel=1e-5)


def test_huge_logits_stay_finite():
  x, w, targets, weights = inputs()
  value, grads = jax.value_and_grad(lambda x: cross_entropy(x * 1e4, w, targets, weights)[0])(x)
  assert np.isfinite(value) and np.isfinite(grads).all()


def test_no_array_holds_all_logits():
  big = jax.ShapeDtypeStruct((2, 4096, 64), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((131072, 64), jnp.float32)
  ids, weights = jax.ShapeDtypeStruct((2, 4096), jnp.int32), jax.ShapeDtypeStruct((2, 4096), jnp.float32)
  step = jax.jit(jax.grad(lambda x, w, t, m: cross_entropy(x, w, t, m)[0], (0, 1)))
  temporaries = step.lower(big, w, ids, weights).compile().memory_analysis().temp_size_in_bytes
  assert temporaries < 2 * 4096 * 131072 * 4 / 4
