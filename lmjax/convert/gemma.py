"""Gemma 1, 2 and 3 (text) in Hugging Face's names: Llama's tensors, other norms, scaled embeddings, a tied head."""

import dataclasses
from typing import Any, Callable, Mapping

from lmjax.convert import common, llama
from lmjax.convert.family import Field

_FIXED = dict(llama.FAMILY.fixed, norm_offset=True, scale_embeddings=True, mlp_bias=False)
_REQUIRED = {**common.ROPE_REQUIRED, "use_bidirectional_attention": False}
# Kinds of the key-value cache compute the same.
_IGNORED = ("attention_dropout", "cache_implementation")

GEMMA = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    architectures=common.classes("Gemma"),
    fixed=_FIXED,
    fields=(
        *common.size_fields(kv_heads=16, head_dim=256, tied=True),
        *common.rope_fields(positions=8192),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        # The first release says gelu and means its approximation, as Hugging Face reads it.
        Field("hidden_act", "activation", "gelu_pytorch_tanh", (
            ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("silu", "silu"),
            ("relu", "relu"))),
        *common.bias_fields(),
    ),
    required={**_REQUIRED, "hidden_activation": "gelu_pytorch_tanh"},
    ignored_fields=_IGNORED,
)


def _layer_types(period: Callable[[Mapping[str, Any]], Any]) -> Callable[[Any, Mapping[str, Any]], tuple]:
  """Returns how to read the kinds of layers: listed, or else every period-th is global."""
  def read(_, flat):
    listed, every = common.read_layer_types(flat.get("layer_types"), flat), period(flat)
    return listed or (("local",) * (every - 1) + ("global",) if isinstance(every, int) and every > 0 else (every,))
  return read


def _shared_fields(kv_heads: int, positions: int, softcap: float | None, read_layers: Callable, **rope: Any) -> tuple:
  """Returns the fields that Gemma 2 and 3 have in common."""
  return (
      *common.size_fields(kv_heads=kv_heads, head_dim=256, tied=True),
      *common.rope_fields(positions=positions, **rope),
      Field("rms_norm_eps", "norm_eps", 1e-6),
      Field("hidden_activation", "activation", "gelu_pytorch_tanh", (
          ("gelu_pytorch_tanh", "gelu_tanh"), *common.ACTIVATIONS)),
      *common.bias_fields(),
      Field("query_pre_attn_scalar", "attention_scale", 256, read=lambda value, _: value ** -0.5,
            write=lambda value, cfg: cfg.head_dim if value is None else round(value ** -2)),
      Field("sliding_window", "attention_window", 4096),
      Field("layer_types", "attention_pattern", None, read=read_layers, write=common.write_layer_types),
      Field("final_logit_softcapping", "logit_softcap", softcap),
  )


GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architectures=common.classes("Gemma2"),
    fixed={**_FIXED, "block": "sandwich"},
    fields=(
        *_shared_fields(4, 8192, 30.0, _layer_types(lambda _: 2)),
        Field("attn_logit_softcapping", "attention_softcap", 50.0),
    ),
    # The activation has stood under both names; the other one is read.
    required={**_REQUIRED, "hidden_act": "gelu_pytorch_tanh"},
    keys=(*common.KEYS, *common.SANDWICH_NORM_KEYS),
)

_every = _layer_types(lambda flat: flat.get("sliding_window_pattern", flat.get("_sliding_window_pattern", 6)))

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architectures={"Gemma3ForCausalLM": dict(head="lm"), "Gemma3TextModel": dict(head="lm"),
                   "Gemma3TextForSequenceClassification": dict(head="sequence")},
    fixed={**_FIXED, "block": "sandwich", "qk_norm": "head"},
    fields=(
        *_shared_fields(4, 131072, None, _every, theta=1e6, group="rope_parameters.full_attention"),
        Field(("rope_local_base_freq", "rope_parameters.sliding_attention.rope_theta"), "local_rope_theta", 10_000.0,
              write=lambda value, cfg: value or cfg.rope_theta),
        Field("sliding_window_pattern", "attention_pattern", 6, read=_every, write=lambda *_: 6, optional=True),
        Field("_sliding_window_pattern", "attention_pattern", 6, read=_every, write=lambda *_: 6, optional=True),
    ),
    required={**_REQUIRED, "attn_logit_softcapping": None, "rope_parameters.full_attention.truncate": True,
              "rope_parameters.sliding_attention.rope_type": "default"},
    keys=(*GEMMA2.keys, *common.qk_norm_keys(per_head=True)),
)
