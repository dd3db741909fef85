"""How initial weights, multipliers and learning rates follow a model's width and depth: standard, muP and CompleteP.

What is tuned at a base size is to hold at every other. muP does that for width (Yang et al. 2022, arXiv 2203.03466,
tables 3, 8 and 9), CompleteP for depth as well (Dey et al. 2025, arXiv 2505.01618, table 1, with alpha = 1). All is
relative to the base size, where every factor is 1 and a model is what it is under "standard", bit for bit.

A width is everything that grows with the model: embed_dim, mlp_dim, heads times head_dim, the embeddings' own width.
They grow together, by m = embed_dim / base_embed_dim. The vocabulary, experts, labels, positions and the rank of
adapters do not. A parameter's role follows from which of its inputs and outputs grow, by the names of its axes:

    input   only the outputs do: embeddings, biases, gains of norms
    hidden  both do
    output  only the inputs do: the output projection, routers, maps to labels
    fixed   none does: biases of outputs

Weight decay here is decoupled from a parameter's own factor of the learning rate (see optim/optimizer.py): a step takes
off lr * weight_decay, the same at every width, as Wang and Aitchison (2024, arXiv 2405.13698) and CompleteP have it.
The depth is that of blocks whose input is not normalised after the sum; l = num_layers / base_num_layers.

The multiplier of tied embeddings and of attention and that of a block's branches stand in the model, and what is in the
table below in initial weights and the optimizer. An untied output projection needs no multiplier: it is the same to
start at 1/m and learn at 1/m (Yang et al., lemma J.1).
"""

import dataclasses
from typing import Sequence

from lmjax.config import ModelConfig

_GROWING = frozenset(("embed", "mlp", "heads", "kv_heads", "head_dim", "embedding", "pooled", "norm", "norm_heads"))
_STACKED = ("layers", "expert")
_MAPS = ("kernel", "a", "b")  # Of adapters a is a map to the rank and b one from it (LoRA+, arXiv 2402.12354).

# Exponents of m by role. A normal initial weight's standard deviation is multiplied by m to that power.
INIT = {"input": 0.0, "hidden": -0.5, "output": -1.0, "fixed": 0.0}
# Of the learning rate, by optimizer. Steps of one size in every entry (Adam, Lion) add up over a map's inputs. SGD's
# also follow the gradient. Adafactor's are relative to the weights, and so to INIT (Everett et al. 2024, arXiv
# 2407.05872). Muon's have the norm sqrt(max(rows, columns)), where sqrt(outputs / inputs) is wanted (Yang et al. 2023,
# arXiv 2310.17813). Sophia has no rule.
_OF_SIGNS = {"input": 0.0, "hidden": -1.0, "output": -1.0, "fixed": 0.0}
LEARNING_RATE = {
    "adamw": _OF_SIGNS,
    "schedule_free": _OF_SIGNS,
    "lion": _OF_SIGNS,
    "sgd": {"input": 1.0, "hidden": 0.0, "output": -1.0, "fixed": 0.0},
    "adafactor": {"input": 0.0, "hidden": -0.5, "output": 0.0, "fixed": 0.0},
    "muon": {"input": 0.0, "hidden": -0.5, "output": -1.0, "fixed": 0.0},
}
# Of Adam's epsilon: what gradients are in proportion to (Everett et al. 2024; Dey et al. 2025).
EPS = {"input": -1.0, "hidden": -1.0, "output": 0.0, "fixed": 0.0}
# Exponents of l for what each layer has its own of: the gradient there falls as 1/l. With layers that share their
# parameters the layers' gradients add up, and nothing depends on l.
_LEARNING_RATE_BY_DEPTH = {"sgd": 1.0}
_EPS_BY_DEPTH = -1.0


def width_ratio(cfg: ModelConfig) -> float:
  """Returns m, 1 under the standard parametrization."""
  return 1.0 if cfg.parametrization == "standard" else cfg.embed_dim / cfg.base_embed_dim


def depth_ratio(cfg: ModelConfig) -> float:
  """Returns l, 1 where the parametrization is not for depth."""
  return cfg.num_layers / cfg.base_num_layers if cfg.parametrization == "completep" else 1.0


def base_width(cfg: ModelConfig) -> float:
  """Returns embed_dim at the base size, for what standard models scale by it: embeddings, T5's logits."""
  return cfg.embed_dim / width_ratio(cfg)


def base_layers(cfg: ModelConfig) -> int:
  """Returns num_layers at the base size, for what starts smaller the more layers there are."""
  return cfg.base_num_layers if cfg.parametrization == "completep" else cfg.num_layers


def base_head_dim(cfg: ModelConfig) -> int:
  """Returns head_dim at the base size."""
  return cfg.head_dim if cfg.parametrization == "standard" else cfg.base_head_dim or cfg.head_dim


def base_inputs(cfg: ModelConfig, count: int, axis: str) -> float:
  """Returns how many inputs a map has at the base size, given how many it has on axes of which `axis` is one."""
  return count / width_ratio(cfg) if axis in _GROWING else count


def attention_scale(cfg: ModelConfig) -> float | None:
  """Returns what scores are multiplied by, or None for 1 / sqrt(head_dim): at wider heads it falls as 1 / head_dim."""
  base = base_head_dim(cfg)
  if base == cfg.head_dim:
    return cfg.attention_scale
  return (base ** -0.5 if cfg.attention_scale is None else cfg.attention_scale) * base / cfg.head_dim


def output_factor(cfg: ModelConfig) -> float:
  """Returns what features are multiplied by before the output projection: 1/m where that is the embedding."""
  return 1.0 / width_ratio(cfg) if cfg.tie_embeddings else 1.0


def branch_factor(cfg: ModelConfig) -> float:
  """Returns what a block's branches are multiplied by before they are added to the residual stream: 1/l."""
  return 1.0 / depth_ratio(cfg)


def role(name: str, axes: Sequence[str]) -> str:
  """Returns the role of a parameter.

  Args:
    name: the last part of its path, such as "kernel"; a kernel maps its first axes to its last, but for the output
      projection's, which has the vocabulary first.
    axes: the logical names of its axes.
  """
  ends = [axis for axis in axes if axis not in _STACKED]
  if name not in _MAPS:
    into, out = None, next((axis for axis in ends if axis in _GROWING), None)
  elif ends[0] == "vocab":
    into, out = ends[-1], ends[0]
  else:
    into, out = ends[0], ends[-1] if len(ends) > 1 else None
  return {(True, True): "hidden", (False, True): "input", (True, False): "output",
          (False, False): "fixed"}[into in _GROWING, out in _GROWING]


def init_factor(cfg: ModelConfig, name: str, axes: Sequence[str]) -> float:
  """Returns what the initial value of a parameter is multiplied by."""
  return width_ratio(cfg) ** INIT[role(name, axes)]


def learning_rate_factor(cfg: ModelConfig, optimizer: str, name: str, axes: Sequence[str]) -> float:
  """Returns what the learning rate is multiplied by for a parameter that an optimizer updates."""
  by_depth = _LEARNING_RATE_BY_DEPTH[optimizer] if optimizer in _LEARNING_RATE_BY_DEPTH and "layers" in axes else 0.0
  return width_ratio(cfg) ** LEARNING_RATE[optimizer][role(name, axes)] * depth_ratio(cfg) ** by_depth


def eps_factor(cfg: ModelConfig, name: str, axes: Sequence[str]) -> float:
  """Returns what Adam's epsilon is multiplied by for a parameter."""
  return width_ratio(cfg) ** EPS[role(name, axes)] * depth_ratio(cfg) ** (_EPS_BY_DEPTH if "layers" in axes else 0.0)


def as_standard(cfg: ModelConfig) -> ModelConfig | None:
  """Returns the standard model that is the same function of its parameters, or None where there is none."""
  projects = cfg.head in ("lm", "pretraining") or cfg.architecture == "electra"
  scaled = cfg.scale_embeddings or (projects and (cfg.tie_embeddings or cfg.scale_logits))
  if branch_factor(cfg) != 1 or (scaled and width_ratio(cfg) != 1):
    return None
  return dataclasses.replace(cfg, parametrization="standard", base_embed_dim=None, base_head_dim=None,
                             base_num_layers=None, attention_scale=attention_scale(cfg))
