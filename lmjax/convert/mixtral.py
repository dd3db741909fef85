"""Mixtral and Qwen's mixtures in Hugging Face's names: Llama's block with experts, each in tensors of its own.

They are read and written where every layer has experts.
"""

import dataclasses
from typing import Any, Mapping

from lmjax.convert import common, llama, qwen
from lmjax.convert.family import Field, Key

_DENSE = ("layers/mlp/gate/", "layers/mlp/up/", "layers/mlp/down/")
_KEYS = tuple(key for key in llama.FAMILY.keys if not key.paths[0].startswith(_DENSE))


def _expert_keys(mlp: str, gate: str, up: str, down: str) -> tuple[Key, ...]:
  """Returns the router and the experts, by the names that their parts have in the MLP of a layer."""
  layer, expert = f"model.layers.{{layer}}.{mlp}", f"model.layers.{{layer}}.{mlp}.experts.{{expert}}"
  return (
      Key(f"{layer}.gate.weight", "X,D", "layers/mlp/router/kernel", "DX"),
      Key(f"{expert}.{gate}.weight", "M,D", "layers/mlp/gate/kernel", "DM"),
      Key(f"{expert}.{up}.weight", "M,D", "layers/mlp/up/kernel", "DM"),
      Key(f"{expert}.{down}.weight", "D,M", "layers/mlp/down/kernel", "MD"),
  )


def _count(theirs: str | tuple[str, ...], ours: str, default: int) -> Field:
  """Returns what says how many experts or how wide: with none, the layers would be other ones."""
  return Field(theirs, ours, default, write=lambda value, _: value or None, nonzero=True)


_ACTIVATION = Field("hidden_act", "activation", "silu", common.ACTIVATIONS)
_FIXED = {**llama.FAMILY.fixed, "mlp_bias": False}

MIXTRAL = dataclasses.replace(
    llama.FAMILY,
    model_type="mixtral",
    architectures=common.classes("Mixtral"),
    fixed={**_FIXED, "qkv_bias": False, "out_bias": False, "normalize_expert_weights": True},
    fields=(
        *common.size_fields(kv_heads=8),
        *common.rope_fields(positions=131072, theta=1e6),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        _ACTIVATION,
        Field("sliding_window", "attention_window", None),
        _count("num_local_experts", "num_experts", 8),
        Field("num_experts_per_tok", "experts_per_token", 2),
        Field("intermediate_size", "expert_dim"),
    ),
    required=common.ROPE_REQUIRED,
    # Noise, dropout and the loss of the router act in training only, which has settings of its own.
    ignored_fields=("attention_dropout", "router_jitter_noise", "router_aux_loss_coef", "output_router_logits"),
    unused=(*llama.FAMILY.unused, "mlp_dim"),
    keys=(*_KEYS, *_expert_keys("block_sparse_moe", "w1", "w3", "w2")),
)

_QWEN_KEYS = (*_KEYS, *_expert_keys("mlp", "gate_proj", "up_proj", "down_proj"))


def _qwen_fields(kv_heads: int, experts: int, per_token: int, expert_dim: int) -> tuple[Field, ...]:
  """Returns what both have, with the defaults in which they differ."""
  return (
      *common.size_fields(kv_heads=kv_heads),
      *common.rope_fields(positions=32768),
      Field("rms_norm_eps", "norm_eps", 1e-6),
      _ACTIVATION,
      *qwen.WINDOW_FIELDS,
      _count(("num_experts", "num_local_experts"), "num_experts", experts),
      Field("num_experts_per_tok", "experts_per_token", per_token),
      Field("moe_intermediate_size", "expert_dim", expert_dim),
      Field("norm_topk_prob", "normalize_expert_weights", False),
  )


def _qwen2_pattern(_, flat: Mapping[str, Any]) -> tuple:
  """Returns the kinds of layers; where they are not listed, every other one below max_window_layers is local."""
  listed, num_layers = common.read_layer_types(flat.get("layer_types"), flat), flat["num_hidden_layers"]
  if listed is not None or not isinstance(num_layers, int):
    return listed or ()
  last = 0 if qwen.read_window(None, flat) is None else flat.get("max_window_layers", 28)
  return tuple("local" if i % 2 == 0 and i < last else "global" for i in range(num_layers))


QWEN2_MOE = dataclasses.replace(
    MIXTRAL,
    model_type="qwen2_moe",
    architectures=common.classes("Qwen2Moe"),
    fixed={**_FIXED, "out_bias": False},
    fields=(
        *_qwen_fields(kv_heads=16, experts=60, per_token=4, expert_dim=1408),
        Field("qkv_bias", "qkv_bias", True),
        _count("shared_expert_intermediate_size", "shared_expert_dim", 5632),
        Field("layer_types", "attention_pattern", None, read=_qwen2_pattern, write=common.write_layer_types),
        Field("max_window_layers", "attention_pattern", 28, read=_qwen2_pattern, write=lambda _, cfg: cfg.num_layers),
    ),
    # Layers without experts are not done.
    required={**common.ROPE_REQUIRED, "decoder_sparse_step": 1, "mlp_only_layers": []},
    keys=(
        *_QWEN_KEYS,
        Key("model.layers.{layer}.mlp.shared_expert_gate.weight", ",D", "layers/mlp/shared_gate/kernel", "D"),
        *(Key(f"model.layers.{{layer}}.mlp.shared_expert.{part}_proj.weight", "S,D", f"layers/mlp/shared/{part}/kernel",
              "DS") for part in ("gate", "up")),
        Key("model.layers.{layer}.mlp.shared_expert.down_proj.weight", "D,S", "layers/mlp/shared/down/kernel", "SD"),
    ),
)

QWEN3_MOE = dataclasses.replace(
    QWEN2_MOE,
    model_type="qwen3_moe",
    architectures=common.classes("Qwen3Moe"),
    fixed={**_FIXED, "qk_norm": "head"},
    fields=(
        *_qwen_fields(kv_heads=4, experts=128, per_token=8, expert_dim=768),
        *common.bias_fields(),
    ),
    # A window is that of all layers.
    ignored_fields=(*MIXTRAL.ignored_fields, "max_window_layers"),
    keys=(*_QWEN_KEYS, *common.qk_norm_keys(per_head=True)),
)
