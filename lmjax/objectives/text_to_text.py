"""Text to text: write a text after reading another, such as its translation, summary or label.

(Sutskever et al. 2014, arXiv 1409.3215; Raffel et al. 2019, arXiv 1910.10683, section 2.4.) An encoder-decoder reads
the one and writes the other after `Recipe.start_id`; a decoder reads both joined, and only the second counts. Both
texts begin and end as the tokenizer says: T5 writes `text </s>` after <pad>, BART `<s> text </s>` after </s>. The loss
is the mean cross-entropy of the written tokens.

Tasks of labels are written in words, as T5 has them: a text begins with the name of the task and names its columns, and
what is written is the name of the label, a number in steps of 0.2, or the answer. With objective.task_weights
lambda_t, the loss is the sum over tasks of lambda_t times the mean over the task's tokens in the batch.
"""

import math
import re
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import scores
from lmjax.config import Config, ObjectiveConfig
from lmjax.data.answers import find_answers
from lmjax.data.task import Task, label_in, number_in, parse_task, render
from lmjax.data.task_specs import TASKS
from lmjax.generation import decode_prompts
from lmjax.generation.sampling import Sampler
from lmjax.objectives.cross_entropy import cross_entropy, loss_options
from lmjax.objectives.labelled import task_of, texts
from lmjax.objectives.recipe import Recipe, padded

NO_ANSWER = "unanswerable"


def make_example(example: dict[str, Any], key: tuple[int, int], recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns a row of an encoder-decoder or a decoder, with the numbers of its example and its task.

  Returns:
    `inputs`, `targets`, `weights` and `segment_ids` [T] of what is written, or of a decoder's texts joined;
    `encoder_inputs` and `encoder_segment_ids` [S] of what is read, or `prompts` [T], right-aligned, and
    `prompt_lengths` [] for a decoder to go on from; `number` and `task` [].
  """
  task = task_of(example, recipe)
  source = source_text(task, texts(example, _templates(task), key, recipe))
  written = recipe.tokenizer.encode(target_text(task, example))
  numbers = {"number": np.int32(example["number"]), "task": np.int32(example["task"])}
  if recipe.model.architecture == "decoder":
    return _joined(source, written, task, recipe) | numbers
  read = recipe.framer.frame(source).ids
  length = target_length(task, recipe.seq_len)
  target = np.array([*[*recipe.opening, *written][:length - 1], recipe.eos_id])
  longest, ones = max(target_length(other, recipe.seq_len) for other in recipe.tasks), np.ones(len(target))
  return numbers | {
      "encoder_inputs": padded(read, recipe.seq_len), "encoder_segment_ids": padded(np.ones(len(read)), recipe.seq_len),
      "inputs": padded([recipe.start_id, *target[:-1]], longest), "targets": padded(target, longest),
      "weights": padded(ones, longest, np.float32), "segment_ids": padded(ones, longest)}


def decoder_len(config: Config) -> int:
  """Returns the tokens of the decoder's row."""
  return max(target_length(parse_task(entry, TASKS), config.data.seq_len) for entry in config.data.tasks)


def target_length(task: Task, seq_len: int) -> int:
  """Returns the tokens of a written text at most, its end included."""
  return min(task.max_target_tokens or seq_len, seq_len)


def _joined(source: str, written: list[int], task: Task, recipe: Recipe) -> dict[str, np.ndarray]:
  """Returns the row of a decoder; where both do not fit, what is read loses its end, but keeps half of the row."""
  T = recipe.seq_len
  read = recipe.tokenizer.encode(source if source[-1:].isspace() else f"{source}\n", add_special_tokens=True)
  room = max(T + 1 - min(len(written) + 1, target_length(task, T)), T // 2)
  read = read[:room]
  target = [*written, recipe.eos_id][:min(T + 1 - len(read), target_length(task, T))]
  tokens, prompt = np.array([*read, *target]), np.zeros(T, np.int32)
  prompt[T - len(read):] = read
  count = len(tokens) - 1
  weights = padded((np.arange(count) >= len(read) - 1).astype(np.float32), T, np.float32)
  return {"inputs": padded(tokens[:-1], T), "targets": padded(tokens[1:], T), "weights": weights,
          "segment_ids": padded(np.ones(count), T), "prompts": prompt, "prompt_lengths": np.int32(len(read))}


def _templates(task: Task) -> tuple[str, ...]:
  return tuple(filter(None, (task.text, task.text_pair, *task.choices)))


def source_text(task: Task, made: list[str]) -> str:
  """Returns what the model reads of a task's texts: joined, those of a task of labels with what they are called."""
  if task.kind == "text_to_text":
    return (task.prefix or "") + " ".join(made)
  parts = [re.fullmatch(r"\{([^{}]+)\}", template) for template in _templates(task)]
  names = [part[1] if part else f"sentence{number}" for number, part in enumerate(parts, 1)]
  prefix = f"{task.name.rpartition('/')[2]} " if task.prefix is None else task.prefix
  return prefix + " ".join(f"{name}: {text}" for name, text in zip(names, made))


def target_text(task: Task, example: dict[str, Any]) -> str:
  """Returns what the model is to write."""
  record, where = example["record"], example["where"]
  if task.kind == "text_to_text":
    return render(task.target, record, where)
  if task.kind == "extractive_qa":
    answers = find_answers(task, record, where)
    return answers[0].text if answers else NO_ANSWER
  if task.kind == "regression":
    return f"{round(number_in(task, record, where) * 5) / 5:.1f}"
  return _names(task)[label_in(task, record, where)]


def _names(task: Task) -> tuple[str, ...]:
  return task.labels or tuple(f"choice{number + 1}" for number in range(len(task.choices)))


def loss(model: Any, params: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig,
         rngs: dict[str, jax.Array] | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the loss over a batch; args and returns as in causal_lm.py, of batches that `make_example` makes."""
  read = (batch["encoder_inputs"],) if "encoder_inputs" in batch else ()
  segments = dict(encoder_segment_ids_BS=batch["encoder_segment_ids"], decoder_segment_ids_BT=batch["segment_ids"]
                  ) if read else dict(segment_ids_BT=batch["segment_ids"])
  x_BTD, w_VD, bias_V = model.apply({"params": params}, *read, batch["inputs"], **segments, rngs=rngs,
                                    method="features_and_output")
  total, sums = cross_entropy(x_BTD, w_VD, batch["targets"], batch["weights"], loss_options(cfg, model.cfg), bias_V)
  if "counts" in batch:  # Its weights were scaled by the task; what to divide by is not.
    sums = {"loss": sums["loss"], "weight": jnp.sum(batch["counts"])}
  return total, sums


def balance(batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Scales the weights of a whole batch by objective.task_weights, so that each task counts by its mean."""
  if not cfg.task_weights:
    return batch
  weights, of_rows = batch["weights"], jnp.sum(batch["weights"], axis=1)
  of_tasks = jnp.stack([jnp.sum(of_rows * (batch["task"] == number)) for number in range(len(cfg.task_weights))])
  scale = jnp.asarray(cfg.task_weights) * jnp.sum(weights) / jnp.maximum(of_tasks, 1e-9)
  return {**batch, "weights": weights * scale[batch["task"]][:, None], "counts": weights}


def predict(model: Any, params: Any, batch: dict[str, jax.Array], task: Task, recipe: Recipe) -> dict[str, jax.Array]:
  """Returns the likeliest text token by token, `tokens` [B, target length] with the end and what follows it."""
  reads = "encoder_inputs" in batch
  prompts = batch["encoder_inputs"] if reads else batch["prompts"]
  lengths = jnp.sum(batch["encoder_segment_ids"], axis=1) if reads else batch["prompt_lengths"]
  return {"tokens": decode_prompts(
      model, params, prompts, jnp.maximum(lengths, 1), target_length(task, recipe.seq_len), Sampler(temperature=0.0), 0,
      recipe.eos_id, recipe.tokenizer.size, recipe.start_id)}


def written_bytes(task: Task, examples: list[dict[str, Any]], recipe: Recipe) -> int:
  """Returns the UTF-8 bytes of what the model is to write of some examples, as far as it fits."""
  length = target_length(task, recipe.seq_len) - 1 - len(recipe.opening)
  ids = recipe.tokenizer.encode_batch([target_text(task, example) for example in examples])
  return sum(len(recipe.tokenizer.decode(some[:length]).encode()) for some in ids)


def score(task: Task, examples: list[dict[str, Any]], predictions: Mapping[str, np.ndarray],
          recipe: Recipe) -> dict[str, float]:
  """Returns the metrics of what was written: those of the labels where the task has labels."""
  written = [recipe.tokenizer.decode(_text(row, recipe)).strip() for row in predictions["tokens"]]
  if task.kind == "extractive_qa":
    answers = [[answer.text for answer in find_answers(task, example["record"], example["where"])]
               for example in examples]
    return scores.scores(task.measured, ["" if text == NO_ANSWER else text for text in written], answers)
  if task.kind == "regression":
    true = [number_in(task, example["record"], example["where"]) for example in examples]
    return scores.scores(task.measured, [_number(text) for text in written], true)
  if task.kind in ("classification", "multiple_choice"):
    # As they come out of a tokenizer, which may have them in lower case.
    names = [recipe.tokenizer.decode(recipe.tokenizer.encode(name)).strip() for name in _names(task)]
    true = [label_in(task, example["record"], example["where"]) for example in examples]
    # What is no label counts as a wrong one.
    wrong = [(label + 1) % len(names) for label in true]
    guessed = [names.index(text) if text in names else other for text, other in zip(written, wrong)]
    return scores.scores(task.measured, guessed, true)
  return scores.scores(task.measured, written, [target_text(task, example).strip() for example in examples])


def _text(row: np.ndarray, recipe: Recipe) -> list[int]:
  """Returns the tokens that were written, without those that stand around a text."""
  written = row[:[*np.flatnonzero(row == recipe.eos_id), len(row)][0]].tolist()
  return recipe.tokenizer.without_opening(written)


def _number(text: str) -> float:
  try:
    number = float(text)
  except ValueError:
    return 0.0
  return number if math.isfinite(number) else 0.0
