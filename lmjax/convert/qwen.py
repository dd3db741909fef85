"""Qwen2 and Qwen3 in Hugging Face's names: Llama's block with biases of queries, keys and values, or with their norms.

Layers may have a window: those that layer_types names, or where it is absent those from max_window_layers on.
"""

import dataclasses
from typing import Any, Mapping

from lmjax.config import ModelConfig
from lmjax.convert import common, llama
from lmjax.convert.family import Field


def read_window(_, flat: Mapping[str, Any]) -> int | None:
  """Returns the window, where use_sliding_window turns it on."""
  return flat.get("sliding_window", 4096) if flat.get("use_sliding_window") else None


def _pattern(_, flat: Mapping[str, Any]) -> tuple:
  listed, num_layers = common.read_layer_types(flat.get("layer_types"), flat), flat["num_hidden_layers"]
  if listed is not None or not isinstance(num_layers, int):
    return listed or ()
  first = num_layers if read_window(None, flat) is None else flat.get("max_window_layers", 28)
  return tuple("local" if i >= first else "global" for i in range(num_layers))


def _first_local(pattern: tuple, cfg: ModelConfig) -> int:
  kinds = common.write_layer_types(pattern, cfg)
  return kinds.index("sliding_attention") if "sliding_attention" in kinds else cfg.num_layers


WINDOW_FIELDS = (
    Field("use_sliding_window", "attention_window", False, read=read_window, write=lambda value, _: value is not None),
    Field("sliding_window", "attention_window", 4096, read=read_window),
)
_LAYER_FIELDS = (
    *WINDOW_FIELDS,
    Field("layer_types", "attention_pattern", None, read=_pattern, write=common.write_layer_types),
    # What versions of transformers without layer_types read.
    Field("max_window_layers", "attention_pattern", 28, read=_pattern, write=_first_local),
)

QWEN2 = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architectures=common.classes("Qwen2"),
    fixed={**llama.FAMILY.fixed, "qkv_bias": True, "out_bias": False, "mlp_bias": False},
    fields=(
        *common.size_fields(kv_heads=32),
        *common.rope_fields(positions=32768),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu", common.ACTIVATIONS),
        *_LAYER_FIELDS,
    ),
    required=common.ROPE_REQUIRED,
    ignored_fields=("attention_dropout",),
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architectures=common.classes("Qwen3"),
    fixed={**llama.FAMILY.fixed, "qk_norm": "head", "mlp_bias": False},
    fields=(
        *common.size_fields(kv_heads=32, head_dim=128),
        *common.rope_fields(positions=32768),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu", common.ACTIVATIONS),
        *common.bias_fields(),
        *_LAYER_FIELDS,
    ),
    keys=(*llama.FAMILY.keys, *common.qk_norm_keys(per_head=True)),
)
