"""Marian in Hugging Face's names: the 2017 Transformer, with biases of all maps, and tensors named as BART's."""

from lmjax.convert import bart
from lmjax.convert.family import Family, Field

FAMILY = Family(
    model_type="marian",
    architectures={"MarianMTModel": dict(head_bias=True), "MarianModel": dict(head_bias=False)},
    fixed=dict(architecture="encoder_decoder", block="post", norm="layernorm", norm_eps=1e-5, norm_bias=True,
               position="sinusoidal", gated_mlp=False, use_bias=True, tie_embeddings=True, scale_residual_init=False),
    fields=(
        *(field for field in bart.FAMILY.fields if field.ours != "max_positions"),
        # How far the table of sinusoids goes; here they are made where they are needed.
        Field("max_position_embeddings", "max_positions", 1024, write=lambda ours, cfg: ours or 1024),
    ),
    required=dict(is_encoder_decoder=True, tie_word_embeddings=True, normalize_before=False, normalize_embedding=False,
                  add_final_layer_norm=False, static_position_embeddings=True, share_encoder_decoder_embeddings=True,
                  add_bias_logits=False),
    # Of one vocabulary, the decoder's size is that of both.
    ignored_fields=(*bart.FAMILY.ignored_fields, "decoder_vocab_size", "extra_pos_embeddings"),
    written=dict(is_encoder_decoder=True, pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None,
                 dropout=0.0),
    unused=("max_positions", "rope_theta"),
    keys=tuple(key for key in bart.FAMILY.keys if not key.ours.startswith(("encoder/embed/", "decoder/embed/"))),
    prefix="model.",
    ignored_keys=(r"model\.(encoder|decoder)\.embed_positions\.weight",),
    tied=bart.FAMILY.tied,
)
