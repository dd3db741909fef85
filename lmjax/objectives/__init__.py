"""Objectives: a module each, with `make_example` for the host and `loss` for the device.

A module may also say how much text an example takes (`text_len`), which special tokens it needs (`SPECIAL_TOKENS`, or
`special_tokens` where that depends on the settings), how the weights of a whole batch make its terms count (`balance`),
and at how many places of an example it predicts (`num_places`), or how many tokens its decoder writes (`decoder_len`),
where these are not all. Those that learn from labelled tasks also say what they predict of a batch and how good that is
(`predict`, `score`).
"""

import dataclasses
import functools
from typing import Any, Callable, Sequence

import jax

from lmjax import metrics, scores
from lmjax.config import Config, ObjectiveConfig
from lmjax.config_checks import UserError, nearest
from lmjax.data import augment, frames
from lmjax.data.task import Task, parse_task
from lmjax.data.task_specs import TASKS
from lmjax.objectives import (
  causal_lm,
  chat,
  classification,
  extractive_qa,
  fill_in_the_middle,
  masked_lm,
  mixture_of_denoisers,
  multi_task,
  multi_token,
  multiple_choice,
  permutation_lm,
  prefix_lm,
  regression,
  replaced_tokens,
  span_corruption,
  text_to_text,
  token_classification,
)
from lmjax.objectives.recipe import Recipe, make_recipe

OBJECTIVES = {
    "causal_lm": causal_lm, "multi_token": multi_token, "prefix_lm": prefix_lm,
    "fill_in_the_middle": fill_in_the_middle, "masked_lm": masked_lm, "replaced_tokens": replaced_tokens,
    "permutation_lm": permutation_lm, "span_corruption": span_corruption,
    "mixture_of_denoisers": mixture_of_denoisers, "classification": classification, "regression": regression,
    "token_classification": token_classification, "extractive_qa": extractive_qa, "multiple_choice": multiple_choice,
    "text_to_text": text_to_text, "chat": chat, "multi_task": multi_task}

# Kinds of tasks that can be written as text.
_AS_TEXT = ("text_to_text", "classification", "regression", "extractive_qa", "multiple_choice")


# Metrics that each kind of task can be measured by.
_MEASURES = {"classification": ("accuracy", "f1", "f1_macro", "matthews"), "regression": ("pearson", "spearman"),
             "token_classification": ("accuracy", "f1_macro", "matthews", "span_f1"), "extractive_qa": ("squad",),
             "multiple_choice": ("accuracy", "f1", "f1_macro", "matthews"),
             "text_to_text": ("exact_match", "accuracy", "f1_macro", "matthews", "bleu", "chrf", "rouge"), "chat": ()}


def text_needs(config: Config) -> tuple[int, Sequence[str]]:
  """Returns the tokens of text in an example and the special tokens that an experiment's objective needs.

  Raises:
    UserError: for a task that the objective does not learn.
  """
  check_tasks(config)
  return _text_needs(config)


def _text_needs(config: Config) -> tuple[int, Sequence[str]]:
  module = OBJECTIVES[config.objective.name]
  if config.data.tasks and config.model.architecture == "encoder":
    return config.data.seq_len, frames.SPECIAL_TOKENS
  text_len = module.text_len(config) if hasattr(module, "text_len") else config.data.seq_len
  if hasattr(module, "special_tokens"):
    return text_len, module.special_tokens(config)
  return text_len, getattr(module, "SPECIAL_TOKENS", ())


def recipe_of(config: Config, data: Any, texts: Any, training: bool = False) -> Recipe:
  """Returns how examples of the set `texts` of a `lmjax.data.pipeline.Data` become rows."""
  return make_recipe(config, data.tokenizer, _text_needs(config)[1], texts, data.tasks, training)


def host_function(recipe: Recipe) -> Callable[..., dict]:
  """Returns the objective's (example, key) -> row of a batch."""
  return functools.partial(OBJECTIVES[recipe.cfg.name].make_example, recipe=recipe)


def check_tasks(config: Config) -> None:
  """Raises a UserError for a task of a kind that the objective does not learn."""
  name = config.objective.name
  able = {"text_to_text": _AS_TEXT, "multi_task": tuple(multi_task.KINDS)}.get(name, (name,))
  for task in (parse_task(entry, TASKS) for entry in config.data.tasks):
    if task.kind not in able:
      raise UserError(f"config.objective.name is {name}, but the task {task.name!r} of config.data.tasks is of kind "
                      f"{task.kind}; set the objective to {task.kind}, or name tasks of kind {' or '.join(able)}.")
    for metric in task.metrics:
      if metric not in scores.SCORES:
        raise UserError(f"The task {task.name!r} of config.data.tasks has no metric {metric!r}"
                        f"{nearest(metric, scores.SCORES)}")
      if metric not in (fitting := _MEASURES[task.kind]):
        raise UserError(f"The task {task.name!r} of config.data.tasks has the metric {metric!r}, but those of kind "
                        f"{task.kind} are {', '.join(fitting) or 'none'}; name others, or leave metrics out.")
  if config.objective.task_weights and name not in ("text_to_text", "multi_task"):
    raise UserError(f"config.objective.task_weights is {config.objective.task_weights}, which config.objective.name = "
                    f"{name} does not read; set it to (), and config.data.weights to mix tasks otherwise.")
  if config.objective.label_smoothing and name in ("regression", "extractive_qa"):
    raise UserError(f"config.objective.label_smoothing is {config.objective.label_smoothing}, but "
                    f"config.objective.name = {name} has no labels to spread it over; set it to 0.")
  if name not in ("text_to_text", "multi_task", "chat") and len(config.data.tasks) > 1:
    raise UserError(f"config.objective.name is {name}, which learns one task, but config.data.tasks has "
                    f"{len(config.data.tasks)}; set it to multi_task, with config.model.head tasks.")
  if name not in ("classification", "regression", "multiple_choice", "text_to_text") and augment.is_on(config.data):
    raise UserError(f"config.data.augment_replace or the like changes words, which config.objective.name = {name} "
                    "cannot bear; set it to 0.")


def with_heads(config: Config, tasks: Sequence[Task]) -> Config:
  """Returns the config whose model has the heads that its tasks need.

  Raises:
    UserError: where another number of labels is set.
  """
  if not tasks:
    return config
  model, needed = config.model, tasks[0].num_labels
  if config.objective.name == "multi_task":
    heads = tuple((task.name, task.head, task.num_labels) for task in tasks)
    return dataclasses.replace(config, model=dataclasses.replace(model, task_heads=heads))
  if tasks[0].head in ("sequence", "token") and model.head != "lm":
    if model.num_labels not in (None, needed):
      raise UserError(f"config.model.num_labels is {model.num_labels}, but the task {tasks[0].name!r} has {needed}; "
                      f"set it to {needed}, or leave it None.")
    return dataclasses.replace(config, model=dataclasses.replace(model, num_labels=needed))
  return config


def flops_per_token(config: Config) -> float:
  """Returns the FLOPs of training on one of an example's data.seq_len tokens, of what the objective makes of it.

  They are those of `metrics.flops_per_token`, but that only what is predicted has logits, a decoder writes fewer tokens
  than its encoder reads, and each answer of a multiple choice is read with the text.

  Args:
    config: with sizes resolved.
  """
  module, T = OBJECTIVES[config.objective.name], config.data.seq_len
  if config.model.architecture == "encoder_decoder" and hasattr(module, "decoder_len"):
    return metrics.flops_per_example(config.model, T, module.decoder_len(config)) / T
  predicted = module.num_places(config.objective, T) / T if hasattr(module, "num_places") else None
  rows = max([1, *(len(parse_task(entry, TASKS).choices) for entry in config.data.tasks)])
  return (rows if module is multiple_choice else 1) * metrics.flops_per_token(config.model, T, predicted)


def linear_flops_per_token(config: Config) -> float:
  """Returns the part of `flops_per_token` that is in the linear maps of the blocks."""
  module, T = OBJECTIVES[config.objective.name], config.data.seq_len
  written = module.decoder_len(config) / T if hasattr(module, "decoder_len") else 1.0
  return metrics.linear_flops_per_token(config.model, written)


def balance(module: Any, batch: dict[str, jax.Array], cfg: ObjectiveConfig) -> dict[str, jax.Array]:
  """Returns a whole batch whose weights make each term of the loss count as it should, however it is then split."""
  return module.balance(batch, cfg) if hasattr(module, "balance") else batch
