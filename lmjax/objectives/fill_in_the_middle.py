"""Fill in the middle: a decoder writes what stands between two texts (Bavarian et al. 2022, arXiv 2207.14255).

With probability `fim_rate` a document is cut in a prefix, a middle and a suffix, at two places drawn alike, and
rearranged (section 3 of the paper). PSM is prefix, suffix, middle; SPM, with probability `fim_spm_rate`, the paper's
variant of it that can be learned beside PSM:

    PSM  <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM  <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle

The end token of the document stays last. An example may hold several documents; to keep its length, and every token of
the text in it, one of them is rearranged, the longer the likelier, as it comes: what it has outside the example is not
seen. Cuts fall between tokens. Inputs and loss are those of causal_lm.py, all tokens counting.
"""

import numpy as np

from lmjax.config import Config
from lmjax.objectives.causal_lm import loss
from lmjax.objectives.prefix_lm import runs
from lmjax.objectives.recipe import Recipe, padded, text_of

__all__ = ["SPECIAL_TOKENS", "loss", "make_example", "text_len"]

SPECIAL_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def text_len(config: Config) -> int:
  """Returns the tokens of text in an example."""
  return config.data.seq_len - len(SPECIAL_TOKENS)


def make_example(example: dict[str, np.ndarray], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a packed example of length T with one document rearranged, or none, and padded."""
  rng, T = np.random.default_rng(key), recipe.seq_len
  real, targets = example["weights"] > 0, text_of(example)
  inputs = example["inputs"][real]
  segments = example["segment_ids"][real] if "segment_ids" in example else None
  if rng.random() < recipe.cfg.fim_rate:
    # Where nothing else tells documents apart, one goes on to its end token.
    documents = segments if segments is not None else np.cumsum(np.append(0, targets[:-1] == recipe.eos_id))
    place = int(rng.integers(len(targets)))
    start, stop = next(run for run in runs(documents) if run[0] <= place < run[1])
    body = stop - int(targets[stop - 1] == recipe.eos_id)
    made = np.concatenate([rearranged(rng, targets[start:body], recipe), targets[body:stop]])
    targets = np.concatenate([targets[:start], made, targets[stop:]])
    inputs = np.concatenate([inputs[:start + 1], made[:-1], inputs[stop:]])
    if segments is not None:
      segments = np.insert(segments, start, [segments[start]] * len(SPECIAL_TOKENS))
  row = {"inputs": padded(inputs, T), "targets": padded(targets, T),
         "weights": padded(np.ones(len(targets)), T, np.float32)}
  if segments is not None:
    places = np.concatenate([np.arange(stop - start) for start, stop in runs(segments)])
    row |= {"segment_ids": padded(segments, T), "positions": padded(places, T)}
  return row


def rearranged(rng: np.random.Generator, text: np.ndarray, recipe: Recipe) -> np.ndarray:
  """Returns a text cut in three and put together in another order, three tokens longer."""
  first, second = np.sort(rng.integers(len(text) + 1, size=2))
  prefix, middle, suffix = text[:first], text[first:second], text[second:]
  before, after, between = ([recipe.special[name]] for name in SPECIAL_TOKENS)
  if rng.random() < recipe.cfg.fim_spm_rate:
    return np.concatenate([before, after, suffix, between, prefix, middle])
  return np.concatenate([before, prefix, after, suffix, between, middle])
