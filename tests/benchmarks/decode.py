"""How fast text is generated, against transformers on torch with the same weights.

    python tests/benchmarks/decode.py [--quick] [--rounds=N] [--json=FILE]

Both sides decode greedily with a key-value cache, from prompts of the same random tokens, and never stop early. Prefill
is the time to the first token; a token's latency is what each further one adds. Random weights are made by transformers
and imported, so that both compute the same; without torch and transformers, lmjax runs alone on weights of its own.
"""

import argparse
import tempfile
from typing import Any, Callable

import harness
import jax
import numpy as np

import lmjax
from lmjax.config import ModelConfig
from lmjax.models.transformer import init_params, make_model

PROMPT = 128


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument("--new_tokens", type=int, default=64, help="tokens generated")
  args = parser.parse_args()
  rounds = args.rounds or (3 if args.quick else 7)
  shape = argparse.Namespace(layers=6, width=512, heads=8, vocab=8192, positions=PROMPT + args.new_tokens)
  if args.quick:
    shape = argparse.Namespace(layers=2, width=128, heads=2, vocab=1024, positions=PROMPT + args.new_tokens)
  variants, notes = make_variants(shape)
  rows = []
  for batch_size in (1, 8):
    rows += compare(variants, shape, batch_size, args.new_tokens, rounds)
  harness.report(f"Decoding: {shape.layers} layers, D={shape.width}, V={shape.vocab}, float32, prompts of {PROMPT}",
                 rows, notes)


def make_variants(shape: argparse.Namespace) -> tuple[dict[str, Callable], str]:
  """Returns {name: (prompts [B, P], tokens wanted) -> tokens [B, T]}, and what was missing."""
  try:
    import torch
    import transformers
  except ImportError as e:
    model, params = random_model(shape)
    return {"lmjax": lmjax_variant(model, params)}, f"Not compared with transformers: {e}."
  transformers.logging.disable_progress_bar()
  torch.manual_seed(0)
  config = transformers.GPT2Config(n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, bos_token_id=0,
                                   eos_token_id=0, vocab_size=shape.vocab, n_positions=shape.positions)
  reference = transformers.GPT2LMHeadModel(config).eval()
  with tempfile.TemporaryDirectory() as folder:
    reference.save_pretrained(folder)
    model, params = lmjax.load(folder)
  return {"lmjax": lmjax_variant(model, params), "transformers": transformers_variant(torch, reference)}, ""


def random_model(shape: argparse.Namespace) -> tuple[Any, Any]:
  cfg = ModelConfig(num_layers=shape.layers, embed_dim=shape.width, num_heads=shape.heads, num_kv_heads=shape.heads,
                    head_dim=shape.width // shape.heads, mlp_dim=4 * shape.width, vocab_size=shape.vocab,
                    max_positions=shape.positions, dtype="float32")
  model = make_model(cfg)
  unboxed = jax.jit(lambda key: jax.tree.map(
      lambda x: x.unbox(), init_params(model, key), is_leaf=lambda x: hasattr(x, "unbox")))
  return model, unboxed(jax.random.key(0))


def lmjax_variant(model: Any, params: Any) -> Callable[[np.ndarray, int], np.ndarray]:
  return lambda prompts, count: np.array(
      lmjax.generate(model, params, prompts.tolist(), max_new_tokens=count, temperature=0.0))


def transformers_variant(torch: Any, model: Any) -> Callable[[np.ndarray, int], np.ndarray]:
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = model.to(device)

  def generate(prompts: np.ndarray, count: int) -> np.ndarray:
    inputs = torch.from_numpy(prompts).to(device)
    with torch.no_grad():
      out = model.generate(inputs, attention_mask=torch.ones_like(inputs), min_new_tokens=count, max_new_tokens=count,
                           do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    return out[:, prompts.shape[1]:].cpu().numpy()
  return generate


def compare(variants: dict[str, Callable], shape: argparse.Namespace, batch_size: int, new_tokens: int,
            rounds: int) -> list[dict]:
  prompts = np.random.default_rng(batch_size).integers(1, shape.vocab, (batch_size, PROMPT))
  outputs = {name: generate(prompts, new_tokens) for name, generate in variants.items()}
  for generate in variants.values():
    generate(prompts, 1)
  calls = {(name, count): lambda generate=generate, count=count: generate(prompts, count)
           for name, generate in variants.items() for count in (1, new_tokens)}
  seconds = harness.medians(harness.interleave(calls, rounds))
  rows = []
  for name in variants:
    prefill, whole = seconds[name, 1], seconds[name, new_tokens]
    latency = (whole - prefill) / (new_tokens - 1)
    row = {"variant": name, "batch": batch_size, "prefill ms": 1e3 * prefill, "ms/token": 1e3 * latency,
           "tokens/s": batch_size / latency}
    if "transformers" in variants:
      row |= {"speed, prefill": seconds["transformers", 1] / prefill,
              "speed, token": (seconds["transformers", new_tokens] - seconds["transformers", 1]) / (whole - prefill),
              "same tokens": float(np.mean(outputs[name] == outputs["transformers"]))}
    rows.append(row)
  return rows


if __name__ == "__main__":
  main()
