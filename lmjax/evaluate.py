"""Evaluation on named sets, in the training loop and afterwards."""

import dataclasses
from typing import Any, Iterator

from etils import epath
from flax import linen as nn
import jax
import numpy as np

from lmjax import checkpoint, metrics, objectives, partitioning
from lmjax import config as config_lib
from lmjax.config import Config, MeshConfig
from lmjax.config_checks import UserError, check_objective, nearest
from lmjax.models.transformer import init_params, make_model


class Evaluator:
  """Yields (name, value) for every set, such as ("validation/loss", 2.1)."""

  def __init__(self, model: Any, objective: Any, config: Config, mesh: jax.sharding.Mesh, data: Any):
    self._config, self._mesh, self._data, self._objective = config, mesh, data, objective
    self._sums = jax.jit(lambda params, batch: objective.loss(model, params, batch, config.objective)[1],
                         out_shardings=partitioning.replicated(mesh))

  def __call__(self, params: Any, num_batches: int | None) -> Iterator[tuple[str, float]]:
    """Evaluates every set.

    Args:
      params: parameters, on any mesh.
      num_batches: of each set, spread evenly over it; None means all.
    """
    for name, token_set in self._data.eval_sets.items():
      sums = self._over(params, token_set, num_batches)
      whole = self._config.objective.name == "causal_lm"  # Others leave some of the text out of their loss.
      per_byte = token_set.num_tokens / token_set.num_bytes if whole else None
      for key, value in metrics.evaluation(sums, per_byte).items():
        yield f"{name}/{key}", value

  def _over(self, params: Any, token_set: Any, num_batches: int | None) -> dict[str, np.ndarray]:
    from lmjax.data import pipeline  # Imports grain, which training on other batches does without.
    config = self._config
    size = config_lib.eval_batch_size(config)
    make_example = objectives.host_function(config, self._data.tokenizer, token_set)
    batches = pipeline.eval_batches(token_set, config, batch_size=size, num_batches=num_batches,
                                    make_example=make_example, rows=partitioning.process_rows(self._mesh, size))
    total = None
    with partitioning.use_mesh(self._mesh):
      for batch in batches:
        sums = self._sums(params, partitioning.global_batch(self._mesh, batch, size))
        # Over a large set, float32 would lose digits.
        sums = {k: np.float64(v) for k, v in jax.device_get(sums).items()}
        total = sums if total is None else {k: total[k] + v for k, v in sums.items()}
    return total


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
  data = pipeline.open_data(config, *objectives.text_needs(config))
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
  shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed),
                        partitioning.param_shardings(mesh, boxed))
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
