"""A plain JAX training step: what a good user writes without a library, and so the least that lmjax has to beat.

Layers are scanned, attention is `jax.nn.dot_product_attention`, the loss and the optimizer are optax's, and the state
is donated. Nothing is tuned for a platform.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax
from shapes import Shape


def make_step(shape: Shape) -> Callable[[], jax.Array]:
  """Returns a function that runs one step on one batch and returns the loss; a gpt2 or a llama by the shape."""
  params = init(shape, jax.random.key(0))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                          optax.adamw(shape.learning_rate, b1=0.9, b2=0.95, weight_decay=0.1))
  state = jax.jit(optimizer.init)(params)
  tokens = jnp.asarray(shape.tokens())

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    loss, grads = jax.value_and_grad(functools.partial(mean_loss, shape))(params, tokens[:, :-1], tokens[:, 1:])
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  def run() -> jax.Array:
    nonlocal params, state
    params, state, loss = step(params, state)
    return loss

  return run


def init(s: Shape, key: jax.Array) -> dict[str, Any]:
  L, D, F, H = s.num_layers, s.embed_dim, s.mlp_dim, s.embed_dim // s.num_heads
  sizes = {"embed": (s.vocab_size, D), "qkv": (L, D, (s.num_heads + 2 * s.num_kv_heads) * H), "out": (L, D, D),
           "up": (L, D, F), "down": (L, F, D)}
  sizes |= {"gate": (L, D, F)} if s.family == "llama" else {"position": (s.seq_len, D)}
  params = {name: 0.02 * jax.random.normal(k, size)
            for (name, size), k in zip(sizes.items(), jax.random.split(key, len(sizes)))}
  params |= {"norm1": jnp.ones((L, D)), "norm2": jnp.ones((L, D)), "norm3": jnp.ones(D)}
  if s.family == "gpt2":
    params |= {f"{name}_bias": jnp.zeros(sizes[name][:1] + sizes[name][2:]) for name in ("qkv", "out", "up", "down")}
    params |= {f"{name}_bias": jnp.zeros_like(params[name]) for name in ("norm1", "norm2", "norm3")}
  return params


def mean_loss(s: Shape, params: dict, inputs: jax.Array, targets: jax.Array) -> jax.Array:
  params = jax.tree.map(lambda p: p.astype(s.dtype), params)
  shared = ("embed", "position", "norm3", "norm3_bias")
  layers = {name: value for name, value in params.items() if name not in shared}
  x = params["embed"][inputs]
  if s.family == "gpt2":
    x = x + params["position"]
  x, _ = jax.lax.scan(lambda x, layer: (block(s, x, layer), None), x, layers)
  logits = norm(s, x, params, "norm3") @ params["embed"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def block(s: Shape, x: jax.Array, layer: dict) -> jax.Array:
  linear = lambda x, name: x @ layer[name] + (layer[f"{name}_bias"] if s.family == "gpt2" else 0)
  N, K, H = s.num_heads, s.num_kv_heads, s.embed_dim // s.num_heads
  qkv = linear(norm(s, x, layer, "norm1"), "qkv").reshape(*x.shape[:2], N + 2 * K, H)
  q, k, v = qkv[:, :, :N], qkv[:, :, N:N + K], qkv[:, :, N + K:]
  if s.family == "llama":
    q, k = rotate(q), rotate(k)
  fused = "cudnn" if jax.default_backend() == "gpu" and s.dtype != "float32" else None
  y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused)
  x = x + linear(y.reshape(x.shape), "out")
  h = norm(s, x, layer, "norm2")
  if s.family == "llama":
    return x + linear(jax.nn.silu(linear(h, "gate")) * linear(h, "up"), "down")
  return x + linear(jax.nn.gelu(linear(h, "up")), "down")


def norm(s: Shape, x: jax.Array, params: dict, name: str) -> jax.Array:
  y = x.astype(jnp.float32)
  if s.family == "gpt2":
    y = y - y.mean(-1, keepdims=True)
  y = (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype) * params[name]
  return y + params[f"{name}_bias"] if s.family == "gpt2" else y


def rotate(x: jax.Array) -> jax.Array:
  T, half = x.shape[1], x.shape[-1] // 2
  angles = jnp.arange(T)[:, None] / 500_000.0 ** (jnp.arange(half) / half)
  sin, cos = jnp.sin(angles)[:, None].astype(x.dtype), jnp.cos(angles)[:, None].astype(x.dtype)
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
