"""Mistral in Hugging Face's names: Llama's block, without biases, under a window of keys in every layer."""

import dataclasses

from lmjax.convert import common, llama
from lmjax.convert.family import Field

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architectures=common.classes("Mistral"),
    fixed={**llama.FAMILY.fixed, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    fields=(
        *common.size_fields(kv_heads=8),
        *common.rope_fields(positions=131072),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu", common.ACTIVATIONS),
        Field("sliding_window", "attention_window", 4096),
    ),
    required=common.ROPE_REQUIRED,
    ignored_fields=("attention_dropout",),
)
