"""GPT-2 in Hugging Face's names. Its linear maps are stored input first, and query, key and value are one."""

from lmjax.convert import common
from lmjax.convert.family import Family, Field, Key

_QKV = ("query", "key", "value")
_BLOCK = "transformer.h.{layer}"

FAMILY = Family(
    model_type="gpt2",
    architectures={"GPT2LMHeadModel": dict(head="lm"), "GPT2Model": dict(head="lm"),
                   "GPT2ForSequenceClassification": dict(head="sequence")},
    fixed=dict(block="pre", norm="layernorm", norm_bias=True, position="learned", gated_mlp=False, qkv_bias=True,
               out_bias=True, mlp_bias=True, scale_residual_init=True),
    fields=(
        Field("n_layer", "num_layers"),
        Field("n_embd", "embed_dim"),
        Field("n_head", "num_heads"),
        Field("n_inner", "mlp_dim", None),
        Field("vocab_size", "vocab_size"),
        Field("n_positions", "max_positions", 1024),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("activation_function", "activation", "gelu_new", (
            ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu"),
            ("silu", "silu"), ("swish", "silu"))),
        Field("tie_word_embeddings", "tie_embeddings", True),
        Field("initializer_range", "init_std", 0.02),
    ),
    required=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
                  add_cross_attention=False),
    # The context length stands in n_ctx again, and dropout acts in training only, which has a setting of its own.
    ignored_fields=("n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout",
                    "summary_proj_to_labels", "summary_type", "summary_use_proj", "predict_special_tokens"),
    written=dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    unused=("rope_theta",),
    keys=(
        Key("transformer.wte.weight", "V,D", "embed/embedding", "VD"),
        Key("transformer.wpe.weight", "P,D", "embed/position", "PD"),
        Key(f"{_BLOCK}.ln_1.weight", "D", "layers/attention_norm/scale", "D"),
        Key(f"{_BLOCK}.ln_1.bias", "D", "layers/attention_norm/bias", "D"),
        Key(f"{_BLOCK}.attn.c_attn.weight", "D,CNH", tuple(f"layers/attention/{x}/kernel" for x in _QKV), "DNH"),
        Key(f"{_BLOCK}.attn.c_attn.bias", "CNH", tuple(f"layers/attention/{x}/bias" for x in _QKV), "NH"),
        Key(f"{_BLOCK}.attn.c_proj.weight", "NH,D", "layers/attention/out/kernel", "NHD"),
        Key(f"{_BLOCK}.attn.c_proj.bias", "D", "layers/attention/out/bias", "D"),
        Key(f"{_BLOCK}.ln_2.weight", "D", "layers/mlp_norm/scale", "D"),
        Key(f"{_BLOCK}.ln_2.bias", "D", "layers/mlp_norm/bias", "D"),
        Key(f"{_BLOCK}.mlp.c_fc.weight", "D,F", "layers/mlp/up/kernel", "DF"),
        Key(f"{_BLOCK}.mlp.c_fc.bias", "F", "layers/mlp/up/bias", "F"),
        Key(f"{_BLOCK}.mlp.c_proj.weight", "F,D", "layers/mlp/down/kernel", "FD"),
        Key(f"{_BLOCK}.mlp.c_proj.bias", "D", "layers/mlp/down/bias", "D"),
        Key("transformer.ln_f.weight", "D", "final_norm/scale", "D"),
        Key("transformer.ln_f.bias", "D", "final_norm/bias", "D"),
        Key("lm_head.weight", "V,D", "head/kernel", "VD"),
        common.SCORE_KEY,
    ),
    prefix="transformer.",
    ignored_keys=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    tied=(("lm_head.weight", "transformer.wte.weight"),),
)
