"""T5, T5 1.1 and Flan-T5 in Hugging Face's names.

The first T5 ties the output projection to the embeddings and divides its logits by the root of the width; T5 1.1 does
neither, which transformers from version 5 on tells by scale_decoder_outputs alone.
"""

from typing import Any, Mapping

from lmjax.config import ModelConfig
from lmjax.convert.family import Family, Field, Key

_ACTIVATIONS = (("relu", "relu"), ("gelu_new", "gelu_tanh"), ("gelu", "gelu"), ("silu", "silu"), ("swish", "silu"))
# feed_forward_proj -> activation and whether it gates. A gate by "gelu" is one by its approximation there.
_MLPS = {name: (ours, False) for name, ours in _ACTIVATIONS}
_MLPS |= {f"gated-{name}": (ours, True) for name, ours in _ACTIVATIONS} | {"gated-gelu": ("gelu_tanh", True)}


def _mlp(hf: Mapping[str, Any]) -> tuple[str, bool]:
  return _MLPS.get(hf.get("feed_forward_proj", "relu"), ("relu", False))


def _write_mlp(_: Any, cfg: ModelConfig) -> str:
  wanted = cfg.activation, cfg.gated_mlp
  # Google's name comes first.
  return next((name for name in ("relu", "gated-gelu", *_MLPS) if _MLPS[name] == wanted), "relu")


def _attention(theirs: str, ours: str) -> tuple[Key, ...]:
  kernel = lambda name: f"{ours}/{name}/kernel"
  return (Key(f"{theirs}.q.weight", "NH,D", kernel("query"), "DNH"),
          Key(f"{theirs}.k.weight", "KH,D", kernel("key"), "DKH"),
          Key(f"{theirs}.v.weight", "KH,D", kernel("value"), "DKH"),
          Key(f"{theirs}.o.weight", "D,NH", kernel("out"), "NHD"))


def _stack(side: str, parts: tuple[str, ...]) -> tuple[Key, ...]:
  """Returns the keys of one side, whose blocks are attention, cross-attention in the decoder, and MLP."""
  block, layers = f"{side}.block.{{layer}}.layer", f"{side}/layers"
  keys = [Key(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "B,N", f"{side}/relative/bias",
              "BN"),
          Key(f"{side}.final_layer_norm.weight", "D", f"{side}/final_norm/scale", "D")]
  for i, name in enumerate(parts):
    ours = ("attention", "cross_attention")[i]
    keys += [*_attention(f"{block}.{i}.{name}", f"{layers}/{ours}"),
             Key(f"{block}.{i}.layer_norm.weight", "D", f"{layers}/{ours}_norm/scale", "D")]
  dense = f"{block}.{len(parts)}"
  return (*keys,
          Key(f"{dense}.layer_norm.weight", "D", f"{layers}/mlp_norm/scale", "D"),
          Key(f"{dense}.DenseReluDense.wi.weight", "F,D", f"{layers}/mlp/up/kernel", "DF", when=("gated_mlp", False)),
          Key(f"{dense}.DenseReluDense.wi_0.weight", "F,D", f"{layers}/mlp/gate/kernel", "DF"),
          Key(f"{dense}.DenseReluDense.wi_1.weight", "F,D", f"{layers}/mlp/up/kernel", "DF", when=("gated_mlp", True)),
          Key(f"{dense}.DenseReluDense.wo.weight", "D,F", f"{layers}/mlp/down/kernel", "FD"))


FAMILY = Family(
    model_type="t5",
    architectures={"T5ForConditionalGeneration": {}, "T5WithLMHeadModel": {}},
    fixed=dict(architecture="encoder_decoder", block="pre", norm="rmsnorm", position="relative", attention_scale=1.0,
               use_bias=False, init="fan_in", scale_residual_init=False),
    fields=(
        Field("num_layers", "num_layers"),
        Field("num_decoder_layers", "num_decoder_layers", None),
        Field("d_model", "embed_dim"),
        Field("num_heads", "num_heads"),
        Field("d_kv", "head_dim"),
        Field("d_ff", "mlp_dim"),
        Field("vocab_size", "vocab_size"),
        Field("relative_attention_num_buckets", "relative_buckets", 32),
        Field("relative_attention_max_distance", "relative_max_distance", 128),
        Field("layer_norm_epsilon", "norm_eps", 1e-6),
        Field("feed_forward_proj", "activation", "relu", tuple((name, mlp[0]) for name, mlp in _MLPS.items()),
              write=_write_mlp),
        Field("feed_forward_proj", "gated_mlp", "relu", tuple((name, mlp[1]) for name, mlp in _MLPS.items()),
              write=_write_mlp),
        Field("dense_act_fn", "activation", None, _ACTIVATIONS,
              read=lambda value, hf: _mlp(hf)[0] if value is None else dict(_ACTIVATIONS).get(value, value)),
        Field("is_gated_act", "gated_mlp", None, read=lambda value, hf: _mlp(hf)[1] if value is None else value),
        Field("tie_word_embeddings", "tie_embeddings", True,
              read=lambda value, hf: value is not False and hf.get("scale_decoder_outputs") is not False),
        Field("scale_decoder_outputs", "scale_logits", None,
              read=lambda value, hf: hf.get("tie_word_embeddings") is not False if value is None else value),
        Field("initializer_factor", "init_std", 1.0),
    ),
    required=dict(is_encoder_decoder=True),
    # Relative positions have no last one, and dropout acts in training only, which has a setting of its own.
    ignored_fields=("n_positions", "dropout_rate", "classifier_dropout", "output_past"),
    written=dict(is_encoder_decoder=True, pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0),
    unused=("max_positions", "norm_bias", "rope_theta"),
    keys=(
        Key("shared.weight", "V,D", "embed/embedding", "VD"),
        *_stack("encoder", ("SelfAttention",)),
        *_stack("decoder", ("SelfAttention", "EncDecAttention")),
        Key("lm_head.weight", "V,D", "decoder/head/kernel", "VD"),
    ),
    prefix="",
    # Files of the first T5 have a table for cross-attention too, which nothing reads.
    ignored_keys=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    tied=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight"),
          ("lm_head.weight", "shared.weight")),
)
