"""Cross-entropy of a projection to the vocabulary, a chunk of positions at a time.

Logits of all positions never exist together. The backward pass costs no second projection: a chunk's gradients are
taken while its logits are at hand, so that forward and backward make three matrix products in all.

Shapes: B batch, T length, C positions of a chunk, D model width, V vocabulary, G parts of batch and length on the mesh.
"""

import functools
import typing

import jax
import jax.numpy as jnp

from lmjax.config import ModelConfig, ObjectiveConfig, is_on
from lmjax.models.products import transposed, vocabulary_logits
from lmjax.partitioning import constrain, platform, ways

# Elements of a chunk's logits on a device that the automatic choice aims for. On a CPU they stay in its cache.
_CHUNK_ELEMENTS = {"cpu": 2 ** 21, "gpu": 2 ** 27, "tpu": 2 ** 27}


class LossOptions(typing.NamedTuple):
  """How the loss is made; the first two may be numbers that are only known when the program runs.

  Attributes:
    z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311, section 5).
    label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2015, arXiv 1512.00567).
    softcap: logits are squashed to +-this.
    chunk: positions projected at a time; None chooses.
  """
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  softcap: float | None = None
  chunk: int | None = None


def loss_options(cfg: ObjectiveConfig, model: ModelConfig) -> LossOptions:
  """Returns the options that a config asks for."""
  return LossOptions(cfg.z_loss, cfg.label_smoothing, model.logit_softcap, cfg.loss_chunk)


def cross_entropy(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                  options: LossOptions = LossOptions(),
                  bias_V: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted sum of the loss over all positions.

  Args:
    x_BTD: features.
    w_VD: output projection.
    targets_BT: integer targets.
    weights_BT: float32 weight of each position; 0 leaves it out.
    options: see LossOptions.
    bias_V: added to the logits; None adds none.

  Returns:
    The sum that is differentiated, with smoothing and z-loss, and a dict of sums that are not: `loss` (plain negative
    log-likelihood, nats), `z_loss`, `accuracy`, `weight`.
  """
  # What a custom derivative takes as static must be known when it is traced.
  traced = {name: value for name, value in options._asdict().items() if isinstance(value, jax.Array)}
  static = options._replace(**dict.fromkeys(traced))
  total, (nll, z, correct) = _sums(x_BTD, w_VD, bias_V, targets_BT, weights_BT, traced, static)
  return total, {"loss": nll, "z_loss": z, "accuracy": correct, "weight": jnp.sum(weights_BT)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _sums(x, w, bias, targets, weights, traced, static):
  return _over_chunks(x, w, bias, targets, weights, static._replace(**traced), with_grads=False)[0]


def _sums_fwd(x, w, bias, targets, weights, traced, static):
  sums, dx, (dw, db) = _over_chunks(x, w, bias, targets, weights, static._replace(**traced), with_grads=True)
  dw = constrain(jnp.sum(dw, 0).T, "vocab", "embed").astype(w.dtype)
  return sums, (dx, dw, None if bias is None else db.astype(bias.dtype))


def _sums_bwd(static, residuals, cotangents):
  scaled = jax.tree.map(lambda grad: grad * cotangents[0].astype(grad.dtype), residuals)
  return *scaled, None, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _over_chunks(x, w, bias, targets, weights, options, with_grads):
  """Returns the sums, and with_grads their gradients dx_BTD and (dw_GDV, db_V), else None; without a bias db is None.

  dw is float32 and kept apart for each of the G parts that the mesh splits the batch into, so that the devices add
  theirs up once and not for every chunk.
  """
  B, T, D = x.shape
  size = chunk_size(B, T, w.shape[0], options.chunk)
  # A projection that is split over its width is gathered once here, not for every chunk.
  w_cast = constrain(w.astype(x.dtype), "vocab", "act_embed")
  parts = _length_parts(T)
  one = functools.partial(_chunk, w_VD=w_cast, bias_V=bias, options=options, length_parts=parts, with_grads=with_grads)
  if size == T:
    return one(x, targets, weights)
  # A chunk has some positions of each part of the length, so that every device has work in each.
  count = T // size
  split = lambda a: jnp.moveaxis(a.reshape(B, parts, count, size // parts, *a.shape[2:]), 2, 0).reshape(
      count, B, size, *a.shape[2:])
  join = lambda a: jnp.moveaxis(a.reshape(count, B, parts, size // parts, *a.shape[3:]), 0, 2).reshape(
      B, T, *a.shape[3:])

  def body(carry, chunk):
    sums, dx, of_output = one(*chunk)
    carry = jax.tree.map(jnp.add, carry, (sums, of_output))
    return carry, dx

  zero = jnp.zeros((), jnp.float32)
  zero_db = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
  start = ((zero, (zero, zero, zero)), (_zero_dw(w, parts), zero_db) if with_grads else None)
  (sums, of_output), dx = jax.lax.scan(body, start, (split(x), split(targets), split(weights)))
  return sums, (join(dx) if with_grads else None), of_output


def chunk_size(batch: int, length: int, vocab: int, asked: int | None) -> int:
  """Returns the largest divisor of the length that is at most what was asked for, or that keeps the logits small.

  It is a multiple of the parts that the mesh splits the length into.
  """
  parts = _length_parts(length)
  limit = asked or max(1, _CHUNK_ELEMENTS[platform()] * ways("batch") * parts // (batch * vocab))
  return parts * next(size for size in range(max(min(limit, length) // parts, 1), 0, -1) if length // parts % size == 0)


def _length_parts(length: int) -> int:
  """Returns into how many parts the mesh splits so many positions: those at chosen places may not divide."""
  return 1 if length % ways("length") else ways("length")


def _chunk(x_BCD, targets_BC, weights_BC, *, w_VD, bias_V, options, length_parts, with_grads):
  logits = constrain(vocabulary_logits(x_BCD, w_VD, bias_V, options.softcap), "batch", "length", "act_vocab")
  vocab, smoothing = w_VD.shape[0], options.label_smoothing
  hit = jnp.arange(vocab) == targets_BC[..., None]
  top = jnp.max(logits, axis=-1, keepdims=True)
  exps = jnp.exp(logits - top)
  partition = jnp.sum(exps, axis=-1, keepdims=True)
  log_z = (jnp.log(partition) + top)[..., 0]
  at_target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
  nll = log_z - at_target
  z = options.z_loss * jnp.square(log_z)
  loss = nll + z
  if is_on(smoothing):
    loss = loss + smoothing * (at_target - jnp.mean(logits, axis=-1))
  weighted = lambda a: jnp.sum(a * weights_BC)
  correct = at_target >= top[..., 0]
  sums = (weighted(loss), (weighted(nll), weighted(z), weighted(correct)))
  if not with_grads:
    return sums, None, None
  # d loss / d logits, times the position's weight.
  slope = (weights_BC * (1.0 + 2.0 * options.z_loss * log_z))[..., None] / partition
  d_logits = exps * slope - jnp.where(hit, (1.0 - smoothing) * weights_BC[..., None], 0.0)
  if is_on(smoothing):
    d_logits = d_logits - (smoothing / vocab) * weights_BC[..., None]
  if options.softcap is not None:
    d_logits = d_logits * (1.0 - jnp.square(logits / options.softcap))
  db = None if bias_V is None else constrain(jnp.sum(d_logits, (0, 1)), "act_vocab")
  d_logits = d_logits.astype(x_BCD.dtype)
  dx = jnp.einsum("BCV,VD->BCD", d_logits, w_VD)
  parts = functools.partial(_device_parts, length_parts=length_parts)
  # Written so that the product contracts the last axis of its first operand, which a CPU is fastest at.
  x_GDBC = transposed(parts(x_BCD), (0, 3, 1, 2))
  dw = jnp.einsum("GDBC,GBCV->GDV", x_GDBC, parts(d_logits), preferred_element_type=jnp.float32)
  if platform() == "cpu":  # The transposition of dw must not be folded into the product, which bfloat16 does not allow.
    dw = jax.lax.optimization_barrier(dw)
  return sums, dx, (constrain(dw, _parts_name(length_parts), None, "act_vocab"), db)


def _device_parts(a_BCX: jax.Array, length_parts: int) -> jax.Array:
  """Returns [G, B of a part, C of a part, X]: what each device has of those that split batch and length."""
  B, C, X = a_BCX.shape
  a = a_BCX.reshape(ways("batch"), B // ways("batch"), length_parts, C // length_parts, X).swapaxes(1, 2)
  return a.reshape(-1, *a.shape[2:])


def _zero_dw(w_VD: jax.Array, length_parts: int) -> jax.Array:
  zeros = jnp.zeros((ways("batch") * length_parts, *w_VD.shape[::-1]), jnp.float32)
  return constrain(zeros, _parts_name(length_parts), None, "act_vocab")


def _parts_name(length_parts: int) -> str:
  return "batch_length" if length_parts > 1 else "batch"
