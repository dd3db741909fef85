"""GPT-NeoX and Pythia in Hugging Face's names. Query, key and value of a head lie together in one tensor."""

from lmjax.convert import common
from lmjax.convert.family import Family, Field, Key

_QKV = ("query", "key", "value")
_BLOCK = "gpt_neox.layers.{layer}"

FAMILY = Family(
    model_type="gpt_neox",
    architectures=common.classes("GPTNeoX"),
    fixed=dict(norm="layernorm", norm_bias=True, position="rotary", gated_mlp=False, mlp_bias=True,
               scale_residual_init=False),
    fields=(
        Field("num_hidden_layers", "num_layers"),
        Field("hidden_size", "embed_dim"),
        Field("num_attention_heads", "num_heads"),
        Field("intermediate_size", "mlp_dim"),
        Field("vocab_size", "vocab_size"),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("initializer_range", "init_std", 0.02),
        *common.rope_fields(positions=2048, theta_name="rotary_emb_base"),
        Field(("rotary_pct", "rope_parameters.partial_rotary_factor", "rope_scaling.partial_rotary_factor"),
              "rotary_fraction", 0.25),
        Field("layer_norm_eps", "norm_eps", 1e-5),
        Field("hidden_act", "activation", "gelu", (*common.ACTIVATIONS, ("gelu_fast", "gelu_tanh"))),
        Field("use_parallel_residual", "block", True, ((True, "parallel_two"), (False, "pre"))),
        *common.bias_fields(default=True),
    ),
    required=common.ROPE_REQUIRED,
    # Dropout acts in training only, which has a setting of its own.
    ignored_fields=("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder"),
    written={},
    unused=("max_positions",),
    keys=(
        Key("gpt_neox.embed_in.weight", "V,D", "embed/embedding", "VD"),
        Key(f"{_BLOCK}.input_layernorm.weight", "D", "layers/attention_norm/scale", "D"),
        Key(f"{_BLOCK}.input_layernorm.bias", "D", "layers/attention_norm/bias", "D"),
        Key(f"{_BLOCK}.attention.query_key_value.weight", "NCH,D",
            tuple(f"layers/attention/{x}/kernel" for x in _QKV), "DNH"),
        Key(f"{_BLOCK}.attention.query_key_value.bias", "NCH", tuple(f"layers/attention/{x}/bias" for x in _QKV), "NH"),
        Key(f"{_BLOCK}.attention.dense.weight", "D,NH", "layers/attention/out/kernel", "NHD"),
        Key(f"{_BLOCK}.attention.dense.bias", "D", "layers/attention/out/bias", "D"),
        Key(f"{_BLOCK}.post_attention_layernorm.weight", "D", "layers/mlp_norm/scale", "D"),
        Key(f"{_BLOCK}.post_attention_layernorm.bias", "D", "layers/mlp_norm/bias", "D"),
        Key(f"{_BLOCK}.mlp.dense_h_to_4h.weight", "F,D", "layers/mlp/up/kernel", "DF"),
        Key(f"{_BLOCK}.mlp.dense_h_to_4h.bias", "F", "layers/mlp/up/bias", "F"),
        Key(f"{_BLOCK}.mlp.dense_4h_to_h.weight", "D,F", "layers/mlp/down/kernel", "FD"),
        Key(f"{_BLOCK}.mlp.dense_4h_to_h.bias", "D", "layers/mlp/down/bias", "D"),
        Key("gpt_neox.final_layer_norm.weight", "D", "final_norm/scale", "D"),
        Key("gpt_neox.final_layer_norm.bias", "D", "final_norm/bias", "D"),
        Key("embed_out.weight", "V,D", "head/kernel", "VD"),
        common.SCORE_KEY,
    ),
    prefix="gpt_neox.",
    ignored_keys=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    tied=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
)
