"""Instruction tuning: write the assistant's messages of a chat, given all before them (Ouyang et al. 2022, 2203.02155).

A chat is rendered by the model's chat template, and only tokens of the assistant's messages count, the token that ends
each included. The template is that of the tokenizer's folder (chat_template.jinja, or chat_template in
tokenizer_config.json); without one it is

    <|im_start|>ROLE
    CONTENT<|im_end|>

for each message. A chat that does not fit into data.seq_len loses its end.
"""

from typing import Any

import jax
import numpy as np

from lmjax.config import Config, ObjectiveConfig
from lmjax.data.chat import SPECIAL_TOKENS, answers_in, has_template
from lmjax.data.task_sets import messages_of
from lmjax.objectives import causal_lm
from lmjax.objectives.labelled import task_of
from lmjax.objectives.recipe import Recipe, padded


def special_tokens(config: Config) -> tuple[str, ...]:
  """Returns those of the template that is used where there is none."""
  return () if has_template(config.data.tokenizer) else SPECIAL_TOKENS


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row: `inputs`, `targets`, `weights` and `segment_ids` [T], and the numbers of its example and task."""
  del key  # Nothing is drawn.
  messages = messages_of(task_of(example, recipe), example["record"], example["where"])
  text, answers = answers_in(messages, recipe.chat_template, recipe.tokenizer.names_of_special(),
                             example["where"])
  tokens, is_answer = recipe.tokenizer.encode_spans(text, answers)
  T, count = recipe.seq_len, min(len(tokens) - 1, recipe.seq_len)
  cut = slice(1, count + 1)
  return {"inputs": padded(tokens[:count], T), "targets": padded(tokens[cut], T),
          "weights": padded(is_answer[cut].astype(np.float32), T, np.float32),
          "segment_ids": padded(np.ones(count), T), "number": np.int32(example["number"]),
          "task": np.int32(example["task"])}


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch; args and returns as in causal_lm.py, of batches that `make_example` makes."""
  return causal_lm.loss(model, params, batch, cfg, rngs)
