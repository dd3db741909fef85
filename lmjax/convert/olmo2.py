"""OLMo 2 in Hugging Face's names: Llama's maps, norms of what is added to the residual stream, of queries and keys."""

import dataclasses

from lmjax.convert import common, llama
from lmjax.convert.family import Field

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="olmo2",
    architectures=common.classes("Olmo2"),
    fixed={**llama.FAMILY.fixed, "block": "inner", "qk_norm": "all", "mlp_bias": False},
    fields=(
        *common.size_fields(),
        *common.rope_fields(positions=2048),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("hidden_act", "activation", "silu", common.ACTIVATIONS),
        *common.bias_fields(),
    ),
    required=common.ROPE_REQUIRED,
    ignored_fields=("attention_dropout",),
    keys=(*common.KEYS, *common.INNER_NORM_KEYS, *common.qk_norm_keys(per_head=False)),
)
