"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): a model learns by small factors beside frozen kernels.

A kernel W becomes W + alpha / rank * A B, with A of [inputs, rank] and B of [rank, outputs]. The sum is made before the
model reads its kernels, in training as in evaluation: every family may have adapters, and no model knows of them. A
model that computes in bfloat16 rounds the sum, not its parts.

Adapters are parameters in a subtree of their own, "lora", by the path of their kernel: "lora/PATH/a" is [*each,
*inputs, rank], "lora/PATH/b" [*each, rank, *outputs]. `each` are the axes of layers and experts, which have an adapter
each; inputs and outputs keep the axes that they have in the kernel, and are split over devices as those are.
"""

import functools
import math
import re
from typing import Any
import zlib

from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from lmjax.config import OptimConfig, UserError

ADAPTERS = "lora"
_EACH = ("layers", "expert")


def init(boxed: dict, cfg: OptimConfig, key: jax.Array) -> dict:
  """Returns {"lora": initial adapters}, each boxed with the names of its axes, or {} where a config asks for none.

  A is uniform between -1 / sqrt(inputs) and that, B is zero: the model starts as it was.

  Args:
    boxed: the model's parameters, or their shapes, boxed with the names of their axes.
    cfg: with lora_rank and lora_targets, which is searched for in paths such as "layers/mlp/up/kernel".
    key: random; what is drawn for a kernel depends on its path alone.

  Raises:
    UserError: where no kernel matches.
  """
  if not cfg.lora_rank:
    return {}
  kernels = {path: leaf for path, leaf in flax.traverse_util.flatten_dict(boxed, sep="/").items()
             if path.endswith("/kernel")}
  chosen = [path for path in kernels if re.search(cfg.lora_targets, path)]
  if not chosen:
    raise UserError(f"config.optim.lora_targets is {cfg.lora_targets!r}, which matches no kernel; they are: "
                    f"{', '.join(kernels)}.")
  flat = {f"{path}/{name}": leaf for path in chosen
          for name, leaf in _adapter(path, kernels[path], cfg.lora_rank, key).items()}
  return {ADAPTERS: flax.traverse_util.unflatten_dict(flat, sep="/")}


def merge(params: dict, cfg: OptimConfig) -> dict:
  """Returns a model's parameters with its adapters added to their kernels; those without adapters as they are."""
  return merge_scaled(params, cfg.lora_alpha / cfg.lora_rank) if ADAPTERS in params else params


@functools.partial(jax.jit, static_argnums=1)
def merge_scaled(params: dict, scale: float) -> dict:
  """Does what `merge` does, by scale = alpha / rank."""
  adapters = flax.traverse_util.flatten_dict(params[ADAPTERS], sep="/")
  merged = flax.traverse_util.flatten_dict(without(params), sep="/")
  for path in sorted({path.rpartition("/")[0] for path in adapters}):
    kernel = merged[path]
    change = scale * _product(path, adapters[f"{path}/a"], adapters[f"{path}/b"], kernel)
    merged[path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
  return flax.traverse_util.unflatten_dict(merged, sep="/")


def without(params: dict) -> dict:
  """Returns the parameters of the model alone."""
  return {name: subtree for name, subtree in params.items() if name != ADAPTERS}


def num_each(a: Any, b: Any, kernel: Any) -> int:
  """Returns how many leading axes are of layers and experts."""
  return a.ndim + b.ndim - 2 - kernel.ndim


def outputs_first(path: str) -> bool:
  """Whether a kernel has its outputs first, as the output projection alone does."""
  return path.split("/")[-2] == "head"


def _adapter(path: str, kernel: Any, rank: int, key: jax.Array) -> dict[str, Any]:
  shape, names = kernel.unbox().shape, kernel.names
  each = sum(name in _EACH for name in names)
  embed, ends = names.index("embed"), names[-1] == "embed"
  # A map leads from the model's width to other axes, or from those to it.
  into = range(embed, embed + 1) if embed == each or outputs_first(path) else range(each, embed)
  out = [axis for axis in range(each, len(names)) if axis not in into]
  assert (embed == each or ends) and outputs_first(path) == ("vocab" in names), (path, names)
  pick = lambda axes, of: tuple(of[axis] for axis in axes)
  lead, bound = range(each), 1 / math.sqrt(math.prod(pick(into, shape)))
  key = jax.random.fold_in(key, zlib.crc32(path.encode()))
  a = jax.random.uniform(key, (*pick(lead, shape), *pick(into, shape), rank), jnp.float32, -bound, bound)
  b = jnp.zeros((*pick(lead, shape), rank, *pick(out, shape)), jnp.float32)
  # In float32 whatever the kernels are in: they are small, and learn in small steps.
  return {"a": nn.LogicallyPartitioned(a, (*pick(lead, names), *pick(into, names), "rank")),
          "b": nn.LogicallyPartitioned(b, (*pick(lead, names), "rank", *pick(out, names)))}


def _product(path: str, a: jax.Array, b: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns A B of every layer and expert, in the kernel's shape."""
  each, letters = num_each(a, b, kernel), iter("abcdefghijklmnop")
  draw = lambda count: "".join(next(letters) for _ in range(count))
  lead, into, out = draw(each), draw(a.ndim - 1 - each), draw(b.ndim - 1 - each)
  result = lead + (out + into if outputs_first(path) else into + out)
  return jnp.einsum(f"{lead}{into}r,{lead}r{out}->{result}", a, b, precision="highest")
