"""XLNet in Hugging Face's names. Maps of attention are stored input first, those of the MLP output first."""

from lmjax.convert.family import Family, Field, Key

_BLOCK = "transformer.layer.{layer}"
_ATTENTION, _OURS = f"{_BLOCK}.rel_attn", "layers/attention"


def _no_bound(value, flat):
  """Returns a length of theirs as one of ours: there 0, -1 and null all stand for no bound."""
  return None if isinstance(value, int) and value <= 0 else value


FAMILY = Family(
    model_type="xlnet",
    architectures={"XLNetLMHeadModel": dict(head="lm"), "XLNetModel": dict(head="none")},
    fixed=dict(architecture="xlnet", block="post", norm="layernorm", norm_bias=True, position="relative",
               gated_mlp=False, qkv_bias=False, out_bias=False, mlp_bias=True, head_bias=True,
               scale_residual_init=False),
    fields=(
        Field("n_layer", "num_layers"),
        Field("d_model", "embed_dim"),
        Field("n_head", "num_heads"),
        Field("d_head", "head_dim", None),
        Field("d_inner", "mlp_dim"),
        Field(("vocab_size", "n_token"), "vocab_size"),
        Field("layer_norm_eps", "norm_eps", 1e-12),
        Field("ff_activation", "activation", "gelu", (
            ("gelu", "gelu"), ("relu", "relu"), ("gelu_new", "gelu_tanh"), ("silu", "silu"))),
        Field("attn_type", "unidirectional", "bi", (("bi", False), ("uni", True))),
        Field("mem_len", "memory_len", 512, read=_no_bound),
        Field("reuse_len", "memory_reuse_len", None, read=_no_bound),
        Field("same_length", "memory_same_len", False),
        Field("clamp_len", "distance_clamp", -1, read=_no_bound, write=lambda ours, cfg: ours or -1),
        Field("bi_data", "reverse_half", False),
        Field("tie_word_embeddings", "tie_embeddings", True),
        Field("initializer_range", "init_std", 0.02),
    ),
    required={},
    # Layers have biases of their own in every file, whether training tied them (untie_r) or not; a memory is used
    # where one is given; dropout acts in training only; and the rest is of other heads.
    ignored_fields=("untie_r", "use_mems", "use_mems_eval", "use_mems_train", "dropout", "summary_type",
                    "summary_use_proj", "summary_activation", "summary_last_dropout", "start_n_top", "end_n_top"),
    written=dict(dropout=0.0),
    unused=("max_positions", "rope_theta"),
    keys=(
        Key("transformer.word_embedding.weight", "V,D", "embed/embedding", "VD"),
        Key("transformer.mask_emb", ",,D", "target", "D"),
        Key(f"{_ATTENTION}.q", "D,N,H", f"{_OURS}/query/kernel", "DNH"),
        Key(f"{_ATTENTION}.k", "D,N,H", f"{_OURS}/key/kernel", "DNH"),
        Key(f"{_ATTENTION}.v", "D,N,H", f"{_OURS}/value/kernel", "DNH"),
        Key(f"{_ATTENTION}.o", "D,N,H", f"{_OURS}/out/kernel", "NHD"),
        Key(f"{_ATTENTION}.r", "D,N,H", f"{_OURS}/distance/kernel", "DNH"),
        Key(f"{_ATTENTION}.r_w_bias", "N,H", f"{_OURS}/for_content/bias", "NH"),
        Key(f"{_ATTENTION}.r_r_bias", "N,H", f"{_OURS}/for_distance/bias", "NH"),
        Key(f"{_ATTENTION}.r_s_bias", "N,H", f"{_OURS}/for_type/bias", "NH"),
        Key(f"{_ATTENTION}.seg_embed", "C,N,H", (f"{_OURS}/same_type", f"{_OURS}/other_type"), "NH"),
        Key(f"{_ATTENTION}.layer_norm.weight", "D", "layers/attention_norm/scale", "D"),
        Key(f"{_ATTENTION}.layer_norm.bias", "D", "layers/attention_norm/bias", "D"),
        Key(f"{_BLOCK}.ff.layer_1.weight", "F,D", "layers/mlp/up/kernel", "DF"),
        Key(f"{_BLOCK}.ff.layer_1.bias", "F", "layers/mlp/up/bias", "F"),
        Key(f"{_BLOCK}.ff.layer_2.weight", "D,F", "layers/mlp/down/kernel", "FD"),
        Key(f"{_BLOCK}.ff.layer_2.bias", "D", "layers/mlp/down/bias", "D"),
        Key(f"{_BLOCK}.ff.layer_norm.weight", "D", "layers/mlp_norm/scale", "D"),
        Key(f"{_BLOCK}.ff.layer_norm.bias", "D", "layers/mlp_norm/bias", "D"),
        Key("lm_loss.weight", "V,D", "head/kernel", "VD"),
        Key("lm_loss.bias", "V", "head/bias", "V"),
    ),
    prefix="transformer.",
    ignored_keys=(),
    tied=(("lm_loss.weight", "transformer.word_embedding.weight"),),
)
