"""Evaluation on named sets, in the training loop and afterwards."""

import copy
import dataclasses
import math
from typing import Any, Iterator

from etils import epath
from flax import linen as nn
import jax
import numpy as np

from lmjax import checkpoint, metrics, objectives, partitioning, scores
from lmjax import config as config_lib
from lmjax.config import Config, MeshConfig
from lmjax.config_checks import UserError, check_objective, nearest
from lmjax.data.task import Task
from lmjax.models.transformer import init_params, make_model
from lmjax.workdir import read_labels


class Evaluator:
  """Yields (name, value) for every set, such as ("validation/loss", 2.1)."""

  def __init__(self, model: Any, objective: Any, config: Config, mesh: jax.sharding.Mesh, data: Any):
    self._model, self._objective, self._config, self._mesh, self._data = model, objective, config, mesh, data
    self._recipes = {name: objectives.recipe_of(config, data, texts) for name, texts in data.eval_sets.items()}
    one = partitioning.replicated(mesh)
    self._sums = jax.jit(lambda params, batch: objective.loss(model, params, batch, config.objective)[1],
                         out_shardings=one)
    self._predict = jax.jit(self._predictions, static_argnums=2, out_shardings=one)

  def of(self, config: Config) -> "Evaluator":
    """Returns the same for a run that differs in numbers only, with what is compiled."""
    other = copy.copy(self)
    other._config = config
    return other

  def __call__(self, params: Any, num_batches: int | None) -> Iterator[tuple[str, float]]:
    """Evaluates every set.

    Args:
      params: parameters, on any mesh.
      num_batches: of each set, spread evenly over it; None means all.
    """
    averaged = {}
    for name, examples in self._data.eval_sets.items():
      sums, predictions = self._over(params, name, examples, num_batches)
      values = metrics.evaluation(sums, self._tokens_per_byte(examples))
      if predictions:
        task = self._data.tasks[examples.indices[0]]
        values = self._of_task(task, values) | self._score(name, task, examples, predictions, sums)
        averaged[name] = scores.main_values(values)
      for key, value in values.items():
        yield f"{name}/{key}", value
    if len(averaged) > 1 and all(averaged.values()):
      yield "tasks/average", scores.glue_average(averaged)

  def _tokens_per_byte(self, examples: Any) -> float | None:
    # Others leave some of the text out of their loss, or put something in.
    whole = self._config.objective.name in ("causal_lm", "multi_token")
    return examples.num_tokens / examples.num_bytes if whole else None

  def _of_task(self, task: Task, values: dict[str, float]) -> dict[str, float]:
    """Returns the loss of one task, which with several heads is a term of the loss, and nothing that is no metric."""
    prefix = f"{task.name}_"
    own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)} or values
    kept = ("loss", "perplexity") if task.head == "lm" else ("loss",)
    return {name: own[name] for name in kept}

  def _score(self, name: str, task: Task, examples: Any, predictions: dict[str, np.ndarray],
             sums: dict[str, np.ndarray]) -> dict[str, float]:
    of, recipe = examples.examples(predictions.pop("number")), self._recipes[name]
    values = self._objective.score(task, of, predictions, recipe)
    if hasattr(self._objective, "written_bytes"):
      written = self._objective.written_bytes(task, of, recipe)
      values["bits_per_byte"] = float(sums["loss"]) / math.log(2) / max(written, 1)
    return values

  def _predictions(self, params: Any, batch: dict[str, jax.Array], task: Task) -> dict[str, jax.Array]:
    """Returns what is predicted of each row, its example's number and whether it is one."""
    recipe = next(iter(self._recipes.values()))  # All of them read and write alike.
    made = self._objective.predict(self._model, params, batch, task, recipe)
    real = batch["weights"].reshape(batch["weights"].shape[0], -1).sum(-1) > 0
    return {**made, "number": batch["number"], "real": real}

  def _over(self, params: Any, name: str, examples: Any,
            num_batches: int | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns sums over a set, and what is predicted of its examples where they are labelled."""
    from lmjax.data import pipeline  # Imports grain, which training on other batches does without.
    config = self._config
    size = config_lib.eval_batch_size(config)
    batches = pipeline.eval_batches(
        examples, config, batch_size=size, num_batches=num_batches, rows=partitioning.process_rows(self._mesh, size),
        make_example=objectives.host_function(self._recipes[name]))
    task = self._data.tasks[examples.indices[0]] if self._data.tasks else None
    total, predicted = None, []
    with partitioning.use_mesh(self._mesh):
      for batch in batches:
        batch = partitioning.global_batch(self._mesh, batch, size)
        # Over a large set, float32 would lose digits.
        sums = {k: np.float64(v) for k, v in jax.device_get(self._sums(params, batch)).items()}
        total = sums if total is None else {k: total[k] + v for k, v in sums.items()}
        if task and hasattr(self._objective, "score"):
          made = jax.device_get(self._predict(params, batch, task))
          real = made.pop("real")
          predicted.append({key: value[real] for key, value in made.items()})
    return total, {key: np.concatenate([made[key] for made in predicted]) for key in (predicted or [{}])[0]}


def evaluate_workdir(workdir: str, step: int | None = None, sets: list[str] | None = None) -> dict[str, float]:
  """Evaluates a run's checkpoint on the whole of its evaluation sets.

  Args:
    workdir: of a training run.
    step: which checkpoint; None means the newest.
    sets: names of evaluation sets; None means all.

  Returns:
    {"validation/loss": ..., ...}.

  Raises:
    UserError: where there is no such run, step or set.
  """
  from lmjax.data import pipeline
  config = read_config(workdir)
  check_objective(config)
  tokenizer = epath.Path(workdir) / "tokenizer.json"
  if tokenizer.exists():  # The one the model knows, whatever has become of the text it was trained on.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tokenizer)))
  data = pipeline.open_data(config, *objectives.text_needs(config), labels=read_labels(workdir))
  for name in sets or ():
    if name not in data.eval_sets:
      raise UserError(f"{workdir} has no evaluation set {name!r}{nearest(name, data.eval_sets)}")
  data = dataclasses.replace(data, eval_sets={k: v for k, v in data.eval_sets.items() if not sets or k in sets})
  try:
    mesh = partitioning.make_mesh(config.mesh)
  except UserError:  # It was trained on other hardware; what is here will do.
    mesh = partitioning.make_mesh(MeshConfig(data=1, fsdp=-1))
  partitioning.check_divisible(config, mesh)
  model = make_model(config.model)
  boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
  shapes = partitioning.laid_out(nn.unbox(boxed), partitioning.param_shardings(mesh, boxed))
  params = checkpoint.restore_params(workdir, shapes, step, prefer_ema=config.eval.use_ema)
  return dict(Evaluator(model, objectives.OBJECTIVES[config.objective.name], config, mesh, data)(params, None))


def read_config(workdir: str) -> Config:
  """Returns the config of a run.

  Raises:
    UserError: where the folder holds no run, or its config.json is damaged.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise UserError(f"{workdir} holds no run: it has no config.json; give the --workdir of a training run.")
  try:
    return config_lib.from_json(path.read_text())
  except ValueError as e:
    raise UserError(f"{path} is not valid JSON ({e}); put back the one that the run has written.") from e
  except UserError as e:
    raise UserError(f"{path} is not one that lmjax can read: {e}") from e
