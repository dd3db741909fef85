"""The shapes that training steps are timed at."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
  """An architecture and a batch.

  Attributes:
    family: "gpt2" (learned positions, LayerNorm, GELU, biases, tied) or "llama" (rotary, RMSNorm, gated SiLU).
    num_layers: of the model.
    embed_dim: D.
    num_heads: N; a head is embed_dim / num_heads wide.
    num_kv_heads: K; num_heads in a gpt2.
    mlp_dim: F.
    vocab_size: V.
    seq_len: T.
    batch_size: B.
    dtype: what is computed in; parameters and the optimizer's state are float32.
    learning_rate: of AdamW.
  """
  family: str = "gpt2"
  num_layers: int = 6
  embed_dim: int = 512
  num_heads: int = 8
  num_kv_heads: int = 8
  mlp_dim: int = 2048
  vocab_size: int = 8192
  seq_len: int = 256
  batch_size: int = 4
  dtype: str = "float32"
  learning_rate: float = 1e-4

  def tokens(self) -> np.ndarray:
    """Returns random tokens [B, T + 1]."""
    return np.random.default_rng(0).integers(0, self.vocab_size, (self.batch_size, self.seq_len + 1)).astype(np.int32)

  def model_settings(self) -> dict:
    """Returns what lmjax's `config.model` takes, but for the vocabulary and the type."""
    from lmjax.models import families
    style = families.llama_style() if self.family == "llama" else families.gpt2("124M")
    return {**style, "num_layers": self.num_layers, "embed_dim": self.embed_dim, "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads, "head_dim": self.embed_dim // self.num_heads, "mlp_dim": self.mlp_dim,
            "tie_embeddings": True, **({} if self.family == "llama" else {"max_positions": self.seq_len})}


SHAPES = {
    "tiny": Shape(num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=2, mlp_dim=256, vocab_size=512, seq_len=64),
    # The small model that this suite is about on a CPU; a row four times as long; one twice as wide.
    "base": Shape(),
    "long": Shape(seq_len=1024),
    "wide": Shape(embed_dim=1024, num_heads=16, num_kv_heads=16, mlp_dim=4096),
    # Llama 3.2 1B but for its vocabulary, of which a step on one GPU would be mostly about.
    "llama_1b": Shape("llama", 16, 2048, 32, 8, 8192, 32768, 2048, 8, "bfloat16"),
    "gpt2_124m": Shape("gpt2", 12, 768, 12, 12, 3072, 50304, 1024, 32, "bfloat16"),
}
