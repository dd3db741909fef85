"""BART in Hugging Face's names. Each side has its own positions and norm of the embeddings, and shares the tokens'."""

from lmjax.convert.family import Family, Field, Key


def _linear(theirs: str, ours: str, layout: str, axes: str) -> tuple[Key, Key]:
  rows = layout.split(",")[0]
  return (Key(f"{theirs}.weight", layout, f"{ours}/kernel", axes), Key(f"{theirs}.bias", rows, f"{ours}/bias", rows))


def _norm(theirs: str, ours: str) -> tuple[Key, Key]:
  return Key(f"{theirs}.weight", "D", f"{ours}/scale", "D"), Key(f"{theirs}.bias", "D", f"{ours}/bias", "D")


def _attention(theirs: str, ours: str) -> tuple[Key, ...]:
  return (*_linear(f"{theirs}.q_proj", f"{ours}/query", "NH,D", "DNH"),
          *_linear(f"{theirs}.k_proj", f"{ours}/key", "KH,D", "DKH"),
          *_linear(f"{theirs}.v_proj", f"{ours}/value", "KH,D", "DKH"),
          *_linear(f"{theirs}.out_proj", f"{ours}/out", "D,NH", "NHD"),
          *_norm(f"{theirs}_layer_norm", f"{ours}_norm"))


def side(name: str) -> tuple[Key, ...]:
  """Returns the keys of the encoder or of the decoder."""
  theirs, ours = f"model.{name}.layers.{{layer}}", f"{name}/layers"
  cross = _attention(f"{theirs}.encoder_attn", f"{ours}/cross_attention") if name == "decoder" else ()
  return (Key(f"model.{name}.embed_positions.weight", "P,D", f"{name}/embed/position", "PD"),
          *_norm(f"model.{name}.layernorm_embedding", f"{name}/embed/norm"),
          *_attention(f"{theirs}.self_attn", f"{ours}/attention"),
          *cross,
          *_linear(f"{theirs}.fc1", f"{ours}/mlp/up", "F,D", "DF"),
          *_linear(f"{theirs}.fc2", f"{ours}/mlp/down", "D,F", "FD"),
          *_norm(f"{theirs}.final_layer_norm", f"{ours}/mlp_norm"))


FAMILY = Family(
    model_type="bart",
    # Files of the model without its head lack what is added to the logits, which is then zero.
    architectures={"BartForConditionalGeneration": dict(head_bias=True), "BartModel": dict(head_bias=False)},
    fixed=dict(architecture="encoder_decoder", block="post", norm="layernorm", norm_eps=1e-5, norm_bias=True,
               position="learned", position_offset=2, embedding_norm=True, gated_mlp=False, use_bias=True,
               tie_embeddings=True, scale_residual_init=False),
    fields=(
        Field(("encoder_layers", "num_hidden_layers"), "num_layers", 12),
        Field("decoder_layers", "num_decoder_layers", 12),
        Field("d_model", "embed_dim", 1024),
        Field("encoder_attention_heads", "num_heads", 16),
        Field("decoder_attention_heads", "num_heads", 16),
        Field("encoder_ffn_dim", "mlp_dim", 4096),
        Field("decoder_ffn_dim", "mlp_dim", 4096),
        Field("vocab_size", "vocab_size"),
        Field("max_position_embeddings", "max_positions", 1024),
        Field("activation_function", "activation", "gelu", (
            ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
            ("silu", "silu"), ("swish", "silu"))),
        Field("scale_embedding", "scale_embeddings", False),
        Field("init_std", "init_std", 0.02),
    ),
    required=dict(is_encoder_decoder=True, tie_word_embeddings=True, normalize_before=False, normalize_embedding=True,
                  add_final_layer_norm=False, static_position_embeddings=False, extra_pos_embeddings=2),
    # Dropout, of layers too, acts in training only, which has a setting of its own.
    ignored_fields=("dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "classif_dropout",
                    "encoder_layerdrop", "decoder_layerdrop", "force_bos_token_to_be_generated", "output_past"),
    written=dict(is_encoder_decoder=True, decoder_start_token_id=2, dropout=0.0),
    unused=("rope_theta",),
    keys=(
        Key("model.shared.weight", "V,D", "embed/embedding", "VD"),
        *side("encoder"),
        *side("decoder"),
        Key("final_logits_bias", ",V", "decoder/head/bias", "V"),
    ),
    prefix="model.",
    ignored_keys=(r"model\.(encoder|decoder)\.version",),
    tied=(("model.encoder.embed_tokens.weight", "model.shared.weight"),
          ("model.decoder.embed_tokens.weight", "model.shared.weight"),
          ("lm_head.weight", "model.shared.weight")),
)
