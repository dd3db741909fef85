"""Published architectures as presets: a family is a set of values for ModelConfig, never a copy of the block.

Each function returns a dict for `config.model.update(...)`.
"""

from typing import Any

from lmjax.config_checks import UserError, nearest

_GPT2_SIZES = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2; parameters as released.
    "124M": (12, 768, 12), "355M": (24, 1024, 16), "774M": (36, 1280, 20), "1.5B": (48, 1600, 25),
}

_GPT3_SIZES = {
    # Brown et al. 2020, arXiv 2005.14165, table 2.1: layers, width, heads, width of a head. The table prints 24 heads
    # for 1.3B, which makes 1.5B parameters at that width; 16 make 1.3B.
    "125M": (12, 768, 12, 64), "350M": (24, 1024, 16, 64), "760M": (24, 1536, 16, 96), "1.3B": (24, 2048, 16, 128),
    "2.7B": (32, 2560, 32, 80), "6.7B": (32, 4096, 32, 128), "13B": (40, 5140, 40, 128), "175B": (96, 12288, 96, 128),
}

_LLAMA_SIZES = {
    # Touvron et al. 2023, arXiv 2307.09288 (2-7B, 2-13B, 2-70B); Grattafiori et al. 2024, arXiv 2407.21783 (3-8B,
    # 3-70B); the 3.2 model cards (3.2-1B, 3.2-3B). Columns: layers, width, heads, KV heads, head width, MLP width,
    # vocabulary, rope theta, tied.
    "2-7B": (32, 4096, 32, 32, 128, 11008, 32000, 1e4, False),
    "2-13B": (40, 5120, 40, 40, 128, 13824, 32000, 1e4, False),
    "2-70B": (80, 8192, 64, 8, 128, 28672, 32000, 1e4, False),
    "3-8B": (32, 4096, 32, 8, 128, 14336, 128256, 5e5, False),
    "3-70B": (80, 8192, 64, 8, 128, 28672, 128256, 5e5, False),
    "3.2-1B": (16, 2048, 32, 8, 64, 8192, 128256, 5e5, True),
    "3.2-3B": (28, 3072, 24, 8, 128, 8192, 128256, 5e5, True),
}

_SMOLLM_SIZES = {
    # Allal et al. 2025, arXiv 2502.02737, and the model cards of the first release; columns as above. SmolLM2 has the
    # same sizes with a rope theta of 1e5 (1.7B: 1.3e5).
    "135M": (30, 576, 9, 3, 64, 1536, 49152, 1e4, True),
    "360M": (32, 960, 15, 5, 64, 2560, 49152, 1e4, True),
    "1.7B": (24, 2048, 32, 32, 64, 8192, 49152, 1e4, True),
}

_QWEN2_SIZES = {
    # Yang et al. 2024, arXiv 2407.10671, table 1; columns as above.
    "0.5B": (24, 896, 14, 2, 64, 4864, 151936, 1e6, True),
    "1.5B": (28, 1536, 12, 2, 128, 8960, 151936, 1e6, True),
    "7B": (28, 3584, 28, 4, 128, 18944, 152064, 1e6, False),
    "72B": (80, 8192, 64, 8, 128, 29568, 152064, 1e6, False),
}

_QWEN3_SIZES = {
    # Yang et al. 2025, arXiv 2505.09388, table 1, and the released config.json; columns as above.
    "0.6B": (28, 1024, 16, 8, 128, 3072, 151936, 1e6, True),
    "1.7B": (28, 2048, 16, 8, 128, 6144, 151936, 1e6, True),
    "4B": (36, 2560, 32, 8, 128, 9728, 151936, 1e6, True),
    "8B": (36, 4096, 32, 8, 128, 12288, 151936, 1e6, False),
    "32B": (64, 5120, 64, 8, 128, 25600, 151936, 1e6, False),
}

_MIXTRAL_SIZES = {
    # Jiang et al. 2024, arXiv 2401.04088, table 1, and the released config.json; columns as above, with the
    # width of each of 8 experts as that of the MLP.
    "8x7B": (32, 4096, 32, 8, 128, 14336, 32000, 1e6, False),
    "8x22B": (56, 6144, 48, 8, 128, 16384, 32000, 1e6, False),
}

_QWEN2_MOE_SIZES = {
    # The released config.json of Qwen1.5-MoE (A2.7B); Yang et al. 2024, arXiv 2407.10671, table 1 (57B-A14B).
    # Columns as above, then: width of an expert, of the shared one, experts, experts of a token.
    "A2.7B": (24, 2048, 16, 16, 128, 5632, 151936, 1e6, False, 1408, 5632, 60, 4),
    "57B-A14B": (28, 3584, 28, 4, 128, 18944, 151936, 1e6, False, 2560, 20480, 64, 8),
}

_QWEN3_MOE_SIZES = {
    # Yang et al. 2025, arXiv 2505.09388, table 2, and the released config.json; columns as above, without a shared one.
    "30B-A3B": (48, 2048, 32, 4, 128, 6144, 151936, 1e6, False, 768, 0, 128, 8),
    "235B-A22B": (94, 4096, 64, 4, 128, 12288, 151936, 1e6, False, 1536, 0, 128, 8),
}

_GEMMA_SIZES = {
    # Gemma Team 2024, arXiv 2403.08295, table 1 (2b, 7b), and arXiv 2408.00118, table 1 (2-); 2025, arXiv 2503.19786,
    # and the released config.json (3-). Columns: generation, layers, width, heads, KV heads, head width, MLP width,
    # vocabulary, window of local layers, what scores are divided by the root of, stretch of global layers.
    "2b": (1, 18, 2048, 8, 1, 256, 16384, 256000, None, 256, 1.0),
    "7b": (1, 28, 3072, 16, 16, 256, 24576, 256000, None, 256, 1.0),
    "2-2b": (2, 26, 2304, 8, 4, 256, 9216, 256000, 4096, 256, 1.0),
    "2-9b": (2, 42, 3584, 16, 8, 256, 14336, 256000, 4096, 256, 1.0),
    "2-27b": (2, 46, 4608, 32, 16, 128, 36864, 256000, 4096, 144, 1.0),
    "3-270m": (3, 18, 640, 4, 1, 256, 2048, 262144, 512, 256, 1.0),
    "3-1b": (3, 26, 1152, 4, 1, 256, 6912, 262144, 512, 256, 1.0),
    "3-4b": (3, 34, 2560, 8, 4, 256, 10240, 262208, 1024, 256, 8.0),
    "3-27b": (3, 62, 5376, 32, 16, 128, 21504, 262208, 1024, 168, 8.0),
}

_PYTHIA_SIZES = {
    # Biderman et al. 2023, arXiv 2304.01373, table 1, and the released config.json: layers, width, heads, vocabulary.
    "70m": (6, 512, 8, 50304), "160m": (12, 768, 12, 50304), "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304), "1.4b": (24, 2048, 16, 50304), "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432), "12b": (36, 5120, 40, 50688),
}

_OLMO2_SIZES = {
    # OLMo Team 2024, arXiv 2501.00656, table 2, and the released config.json: layers, width, heads, MLP width.
    "1B": (16, 2048, 16, 8192), "7B": (32, 4096, 32, 11008), "13B": (40, 5120, 40, 13824),
}

_BERT_SIZES = {
    # Devlin et al. 2018, arXiv 1810.04805, section 3: layers, width, heads.
    "base": (12, 768, 12), "large": (24, 1024, 16),
}

_ALBERT_SIZES = {
    # Lan et al. 2019, arXiv 1909.11942, table 1, as released in version 2: layers, width, heads.
    "base-v2": (12, 768, 12), "large-v2": (24, 1024, 16), "xlarge-v2": (24, 2048, 16), "xxlarge-v2": (12, 4096, 64),
}

_ELECTRA_SIZES = {
    # Clark et al. 2020, arXiv 2003.10555, table 6: layers, width, heads, width of the embeddings. A generator has 1/4
    # (base: 1/3) of the width and heads; that released beside the small discriminator has all of them.
    "small": (12, 256, 4, 128), "base": (12, 768, 12, 768), "large": (24, 1024, 16, 1024),
    "small-generator": (12, 64, 1, 128), "base-generator": (12, 256, 4, 768), "large-generator": (24, 256, 4, 1024),
}

_TRANSFORMER_SIZES = {
    # Vaswani et al. 2017, arXiv 1706.03762, table 3: layers of each side, width, heads, MLP width.
    "base": (6, 512, 8, 2048), "big": (6, 1024, 16, 4096),
}

_T5_SIZES = {
    # Raffel et al. 2019, arXiv 1910.10683, section 3.7: layers of each side, width, heads, width of a head, MLP width.
    "small": (6, 512, 8, 64, 2048), "base": (12, 768, 12, 64, 3072), "large": (24, 1024, 16, 64, 4096),
    "3B": (24, 1024, 32, 128, 16384), "11B": (24, 1024, 128, 128, 65536),
}

_T5_1_1_SIZES = {
    # As released, with Flan's (Chung et al. 2022, arXiv 2210.11416) the same; columns as above.
    "small": (8, 512, 6, 64, 1024), "base": (12, 768, 12, 64, 2048), "large": (24, 1024, 16, 64, 2816),
    "XL": (24, 2048, 32, 64, 5120), "XXL": (24, 4096, 64, 64, 10240),
}

_BART_SIZES = {
    # Lewis et al. 2019, arXiv 1910.13461, section 2, as released: layers of each side, width, heads.
    "base": (6, 768, 12), "large": (12, 1024, 16),
}

_XLNET_SIZES = {
    # Yang et al. 2019, arXiv 1906.08237, appendix A.6, and the released models: layers, width, heads.
    "base": (12, 768, 12), "large": (24, 1024, 16),
}


def gpt2(size: str = "124M") -> dict:
  """GPT-2: learned positions, LayerNorm before each part, GELU, biases, tied embeddings."""
  num_layers, embed_dim, num_heads = _pick("GPT-2", _GPT2_SIZES, size)
  return _gpt(num_layers, embed_dim, num_heads, embed_dim // num_heads, max_positions=1024)


def gpt3(size: str = "125M") -> dict:
  """GPT-3: GPT-2's block, with dense and locally banded attention in turn.

  The paper tells no width of the band; 256 is what GPT-Neo, made after it, has.
  """
  return dict(_gpt(*_pick("GPT-3", _GPT3_SIZES, size), max_positions=2048),
              attention_pattern=("global", "local"), attention_window=256)


def llama(size: str = "3.2-1B") -> dict:
  """Llama: rotary positions, RMSNorm, gated SiLU, grouped queries, no biases."""
  return _llama(*_pick("Llama", _LLAMA_SIZES, size))


def smollm(size: str = "135M") -> dict:
  """SmolLM: a small Llama."""
  return _llama(*_pick("SmolLM", _SMOLLM_SIZES, size))


def mistral(size: str = "7B") -> dict:
  """Mistral: a Llama under a window of keys (Jiang et al. 2023, arXiv 2310.06825, table 1)."""
  sizes = {"7B": (32, 4096, 32, 8, 128, 14336, 32000, 1e4, False)}
  return dict(_llama(*_pick("Mistral", sizes, size)), attention_window=4096)


def qwen2(size: str = "0.5B") -> dict:
  """Qwen2: a Llama with biases of queries, keys and values."""
  return dict(_llama(*_pick("Qwen2", _QWEN2_SIZES, size)), norm_eps=1e-6, qkv_bias=True)


def qwen3(size: str = "0.6B") -> dict:
  """Qwen3: a Llama whose queries and keys are normalised, each head by itself."""
  return dict(_llama(*_pick("Qwen3", _QWEN3_SIZES, size)), norm_eps=1e-6, qk_norm="head")


def mixtral(size: str = "8x7B") -> dict:
  """Mixtral: a Llama with eight experts in place of the MLP, two for each token, whose weights add up to 1."""
  return dict(_llama(*_pick("Mixtral", _MIXTRAL_SIZES, size)), num_experts=8, experts_per_token=2,
              normalize_expert_weights=True)


def qwen2_moe(size: str = "A2.7B") -> dict:
  """Qwen1.5-MoE and Qwen2's mixture: Qwen2 with small experts and a shared one, whose weights are as they come."""
  return dict(_experts(*_pick("Qwen2-MoE", _QWEN2_MOE_SIZES, size)), qkv_bias=True, normalize_expert_weights=False)


def qwen3_moe(size: str = "30B-A3B") -> dict:
  """Qwen3's mixture: Qwen3 with small experts, whose weights add up to 1."""
  return dict(_experts(*_pick("Qwen3-MoE", _QWEN3_MOE_SIZES, size)), qk_norm="head", normalize_expert_weights=True)


def _experts(*sizes: Any) -> dict:
  *dense, expert_dim, shared_expert_dim, num_experts, experts_per_token = sizes
  return dict(_llama(*dense), norm_eps=1e-6, mlp_bias=False, num_experts=num_experts, expert_dim=expert_dim,
              experts_per_token=experts_per_token, shared_expert_dim=shared_expert_dim)


def gemma(size: str = "2-2b") -> dict:
  """Gemma 1: a Llama with GELU, scaled embeddings and a tied head.

  Gemma 2 adds norms behind each part, soft-caps, and local layers in turn with global ones; Gemma 3 has norms of
  queries and keys in place of soft-caps, and five local layers, with a rope theta of their own, to a global one.
  """
  generation, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab, window, scale, factor = _pick(
      "Gemma", _GEMMA_SIZES, size)
  later = {
      1: {},
      2: dict(block="sandwich", attention_softcap=50.0, logit_softcap=30.0, attention_pattern=("local", "global")),
      3: dict(block="sandwich", qk_norm="head", attention_pattern=("local",) * 5 + ("global",), local_rope_theta=1e4,
              rope_scaling="none" if factor == 1 else "linear", rope_factor=factor),
  }[generation]
  return dict(
      _llama(num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab, 1e6 if generation == 3 else 1e4,
             tied=True),
      activation="gelu_tanh", norm_eps=1e-6, norm_offset=True, scale_embeddings=True, attention_scale=scale ** -0.5,
      attention_window=window, **later)


def pythia(size: str = "160m") -> dict:
  """Pythia, a GPT-NeoX: attention and MLP side by side, a quarter of each head turned, an untied head."""
  num_layers, embed_dim, num_heads, vocab = _pick("Pythia", _PYTHIA_SIZES, size)
  return dict(_gpt(num_layers, embed_dim, num_heads, embed_dim // num_heads, max_positions=2048), vocab_size=vocab,
              position="rotary", rotary_fraction=0.25, block="parallel_two", activation="gelu", tie_embeddings=False)


def olmo2(size: str = "1B") -> dict:
  """OLMo 2: a Llama that normalises what is added to the residual stream, and queries and keys over all heads."""
  num_layers, embed_dim, num_heads, mlp_dim = _pick("OLMo 2", _OLMO2_SIZES, size)
  return dict(_llama(num_layers, embed_dim, num_heads, num_heads, embed_dim // num_heads, mlp_dim, 100352, 5e5, False),
              norm_eps=1e-6, block="inner", qk_norm="all")


def xlnet(size: str = "base") -> dict:
  """XLNet: two streams of attention over relative positions, LayerNorm after each part, a memory of all before."""
  num_layers, embed_dim, num_heads = _pick("XLNet", _XLNET_SIZES, size)
  return dict(architecture="xlnet", num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
              mlp_dim=4 * embed_dim, vocab_size=32000, position="relative", norm="layernorm", norm_eps=1e-12,
              activation="gelu", gated_mlp=False, use_bias=False, mlp_bias=True, head_bias=True, tie_embeddings=True,
              block="post", scale_residual_init=False)


def llama_style() -> dict:
  """What makes a block a Llama block, at any size."""
  return dict(position="rotary", norm="rmsnorm", activation="silu", gated_mlp=True, use_bias=False, block="pre",
              scale_residual_init=False)


def _llama(num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, mlp_dim: int, vocab: int,
           theta: float, tied: bool) -> dict:
  return dict(
      llama_style(), num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
      head_dim=head_dim, mlp_dim=mlp_dim, vocab_size=vocab, rope_theta=theta, tie_embeddings=tied)


def bert(size: str = "base") -> dict:
  """BERT: an encoder with the norm after each part, two types of tokens, masked tokens and pairs of sentences."""
  num_layers, embed_dim, num_heads = _pick("BERT", _BERT_SIZES, size)
  return dict(_encoder(num_layers, embed_dim, num_heads), vocab_size=30522, head="pretraining", pooler="tanh")


def roberta(size: str = "base") -> dict:
  """RoBERTa: BERT without pairs of sentences; positions begin after the row of padding (arXiv 1907.11692)."""
  num_layers, embed_dim, num_heads = _pick("RoBERTa", _BERT_SIZES, size)
  return dict(_encoder(num_layers, embed_dim, num_heads), vocab_size=50265, token_types=1, position_offset=2,
              norm_eps=1e-5, head="lm", pooler="tanh")


def albert(size: str = "base-v2") -> dict:
  """ALBERT: one block for all layers, and narrow embeddings."""
  num_layers, embed_dim, num_heads = _pick("ALBERT", _ALBERT_SIZES, size)
  return dict(_encoder(num_layers, embed_dim, num_heads), vocab_size=30000, embedding_dim=128, share_layers=True,
              activation="gelu_tanh", head="pretraining", pooler="tanh")


def electra(size: str = "small") -> dict:
  """ELECTRA's discriminator, which tells replaced tokens, or its generator, which fills masked ones in."""
  num_layers, embed_dim, num_heads, embedding_dim = _pick("ELECTRA", _ELECTRA_SIZES, size)
  return dict(_encoder(num_layers, embed_dim, num_heads), vocab_size=30522, embedding_dim=embedding_dim,
              head="lm" if size.endswith("-generator") else "replaced", pooler="gelu")


def electra_pretraining(size: str = "small") -> dict:
  """ELECTRA's discriminator and the generator that it learns with, of the share of its size in the paper's table 6."""
  if size.endswith("-generator"):
    raise UserError(f"ELECTRA has no pair of size {size!r}; give the discriminator's size, "
                    f"{size.removesuffix('-generator')}.")
  return dict(electra(size), architecture="electra", generator_fraction=1 / 3 if size == "base" else 1 / 4)


def distilbert(size: str = "base") -> dict:
  """DistilBERT: half of BERT's layers, without token types (arXiv 1910.01108)."""
  num_layers, embed_dim, num_heads = _pick("DistilBERT", {"base": (6, 768, 12)}, size)
  return dict(_encoder(num_layers, embed_dim, num_heads), vocab_size=30522, token_types=0, head="lm", pooler="relu")


def _encoder(num_layers: int, embed_dim: int, num_heads: int) -> dict:
  return dict(architecture="encoder", num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
              num_kv_heads=num_heads, head_dim=embed_dim // num_heads, mlp_dim=4 * embed_dim, embedding_dim=embed_dim,
              max_positions=512, position="learned", token_types=2, embedding_norm=True, block="post", norm="layernorm",
              norm_eps=1e-12, activation="gelu", gated_mlp=False, use_bias=True, head_transform=True, head_bias=True,
              tie_embeddings=True, scale_residual_init=False)


def transformer(size: str = "base") -> dict:
  """The 2017 Transformer: sinusoidal positions, a norm after each part, ReLU, one table of tokens for all."""
  num_layers, embed_dim, num_heads, mlp_dim = _pick("Transformer", _TRANSFORMER_SIZES, size)
  # Its implementation starts the embeddings so that they have unit variance once they are scaled up.
  return dict(_two_sided(num_layers, embed_dim, num_heads, embed_dim // num_heads, mlp_dim), vocab_size=37000,
              block="post", norm="layernorm", position="sinusoidal", activation="relu", scale_embeddings=True,
              qkv_bias=False, out_bias=False, mlp_bias=True, init_std=embed_dim ** -0.5)


def t5(size: str = "base") -> dict:
  """T5: relative positions, RMSNorm before each part, ReLU, no biases, unscaled scores, scaled tied logits."""
  return dict(_t5(*_pick("T5", _T5_SIZES, size)), activation="relu", gated_mlp=False, tie_embeddings=True,
              scale_logits=True)


def t5_1_1(size: str = "base") -> dict:
  """T5 1.1 and Flan-T5: T5 with a gated GELU and an output projection of its own."""
  return dict(_t5(*_pick("T5 1.1", _T5_1_1_SIZES, size)), activation="gelu_tanh", gated_mlp=True, tie_embeddings=False,
              scale_logits=False)


flan_t5 = t5_1_1


def bart(size: str = "base") -> dict:
  """BART: learned positions, a norm after the embeddings and after each part, GELU, biases, that of the logits too."""
  num_layers, embed_dim, num_heads = _pick("BART", _BART_SIZES, size)
  return dict(_two_sided(num_layers, embed_dim, num_heads, embed_dim // num_heads, 4 * embed_dim), vocab_size=50265,
              max_positions=1024, position_offset=2, block="post", norm="layernorm", position="learned",
              embedding_norm=True, activation="gelu", head_bias=True)


def _t5(num_layers: int, embed_dim: int, num_heads: int, head_dim: int, mlp_dim: int) -> dict:
  return dict(_two_sided(num_layers, embed_dim, num_heads, head_dim, mlp_dim), vocab_size=32128, block="pre",
              norm="rmsnorm", norm_eps=1e-6, position="relative", attention_scale=1.0, use_bias=False, init="fan_in",
              init_std=1.0)


def _two_sided(num_layers: int, embed_dim: int, num_heads: int, head_dim: int, mlp_dim: int) -> dict:
  return dict(architecture="encoder_decoder", num_layers=num_layers, num_decoder_layers=num_layers, embed_dim=embed_dim,
              num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, mlp_dim=mlp_dim, gated_mlp=False,
              tie_embeddings=True, scale_residual_init=False)


def debug(preset: dict) -> dict:
  """Returns a preset's options at a size that trains on a CPU in seconds; the vocabulary is the tokenizer's."""
  narrow = preset.get("embedding_dim") not in (None, preset["embed_dim"])
  grouped = preset.get("num_kv_heads") not in (None, preset["num_heads"])
  sizes = dict(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2 if grouped else 4, head_dim=16, mlp_dim=128,
               embedding_dim=32 if narrow else None, vocab_size=None)
  # Only where the preset has them at all.
  parts = dict(num_decoder_layers=2, max_positions=128, attention_window=16, attention_pattern=("local", "global"),
               num_experts=4, experts_per_token=2, expert_dim=32, shared_expert_dim=48)
  return {**preset, **sizes, **{name: value for name, value in parts.items() if preset.get(name)}}


def _gpt(num_layers: int, embed_dim: int, num_heads: int, head_dim: int, max_positions: int) -> dict:
  return dict(num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_heads,
              head_dim=head_dim, mlp_dim=4 * embed_dim, vocab_size=50257, max_positions=max_positions,
              position="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, use_bias=True,
              tie_embeddings=True, block="pre")


def _pick(family: str, sizes: dict, size: str) -> tuple:
  if size not in sizes:
    raise UserError(f"{family} has no size {size!r}{nearest(size, sizes)}")
  return sizes[size]


PRESETS = {preset.__name__: preset for preset in (
    gpt2, gpt3, llama, smollm, mistral, qwen2, qwen3, gemma, pythia, olmo2, bert, roberta, albert, electra,
    electra_pretraining, distilbert, transformer, t5, t5_1_1, bart, xlnet, mixtral, qwen2_moe, qwen3_moe)}


def objective_of(model: Any) -> dict:
  """Returns the settings of the objective that a model of this architecture and head was made for.

  Raises:
    UserError: where that is labels.
  """
  pairs = "order" if model.share_layers else "next"  # ALBERT's and BERT's.
  objectives = {
      ("decoder", "lm"): dict(name="causal_lm"), ("encoder", "lm"): dict(name="masked_lm"),
      ("encoder", "pretraining"): dict(name="masked_lm", sentence_pairs=pairs),
      ("electra", "replaced"): dict(name="replaced_tokens"), ("encoder_decoder", "lm"): dict(name="span_corruption"),
      ("xlnet", "lm"): dict(name="permutation_lm")}
  kind = model.architecture, model.head
  if kind not in objectives:
    raise UserError(f"A model of architecture {kind[0]} with head {kind[1]} has no pre-training of its own; it learns "
                    "from labels, or with another (electra as electra_pretraining).")
  return objectives[kind]


def preset(family: str) -> dict:
  """Returns the preset of a family by its name, at its default size.

  Raises:
    UserError: for a name that is none.
  """
  if family not in PRESETS:
    raise UserError(f"There is no family {family!r}{nearest(family, PRESETS)}")
  return PRESETS[family]()
