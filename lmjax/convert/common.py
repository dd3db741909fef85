"""What decoders of Hugging Face's have in common: the settings and tensors that most of them name as Llama does.

Rotary positions are written in two ways: transformers 5 has all about them in `rope_parameters`, older versions have
`rope_theta` and, for a stretch, `rope_scaling`. Both are read; the older is written, which every version understands.
"""

from typing import Any, Mapping

from lmjax.config import ModelConfig
from lmjax.convert.family import Field, Key

ACTIVATIONS = (("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"),
               ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"))

_SCALINGS = (("default", "none"), ("linear", "linear"), ("dynamic", "dynamic"), ("yarn", "yarn"), ("llama3", "llama3"))
_KINDS = {"sliding_attention": "local", "full_attention": "global"}


def classes(prefix: str) -> dict[str, dict[str, str]]:
  """Returns the classes of a decoder whose names begin so, and what each ends in."""
  return {f"{prefix}ForCausalLM": {"head": "lm"}, f"{prefix}Model": {"head": "lm"},
          f"{prefix}ForSequenceClassification": {"head": "sequence"}}


def size_fields(*, kv_heads: int | None = None, head_dim: int | None = None, tied: bool = False) -> tuple[Field, ...]:
  """Returns what sets the sizes, with a family's defaults for what its config.json may lack."""
  return (
      Field("num_hidden_layers", "num_layers"),
      Field("hidden_size", "embed_dim"),
      Field("num_attention_heads", "num_heads"),
      Field("num_key_value_heads", "num_kv_heads", kv_heads),
      Field("head_dim", "head_dim", head_dim),
      Field("intermediate_size", "mlp_dim"),
      Field("vocab_size", "vocab_size"),
      Field("tie_word_embeddings", "tie_embeddings", tied),
      Field("initializer_range", "init_std", 0.02),
  )


def rope_fields(positions: int, theta: float = 10_000.0, theta_name: str = "rope_theta",
                group: str = "rope_parameters") -> tuple[Field, ...]:
  """Returns what sets rotary positions.

  Args:
    positions: max_position_embeddings where config.json lacks it.
    theta: the base where it lacks that.
    theta_name: the base's old name.
    group: the object that transformers 5 keeps the settings in.
  """
  groups = ("rope_scaling", group)
  names = lambda *settings: tuple(f"{outer}.{name}" for name in settings for outer in groups)

  def of(flat: Mapping[str, Any], *settings: str) -> Any:
    return next((flat[name] for name in names(*settings) if flat.get(name) is not None), None)

  def original(_, flat):
    kind, longest = of(flat, "rope_type", "type"), flat.get("max_position_embeddings", positions)
    given = of(flat, "original_max_position_embeddings") if kind in ("llama3", "yarn") else None
    return (given or longest) if kind in ("llama3", "yarn", "dynamic") else None

  def turns(of_llama3, of_yarn, default, unused):
    def read(_, flat):
      kind = of(flat, "rope_type", "type")
      return {"llama3": of(flat, of_llama3), "yarn": of(flat, of_yarn) or default}.get(kind, unused)
    return read

  low, high = turns("low_freq_factor", "beta_slow", 1.0, 1.0), turns("high_freq_factor", "beta_fast", 32.0, 4.0)
  attention = lambda value, flat: value if of(flat, "rope_type", "type") == "yarn" else None
  only = lambda *kinds: lambda value, cfg: value if cfg.rope_scaling in kinds else None
  return (
      # The dynamic stretch begins where the positions end.
      Field("max_position_embeddings", "max_positions", positions,
            write=lambda value, cfg: cfg.rope_original_positions if cfg.rope_scaling == "dynamic" else value),
      Field((theta_name, *names("rope_theta")), "rope_theta", theta),
      Field(names("rope_type", "type"), "rope_scaling", "default", _SCALINGS, optional=True),
      Field(names("factor"), "rope_factor", 1.0, optional=True),
      Field(names("original_max_position_embeddings"), "rope_original_positions", None, read=original,
            write=only("llama3", "yarn"), optional=True),
      Field(names("low_freq_factor"), "rope_low_frequency", None, read=low, write=only("llama3"), optional=True),
      Field(names("beta_slow"), "rope_low_frequency", None, read=low, write=only("yarn"), optional=True),
      Field(names("high_freq_factor"), "rope_high_frequency", None, read=high, write=only("llama3"), optional=True),
      Field(names("beta_fast"), "rope_high_frequency", None, read=high, write=only("yarn"), optional=True),
      Field(names("attention_factor"), "rope_attention_factor", None, read=attention, write=only("yarn"),
            optional=True),
  )


# Of yarn's settings, the one that is done here in one way only.
ROPE_REQUIRED = {"rope_scaling.truncate": True, "rope_parameters.truncate": True}


def bias_fields(name: str = "attention_bias", default: bool = False) -> tuple[Field, ...]:
  """Returns what says whether all four maps of attention have biases."""
  return Field(name, "qkv_bias", default), Field(name, "out_bias", default)


def read_layer_types(value: Any, flat: Mapping[str, Any]) -> tuple | None:
  """Returns the attention_pattern that layer_types lists; None where it is absent."""
  return tuple(_KINDS.get(kind, kind) for kind in value) if isinstance(value, (list, tuple)) else None


def write_layer_types(pattern: tuple, cfg: ModelConfig) -> list[str]:
  """Returns layer_types, an entry a layer; what `read_layer_types` inverts."""
  names = {ours: theirs for theirs, ours in _KINDS.items()}
  pattern = pattern or ("global" if cfg.attention_window is None else "local",)
  return [names[pattern[i % len(pattern)]] for i in range(cfg.num_layers)]


_LAYER = "model.layers.{layer}"
_ATTENTION, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"

# The labels of a sequence.
SCORE_KEY = Key("score.weight", "L,D", "sequence_head/out/kernel", "DL")

# All but what stands between the parts of a block.
KEYS = (
    Key("model.embed_tokens.weight", "V,D", "embed/embedding", "VD"),
    Key(f"{_ATTENTION}.q_proj.weight", "NH,D", "layers/attention/query/kernel", "DNH"),
    Key(f"{_ATTENTION}.q_proj.bias", "NH", "layers/attention/query/bias", "NH"),
    Key(f"{_ATTENTION}.k_proj.weight", "KH,D", "layers/attention/key/kernel", "DKH"),
    Key(f"{_ATTENTION}.k_proj.bias", "KH", "layers/attention/key/bias", "KH"),
    Key(f"{_ATTENTION}.v_proj.weight", "KH,D", "layers/attention/value/kernel", "DKH"),
    Key(f"{_ATTENTION}.v_proj.bias", "KH", "layers/attention/value/bias", "KH"),
    Key(f"{_ATTENTION}.o_proj.weight", "D,NH", "layers/attention/out/kernel", "NHD"),
    Key(f"{_ATTENTION}.o_proj.bias", "D", "layers/attention/out/bias", "D"),
    Key(f"{_MLP}.gate_proj.weight", "F,D", "layers/mlp/gate/kernel", "DF"),
    Key(f"{_MLP}.gate_proj.bias", "F", "layers/mlp/gate/bias", "F"),
    Key(f"{_MLP}.up_proj.weight", "F,D", "layers/mlp/up/kernel", "DF"),
    Key(f"{_MLP}.up_proj.bias", "F", "layers/mlp/up/bias", "F"),
    Key(f"{_MLP}.down_proj.weight", "D,F", "layers/mlp/down/kernel", "FD"),
    Key(f"{_MLP}.down_proj.bias", "D", "layers/mlp/down/bias", "D"),
    Key("model.norm.weight", "D", "final_norm/scale", "D"),
    Key("lm_head.weight", "V,D", "head/kernel", "VD"),
    SCORE_KEY,
)

PRE_NORM_KEYS = (
    Key(f"{_LAYER}.input_layernorm.weight", "D", "layers/attention_norm/scale", "D"),
    Key(f"{_LAYER}.post_attention_layernorm.weight", "D", "layers/mlp_norm/scale", "D"),
)

INNER_NORM_KEYS = (
    Key(f"{_LAYER}.post_attention_layernorm.weight", "D", "layers/attention_out_norm/scale", "D"),
    Key(f"{_LAYER}.post_feedforward_layernorm.weight", "D", "layers/mlp_out_norm/scale", "D"),
)

SANDWICH_NORM_KEYS = (
    *INNER_NORM_KEYS,
    Key(f"{_LAYER}.input_layernorm.weight", "D", "layers/attention_norm/scale", "D"),
    Key(f"{_LAYER}.pre_feedforward_layernorm.weight", "D", "layers/mlp_norm/scale", "D"),
)


def qk_norm_keys(per_head: bool) -> tuple[Key, ...]:
  """Returns the norms of queries and keys, of one head's width or of all heads'."""
  query, key = ("H", "H") if per_head else ("NH", "KH")
  return (Key(f"{_ATTENTION}.q_norm.weight", query, "layers/attention/query_norm/scale", query),
          Key(f"{_ATTENTION}.k_norm.weight", key, "layers/attention/key_norm/scale", key))
