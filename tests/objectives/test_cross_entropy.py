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


OPTIONS = {"plain": {}, "softcap": dict(softcap=3.0), "smoothing": dict(label_smoothing=0.2),
           "z_loss": dict(z_loss=0.1),
           "all": dict(softcap=3.0, label_smoothing=0.2, z_loss=0.1)}
WEIGHTS = {"ragged": lambda weights: weights, "ones": jnp.ones_like, "zeros": jnp.zeros_like,
           "one": lambda weights: jnp.zeros_like(weights).at[1, 7].set(1.0)}


def assert_same_gradients(ours, theirs, arguments):
  jitted = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)), compiler_options={"xla_backend_optimization_level": 0})
  (value, grads), (plain_value, plain_grads) = jitted(ours)(*arguments), jitted(theirs)(*arguments)
  assert float(value) == pytest.approx(float(plain_value), rel=1e-5)
  for a, b in zip(grads, plain_grads):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("chunk", [None, 8, 7, 1])  # 7 does not divide the length, 24.
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_plain_loss_under_a_cotangent_that_is_not_one(name, chunk):
  x, w, targets, weights = inputs()
  options = LossOptions(chunk=chunk, **OPTIONS[name])
  assert_same_gradients(lambda x, w: -2.5 * cross_entropy(x, w, targets, weights, options)[0],
                        lambda x, w: -2.5 * plain(x, w, targets, weights, options), (x, w))


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_plain_loss_under_any_weights(name):
  x, w, targets, weights = inputs()
  weights, options = WEIGHTS[name](weights), LossOptions(chunk=6, **OPTIONS["all"])
  assert_same_gradients(lambda x, w: 0.3 * cross_entropy(x, w, targets, weights, options)[0],
                        lambda x, w: 0.3 * plain(x, w, targets, weights, options), (x, w))


def test_equals_the_plain_loss_where_the_cotangent_depends_on_it():
  """As where two losses are multiplied; features and projection come from one array, as in a tied embedding."""
  x, w, targets, weights = inputs()
  options = LossOptions(chunk=8)
  both = lambda loss: lambda x, w: jnp.sin(loss(x @ w.T @ w / V, w)) * jnp.log(loss(x, w))
  assert_same_gradients(both(lambda x, w: cross_entropy(x, w, targets, weights, options)[0]),
                        both(lambda x, w: plain(x, w, targets, weights, options)), (x / 4, w / 4))


def test_what_is_reported_has_no_gradient():
  x, w, targets, weights = inputs()
  reported = lambda x: sum(cross_entropy(x, w, targets, weights, LossOptions(chunk=8))[1].values())
  assert not jax.grad(reported)(x).any()


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
