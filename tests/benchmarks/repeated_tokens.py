"""Has a decoder learned to look up what followed the same tokens before? (Olsson et al. 2022, arXiv 2209.11895)

    python tests/benchmarks/repeated_tokens.py RUN ...      # workdirs, or Hugging Face folders

Prints the mean loss, in nats a token, of random tokens and of the same tokens when they come a second time.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lmjax

ROWS, SKIPPED = 64, 5  # The first tokens have too little before them to be told by it.


def losses(run, length):
  """Returns the mean loss of `length` random tokens and of their repetition."""
  model, params = lmjax.load(run)
  once = np.random.default_rng(0).integers(10, model.cfg.vocab_size - 10, (ROWS, length))
  tokens = jnp.asarray(np.concatenate([once, once], axis=1), jnp.int32)
  logits = jax.jit(model.apply)({"params": params}, tokens)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
  return loss[:, SKIPPED:length - 1].mean(), loss[:, length + SKIPPED:].mean()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="+")
  parser.add_argument("--length", type=int, default=63)
  args = parser.parse_args()
  for run in args.runs:
    first, second = losses(run, args.length)
    print(f"{run}: first {first:.2f}, again {second:.2f}")


if __name__ == "__main__":
  main()
