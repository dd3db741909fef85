"""What the encoders share in Hugging Face's names: linear maps output first, BERT's blocks, settings and heads."""

from typing import Iterable

from lmjax.convert.family import Field, Key

# A post-norm encoder with learned positions and biases everywhere; the norm of the embeddings comes before a
# projection of them.
FIXED = dict(architecture="encoder", block="post", norm="layernorm", norm_bias=True, position="learned",
             embedding_norm=True, gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, head_transform=True,
             head_bias=True, scale_residual_init=False)

ACTIVATIONS = (("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
               ("silu", "silu"), ("swish", "silu"))

FIELDS = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "embed_dim"),
    Field("num_attention_heads", "num_heads"),
    Field("intermediate_size", "mlp_dim"),
    Field("vocab_size", "vocab_size"),
    Field("type_vocab_size", "token_types", 2, write=lambda ours, cfg: max(ours, 1)),  # They have no model without.
    Field("layer_norm_eps", "norm_eps", 1e-12),
    Field("initializer_range", "init_std", 0.02),
)

# A decoder of the same classes is another model.
REQUIRED = dict(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)

# Dropout acts in training only, which has a setting of its own.
IGNORED_FIELDS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "output_past")

WRITTEN = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def linear(theirs: str, out: str, into: str, *ours: str) -> tuple[Key, ...]:
  """Returns the keys of a linear map's matrix and bias.

  Args:
    theirs: what their names begin with.
    out: letters of the axes it leads to.
    into: of those it comes from.
    *ours: paths of the modules that it may be, of which a model has one.
  """
  return tuple(key for path in ours for key in (
      Key(f"{theirs}.weight", f"{out},{into}", f"{path}/kernel", into + out),
      Key(f"{theirs}.bias", out, f"{path}/bias", out)))


def layer_norm(theirs: str, ours: str, width: str = "D") -> tuple[Key, ...]:
  """Returns the keys of a norm's scale and bias."""
  return Key(f"{theirs}.weight", width, f"{ours}/scale", width), Key(f"{theirs}.bias", width, f"{ours}/bias", width)


def bert_embeddings(prefix: str) -> tuple[Key, ...]:
  """Returns the keys of embeddings in BERT's names."""
  return (Key(f"{prefix}word_embeddings.weight", "V,E", "embed/embedding", "VE"),
          Key(f"{prefix}position_embeddings.weight", "P,E", "embed/position", "PE"),
          Key(f"{prefix}token_type_embeddings.weight", "U,E", "embed/token_type", "UE"),
          *layer_norm(f"{prefix}LayerNorm", "embed/norm", "E"))


def bert_blocks(prefix: str) -> tuple[Key, ...]:
  """Returns the keys of blocks in BERT's names, which begin with `prefix` and the layer."""
  block = prefix + "{layer}"
  return (*linear(f"{block}.attention.self.query", "NH", "D", "layers/attention/query"),
          *linear(f"{block}.attention.self.key", "NH", "D", "layers/attention/key"),
          *linear(f"{block}.attention.self.value", "NH", "D", "layers/attention/value"),
          *linear(f"{block}.attention.output.dense", "D", "NH", "layers/attention/out"),
          *layer_norm(f"{block}.attention.output.LayerNorm", "layers/attention_norm"),
          *linear(f"{block}.intermediate.dense", "F", "D", "layers/mlp/up"),
          *linear(f"{block}.output.dense", "D", "F", "layers/mlp/down"),
          *layer_norm(f"{block}.output.LayerNorm", "layers/mlp_norm"))


def label_heads(classified: Iterable[str]) -> tuple[Key, ...]:
  """Returns the keys of the heads for labels that are named alike everywhere.

  Args:
    classified: those heads whose last map is "classifier"; that of a span is "qa_outputs".
  """
  sizes = {"sequence": "L", "token": "L", "choice": "1"}
  keys = (linear("classifier", sizes[head], "D", f"{head}_head/out") for head in classified)
  return (*(key for pair in keys for key in pair), *linear("qa_outputs", "2", "D", "span_head/out"))
