"""Mixtral and Qwen's mixtures in Hugging Face's names: Llama's block with experts, each in tensors of its own.

They are read and written where every layer has experts.
"""

import dataclasses

from lmjax.convert import common, llama
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
  """A number that must not be zero here: the layers would be other ones."""
  return Field(theirs, ours, default, read=lambda value, _: value or None)


_ACTIVATION = Field("hidden_act", "activation", "silu", common.ACTIVATIONS)
_FIXED = {**llama.FAMILY.fixed, "mlp_bias": False}

MIXTRAL = dataclasses.replace(
    llama.FAMILY,
    model_type="mixtral",
    architectures={"MixtralForCausalLM": {}, "MixtralModel": {}},
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
      Field("layer_types", "attention_pattern", None, optional=True,
            read=lambda value, flat: common.read_layer_types(value, flat) or (),
            write=lambda pattern, cfg: None),
      _count(("num_experts", "num_local_experts"), "num_experts", experts),
      Field("num_experts_per_tok", "experts_per_token", per_token),
      Field("moe_intermediate_size", "expert_dim", expert_dim),
      Field("norm_topk_prob", "normalize_expert_weights", False),
  )


QWEN2_MOE = dataclasses.replace(
    MIXTRAL,
    model_type="qwen2_moe",
    architectures={"Qwen2MoeForCausalLM": {}, "Qwen2MoeModel": {}},
    fixed={**_FIXED, "out_bias": False},
    fields=(
        *_qwen_fields(kv_heads=16, experts=60, per_token=4, expert_dim=1408),
        Field("qkv_bias", "qkv_bias", True),
        _count("shared_expert_intermediate_size", "shared_expert_dim", 5632),
    ),
    # Layers without experts and layers under a window are not done.
    required={**common.ROPE_REQUIRED, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
    ignored_fields=(*MIXTRAL.ignored_fields, "sliding_window", "max_window_layers"),
    keys=(
        *_QWEN_KEYS,
        Key("model.layers.{layer}.mlp.shared_expert_gate.weight", "1D", "layers/mlp/shared_gate/kernel", "1D"),
        *(Key(f"model.layers.{{layer}}.mlp.shared_expert.{part}_proj.weight", "S,D", f"layers/mlp/shared/{part}/kernel",
              "DS") for part in ("gate", "up")),
        Key("model.layers.{layer}.mlp.shared_expert.down_proj.weight", "D,S", "layers/mlp/shared/down/kernel", "SD"),
    ),
)

QWEN3_MOE = dataclasses.replace(
    QWEN2_MOE,
    model_type="qwen3_moe",
    architectures={"Qwen3MoeForCausalLM": {}, "Qwen3MoeModel": {}},
    fixed={**_FIXED, "qk_norm": "head"},
    fields=(
        *_qwen_fields(kv_heads=4, experts=128, per_token=8, expert_dim=768),
        *common.bias_fields(),
    ),
    keys=(*_QWEN_KEYS, *common.qk_norm_keys(per_head=True)),
)
