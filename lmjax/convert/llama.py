"""Llama in Hugging Face's names. Its linear maps are stored output first."""

from lmjax.convert.family import Family, Field, Key

_BLOCK = "model.layers.{layer}"
_ATTENTION, _MLP = f"{_BLOCK}.self_attn", f"{_BLOCK}.mlp"

FAMILY = Family(
    model_type="llama",
    architectures={"LlamaForCausalLM": {}, "LlamaModel": {}},
    fixed=dict(block="pre", norm="rmsnorm", position="rotary", gated_mlp=True, scale_residual_init=False),
    fields=(
        Field("num_hidden_layers", "num_layers"),
        Field("hidden_size", "embed_dim"),
        Field("num_attention_heads", "num_heads"),
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "head_dim", None),
        Field("intermediate_size", "mlp_dim"),
        Field("vocab_size", "vocab_size"),
        Field("max_position_embeddings", "max_positions", 2048),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field(("rope_theta", "rope_parameters.rope_theta"), "rope_theta", 10_000.0),
        Field("hidden_act", "activation", "silu", (
            ("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"),
            ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"))),
        Field("attention_bias", "qkv_bias", False),
        Field("attention_bias", "out_bias", False),
        Field("mlp_bias", "mlp_bias", False),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("initializer_range", "init_std", 0.02),
    ),
    # Tensor-parallel slices of the pre-training add up in another order, and other kinds of rope turn other angles.
    required={"pretraining_tp": 1, "rope_parameters.rope_type": "default", "rope_scaling.rope_type": "default",
              "rope_scaling.type": "default", "rope_interleaved": False},
    # Dropout acts in training only, which has a setting of its own.
    ignored_fields=("attention_dropout", "max_sequence_length", "is_llama_config"),
    written={},
    unused=("max_positions", "norm_bias"),
    keys=(
        Key("model.embed_tokens.weight", "V,D", "embed/embedding", "VD"),
        Key(f"{_BLOCK}.input_layernorm.weight", "D", "layers/attention_norm/scale", "D"),
        Key(f"{_ATTENTION}.q_proj.weight", "NH,D", "layers/attention/query/kernel", "DNH"),
        Key(f"{_ATTENTION}.q_proj.bias", "NH", "layers/attention/query/bias", "NH"),
        Key(f"{_ATTENTION}.k_proj.weight", "KH,D", "layers/attention/key/kernel", "DKH"),
        Key(f"{_ATTENTION}.k_proj.bias", "KH", "layers/attention/key/bias", "KH"),
        Key(f"{_ATTENTION}.v_proj.weight", "KH,D", "layers/attention/value/kernel", "DKH"),
        Key(f"{_ATTENTION}.v_proj.bias", "KH", "layers/attention/value/bias", "KH"),
        Key(f"{_ATTENTION}.o_proj.weight", "D,NH", "layers/attention/out/kernel", "NHD"),
        Key(f"{_ATTENTION}.o_proj.bias", "D", "layers/attention/out/bias", "D"),
        Key(f"{_BLOCK}.post_attention_layernorm.weight", "D", "layers/mlp_norm/scale", "D"),
        Key(f"{_MLP}.gate_proj.weight", "F,D", "layers/mlp/gate/kernel", "DF"),
        Key(f"{_MLP}.gate_proj.bias", "F", "layers/mlp/gate/bias", "F"),
        Key(f"{_MLP}.up_proj.weight", "F,D", "layers/mlp/up/kernel", "DF"),
        Key(f"{_MLP}.up_proj.bias", "F", "layers/mlp/up/bias", "F"),
        Key(f"{_MLP}.down_proj.weight", "D,F", "layers/mlp/down/kernel", "FD"),
        Key(f"{_MLP}.down_proj.bias", "D", "layers/mlp/down/bias", "D"),
        Key("model.norm.weight", "D", "final_norm/scale", "D"),
        Key("lm_head.weight", "V,D", "head/kernel", "VD"),
    ),
    prefix="model.",
    ignored_keys=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tied=(("lm_head.weight", "model.embed_tokens.weight"),),
)
