"""Llama in Hugging Face's names, which most decoders after it share. Its linear maps are stored output first."""

from lmjax.convert import common
from lmjax.convert.family import Family, Field

FAMILY = Family(
    model_type="llama",
    architectures=common.classes("Llama"),
    fixed=dict(block="pre", norm="rmsnorm", position="rotary", gated_mlp=True, scale_residual_init=False),
    fields=(
        *common.size_fields(),
        *common.rope_fields(positions=2048),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("hidden_act", "activation", "silu", common.ACTIVATIONS),
        *common.bias_fields(),
        Field("mlp_bias", "mlp_bias", False),
    ),
    # Tensor-parallel slices of the pre-training add up in another order.
    required={**common.ROPE_REQUIRED, "pretraining_tp": 1, "rope_interleaved": False},
    # Dropout acts in training only, which has a setting of its own.
    ignored_fields=("attention_dropout", "max_sequence_length", "is_llama_config"),
    written={},
    unused=("max_positions", "norm_bias"),
    keys=(*common.KEYS, *common.PRE_NORM_KEYS),
    prefix="model.",
    ignored_keys=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tied=(("lm_head.weight", "model.embed_tokens.weight"),),
)
