"""Published architectures as presets: a family is a set of values for ModelConfig, never a copy of the block.

Each function returns a dict for `config.model.update(...)`.
"""

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

_XLNET_SIZES = {
    # Yang et al. 2019, arXiv 1906.08237, appendix A.6, and the released models: layers, width, heads.
    "base": (12, 768, 12), "large": (24, 1024, 16),
}


def gpt2(size: str = "124M") -> dict:
  """GPT-2: learned positions, LayerNorm before each part, GELU, biases, tied embeddings."""
  num_layers, embed_dim, num_heads = _pick("GPT-2", _GPT2_SIZES, size)
  return _gpt(num_layers, embed_dim, num_heads, embed_dim // num_heads, max_positions=1024)


def gpt3(size: str = "125M") -> dict:
  """GPT-3's sizes with GPT-2's block and dense attention in every layer."""
  return _gpt(*_pick("GPT-3", _GPT3_SIZES, size), max_positions=2048)


def llama(size: str = "3.2-1B") -> dict:
  """Llama: rotary positions, RMSNorm, gated SiLU, grouped queries, no biases."""
  num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab, theta, tied = _pick(
      "Llama", _LLAMA_SIZES, size)
  return dict(
      llama_style(), num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
      head_dim=head_dim, mlp_dim=mlp_dim, vocab_size=vocab, rope_theta=theta, tie_embeddings=tied)


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


def _gpt(num_layers: int, embed_dim: int, num_heads: int, head_dim: int, max_positions: int) -> dict:
  return dict(num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_heads,
              head_dim=head_dim, mlp_dim=4 * embed_dim, vocab_size=50257, max_positions=max_positions,
              position="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, use_bias=True,
              tie_embeddings=True, block="pre")


def _pick(family: str, sizes: dict, size: str) -> tuple:
  if size not in sizes:
    raise UserError(f"{family} has no size {size!r}{nearest(size, sizes)}")
  return sizes[size]
