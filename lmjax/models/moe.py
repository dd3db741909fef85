"""Mixtures of experts: a router sends each token to a few MLPs of many (Shazeer et al. 2017, arXiv 1701.06538).

Shapes: B batch, T length, D model width, F width of an expert, E experts, K experts of a token, C slots of an expert
for a sequence, M tokens of one device.
"""

import dataclasses
import math

from flax import linen as nn
import flax.traverse_util
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lmjax import partitioning
from lmjax.config import ModelConfig
from lmjax.models.attention import Context
from lmjax.models.layers import ACTIVATIONS, Einsum, Mlp, param, residual_std
from lmjax.partitioning import constrain

# The collection that a model reports its routing in, where its caller makes it mutable.
ROUTER = "router"


class Moe(nn.Module):
  """Stands in a block where an Mlp does: Mixtral (arXiv 2401.04088), Qwen-MoE with a shared expert (arXiv 2407.10671).

  Without a capacity no token is dropped: the rows of each expert are brought together and multiplied as one ragged
  product (Gale et al. 2022, arXiv 2211.15841). With a capacity each expert has C slots for a sequence, and a token that
  finds none left passes that expert by (Fedus et al. 2021, arXiv 2101.03961).

  Attributes:
    cfg: the model's settings.
  """
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
    """Returns y_BTD; padding takes no part, neither in the experts' rows and slots nor in what is reported."""
    cfg = self.cfg
    D, E, F, dtype = cfg.embed_dim, cfg.num_experts, cfg.expert_dim, jnp.dtype(cfg.dtype)
    real_BT = _real(x_BTD, context)
    # A router in bfloat16 chooses other experts than one in float32, and trains worse (arXiv 2101.03961, section 2.4).
    router = Einsum(dataclasses.replace(cfg, dtype="float32"), "BTD,DE->BTE", (D, E), ("embed", "router"), cfg.init_std,
                    False, name="router")
    logits_BTE = router(x_BTD)
    probs_BTE = jax.nn.softmax(logits_BTE)
    gates_BTK, experts_BTK = jax.lax.top_k(probs_BTE, cfg.experts_per_token)  # Of equals the first.
    if cfg.normalize_expert_weights:
      gates_BTK = gates_BTK / jnp.sum(gates_BTK, axis=-1, keepdims=True)
    experts_BTK = jnp.where(real_BT[..., None], experts_BTK, E)

    kernel = lambda name, shape, axes, std: _Kernel(cfg, shape, axes, std, name=name)().astype(dtype)
    into = [kernel(name, (E, D, F), ("expert", "embed", "mlp"), cfg.init_std)
            for name in (("gate", "up") if cfg.gated_mlp else ("up",))]
    kernels = (*into, kernel("down", (E, F, D), ("expert", "mlp", "embed"), residual_std(cfg)))
    x_BTD = x_BTD.astype(dtype)
    if cfg.expert_capacity_factor is None:
      dropped_B = jnp.zeros(x_BTD.shape[:1], jnp.float32)
      y_BTD = _dropless(cfg, x_BTD, experts_BTK, gates_BTK.astype(dtype), kernels)
    else:
      y_BTD, dropped_B = _with_capacity(cfg, x_BTD, experts_BTK, gates_BTK, kernels)
    if cfg.shared_expert_dim:
      gate = Einsum(cfg, "BTD,D->BT", (D,), ("embed",), cfg.init_std, False, name="shared_gate")(x_BTD)
      shared = Mlp(dataclasses.replace(cfg, mlp_dim=cfg.shared_expert_dim), name="shared")(x_BTD)
      y_BTD = y_BTD + jax.nn.sigmoid(gate)[..., None] * shared
    stats = router_stats(logits_BTE, experts_BTK, real_BT) | {"dropped": dropped_B}
    self.sow(ROUTER, "stats", stats, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return y_BTD


class _Kernel(nn.Module):
  cfg: ModelConfig
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float

  @nn.compact
  def __call__(self) -> jax.Array:
    return param(self, "kernel", nn.initializers.normal(self.std), self.shape, self.axes)


def _real(x_BTD: jax.Array, context: Context) -> jax.Array:
  """Returns which tokens are no padding: that has segment 0, or in a cache a negative position."""
  real_BT = jnp.ones(x_BTD.shape[:2], bool)
  if context.segment_ids_BT is not None:
    real_BT &= context.segment_ids_BT > 0
  return real_BT if context.positions_BT is None else real_BT & (context.positions_BT >= 0)


def _mlp(cfg: ModelConfig, product, x, kernels):
  """The MLP of `layers.Mlp`, by any product of rows and an expert's kernel."""
  *into, down = kernels
  act = ACTIVATIONS[cfg.activation]
  names = ("gate", "up") if cfg.gated_mlp else ("up",)
  hidden = [checkpoint_name(product(x, kernel), name) for name, kernel in zip(names, into)]
  return checkpoint_name(product(act(hidden[0]) * hidden[1] if cfg.gated_mlp else act(hidden[0]), down), "down")


def _dropless(cfg: ModelConfig, x_BTD: jax.Array, experts_BTK: jax.Array, gates_BTK: jax.Array,
              kernels: tuple[jax.Array, ...]) -> jax.Array:
  """Every token through each of its experts; expert E is none.

  Each device has some of the experts, a share of F and some rows of the batch. Those that split the experts between
  them gather each other's rows, take the part of their own experts, and add the parts up, each for its own rows.
  """
  def on_one(x_BTD, experts_BTK, gates_BTK, *kernels):
    x_BTD, experts_BTK, gates_BTK = (partitioning.gather_rows(x, "expert") for x in (x_BTD, experts_BTK, gates_BTK))
    count = kernels[0].shape[0]
    mine_BTK = experts_BTK - count * partitioning.device_index("expert")
    mine_BTK = jnp.where((mine_BTK >= 0) & (mine_BTK < count), mine_BTK, count)
    rows = lambda x: x.reshape(-1, x.shape[-1])
    y_MD = _ragged_mlp(cfg, rows(x_BTD), rows(mine_BTK), rows(gates_BTK), kernels)
    return partitioning.scatter_sum_rows(partitioning.sum_over(y_MD.reshape(x_BTD.shape), "act_mlp"), "expert")

  B, ways = x_BTD.shape[0], partitioning.ways("batch")
  # A batch that does not divide, as in decoding, is filled up with rows that no expert takes.
  full = lambda x, value: jnp.pad(x, [(0, -B % ways), (0, 0), (0, 0)], constant_values=value)
  tokens, into, down = ("batch", "length", None), ("expert", "act_embed", "act_mlp"), ("expert", "act_mlp", "act_embed")
  axes = (tokens, tokens, tokens, *[into] * (len(kernels) - 1), down)
  y_BTD = partitioning.on_each_device(on_one, axes, tokens)(
      full(x_BTD, 0), full(experts_BTK, cfg.num_experts), full(gates_BTK, 0), *kernels)
  return y_BTD[:B]


def _ragged_mlp(cfg: ModelConfig, x_MD: jax.Array, experts_MK: jax.Array, gates_MK: jax.Array,
                kernels: tuple[jax.Array, ...]) -> jax.Array:
  """Returns y_MD, the sum over the experts of each row; an expert beyond the kernels' adds nothing."""
  (M, K), E = experts_MK.shape, kernels[0].shape[0]
  order = jnp.argsort(experts_MK.reshape(-1), stable=True)
  sizes = jnp.bincount(experts_MK.reshape(-1), length=E).astype(jnp.int32)  # Those of expert E come last, in no group.
  # Permutations both ways, so that the backward pass, too, adds up in a fixed order.
  permuted = lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds")
  rows = permuted(jnp.repeat(x_MD, K, axis=0), order)
  product = _each_stages_ragged_dot if partitioning.in_stage() else jax.lax.ragged_dot
  y = _mlp(cfg, lambda x, kernel: product(x, kernel, sizes), rows, kernels)
  y_MKD = permuted(y, jnp.argsort(order)).reshape(M, K, -1)
  return jnp.einsum("MKD,MK->MD", y_MKD, gates_MK)


@jax.custom_batching.custom_vmap
def _each_stages_ragged_dot(x, kernel, sizes):
  return jax.lax.ragged_dot(x, kernel, sizes)


@_each_stages_ragged_dot.def_vmap
def _one_after_another(_, batched, *args):
  """TPUs multiply no batch of ragged products; and on a device that has one stage there is one."""
  count = next(x.shape[0] for x, is_batched in zip(args, batched) if is_batched)
  args = [x if is_batched else jnp.broadcast_to(x, (count, *x.shape)) for x, is_batched in zip(args, batched)]
  if count == 1:
    return jax.lax.ragged_dot(*(x[0] for x in args))[None], True
  return jax.lax.map(lambda one: jax.lax.ragged_dot(*one), tuple(args)), True


def _with_capacity(cfg: ModelConfig, x_BTD: jax.Array, experts_BTK: jax.Array, gates_BTK: jax.Array,
                   kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
  """Returns y_BTD and the share of each sequence's choices that found no slot.

  Slots are given out in order of position and for each sequence on its own: what a token gets depends neither on
  later tokens nor on how the batch is split.
  """
  (B, T, K), E = experts_BTK.shape, cfg.num_experts
  C = capacity(cfg, T)
  chosen_BTKE = jax.nn.one_hot(experts_BTK, E, dtype=jnp.int32)
  before = jnp.cumsum(chosen_BTKE.reshape(B, T * K, E), axis=1).reshape(chosen_BTKE.shape) - chosen_BTKE
  slots_BTKC = jax.nn.one_hot(jnp.sum(before * chosen_BTKE, axis=-1), C, dtype=x_BTD.dtype)  # Zero beyond the last.
  chosen_BTKE = chosen_BTKE.astype(x_BTD.dtype)
  dispatch_BTEC = jnp.einsum("BTKE,BTKC->BTEC", chosen_BTKE, slots_BTKC)
  combine_BTEC = jnp.einsum("BTKE,BTKC->BTEC", chosen_BTKE * gates_BTK.astype(x_BTD.dtype)[..., None], slots_BTKC)
  x_EBCD = jnp.einsum("BTEC,BTD->EBCD", dispatch_BTEC, x_BTD)
  x_EBCD = constrain(x_EBCD, "expert", "expert_batch", None, "act_embed")
  y_EBCD = _mlp(cfg, lambda x, kernel: jnp.einsum("EBCD,EDF->EBCF", x, kernel), x_EBCD, kernels)
  y_EBCD = constrain(y_EBCD, "expert", "expert_batch", None, "act_embed")
  y_BTD = constrain(jnp.einsum("BTEC,EBCD->BTD", combine_BTEC, y_EBCD), "batch", "length", "act_embed")
  asked_B = jnp.sum(experts_BTK < E, axis=(1, 2)).astype(jnp.float32)
  kept_B = jnp.sum(dispatch_BTEC, axis=(1, 2, 3), dtype=jnp.float32)
  return y_BTD, 1 - kept_B / jnp.maximum(asked_B, 1)


def capacity(cfg: ModelConfig, length: int) -> int:
  """Returns the slots of an expert for a sequence: its even share times the factor, and no more than there are tokens.
  """
  even = cfg.experts_per_token * length / cfg.num_experts
  return min(length, math.ceil(cfg.expert_capacity_factor * even))


def router_stats(logits_BTE: jax.Array, experts_BTK: jax.Array, real_BT: jax.Array) -> dict[str, jax.Array]:
  """Returns what one layer's router did with each sequence, as means over its tokens.

  Args:
    logits_BTE: of the router.
    experts_BTK: the experts chosen.
    real_BT: the tokens that count.

  Returns:
    load [B, E], how often each expert was chosen for a token, which sums to K; probability [B, E] of each; z [B], the
    squared log-normaliser; entropy [B] in nats.
  """
  E = logits_BTE.shape[-1]
  weights_BT = real_BT / jnp.maximum(jnp.sum(real_BT, axis=1, keepdims=True), 1).astype(jnp.float32)
  mean = lambda x: jnp.einsum("BT...,BT->B...", x, weights_BT)
  log_probs = jax.nn.log_softmax(logits_BTE)
  return {
      "load": mean(jnp.sum(jax.nn.one_hot(experts_BTK, E), axis=2)),
      "probability": mean(jnp.exp(log_probs)),
      "z": mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
      "entropy": mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))}


def load_balance(load: jax.Array, probability: jax.Array) -> jax.Array:
  """The load-balancing loss, K where all experts are used alike (Fedus et al. 2021, arXiv 2101.03961, equation 4).

  Args:
    load: [..., E] how often each expert was chosen for a token, a mean over some set of tokens.
    probability: [..., E] the mean probability of each.

  Returns:
    [...]
  """
  return load.shape[-1] * jnp.sum(load * probability, axis=-1)


def router_sums(reported: dict, weights_BT: jax.Array) -> dict[str, jax.Array]:
  """Sums over a batch of what its routing comes to, each sequence weighted by its tokens' weights.

  The balance is a product of two means, so it depends on what they are means over. Here that is one sequence and one
  layer (DeepSeek-AI 2024, arXiv 2412.19437, equations 17 to 20), whose losses are averaged over layers and added up
  over sequences: it is the same however a batch is split into microbatches and over devices.

  Args:
    reported: the collection `ROUTER` that a model with experts made.
    weights_BT: of the batch's targets.

  Returns:
    `router_balance`, `router_z_loss` (the mean squared log-normaliser; Zoph et al. 2022, arXiv 2202.08906, equation 5),
    `router_entropy` in nats, `router_max_load` (that of the most used expert over the mean of all), and
    `router_dropped` (the share of choices that found no slot).
  """
  stats = {}
  for path, value in flax.traverse_util.flatten_dict(reported).items():
    stats.setdefault(path[-1], []).append(value)
  stats = {name: jnp.concatenate(values) for name, values in stats.items()}  # [layers, B, ...]
  weight_B = jnp.sum(weights_BT, axis=1)
  total = lambda value_LB: jnp.sum(jnp.mean(value_LB, axis=0) * weight_B)
  load = stats["load"]
  return {
      "router_balance": total(load_balance(load, stats["probability"])),
      "router_z_loss": total(stats["z"]),
      "router_entropy": total(stats["entropy"]),
      "router_max_load": total(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9)),
      "router_dropped": total(stats["dropped"])}
