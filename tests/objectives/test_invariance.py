"""Neither microbatches nor devices change what an objective's step does, whatever weighs how much in which row."""

import dataclasses

import jax
import numpy as np
import pytest

from lmjax import metrics, partitioning, train
from lmjax.config import MeshConfig

CASES = {
    "causal_lm": dict(family="llama"),
    "multi_token": dict(family=("llama", dict(num_future=3)), name="multi_token", future_weight=2.0),
    "masked_lm": dict(family=("bert", dict(head="lm", pooler="none")), name="masked_lm", mask_unit="word"),
    "span_corruption": dict(family="t5", name="span_corruption"),
    "prefix_lm": dict(family="llama", name="prefix_lm"),
    "sentence_pairs": dict(family="bert", name="masked_lm", sentence_pairs="next", sentence_weight=0.5),
    "replaced_tokens": dict(family=("electra_pretraining", dict(generator_fraction=0.5)), name="replaced_tokens",
                            mask_random=0.0, mask_same=0.15, replaced_weight=5.0),
    "permutation_lm": dict(family=("xlnet", dict(reverse_half=True, memory_len=20)), name="permutation_lm",
                           memory=True),
}
SPLITS = [(1, 2), (1, 4), (8, 2)]


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
  """Compiling is most of the time here, and optimising most of that."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=CASES)
def case(request, task):
  """Returns an experiment, and a function from (devices, microbatches) to the gradients and what a step reports."""
  made = task(**CASES[request.param])

  def step(devices, count):
    mesh = partitioning.make_mesh(
        MeshConfig(data=2, fsdp=2, tensor=2) if devices == 8 else MeshConfig(), jax.devices()[:devices])
    config = dataclasses.replace(made.config, train=dataclasses.replace(made.config.train, grad_accum_steps=count))
    setup = train.build(config, mesh)
    hparams = {"learning_rate": np.float32(1), "weight_decay": np.float32(0), "seed": np.uint32(3)}
    with partitioning.use_mesh(mesh):
      state = train.init_state(setup)
      before = jax.device_get(state.params)
      state, out = train.make_train_step(setup)(state, partitioning.global_batch(mesh, made.batch(), 8), hparams)
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params), jax.device_get(out)

  return made, step, step(1, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_changes_neither_gradients_nor_metrics(case, split):
  _, step, (expected, reported) = case
  grads, out = step(*split)
  assert out.keys() == reported.keys()
  for name, value in reported.items():
    assert float(out[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  assert metrics.count_params(grads) > 1e4 and scale > 1e-3
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, scale))


def test_weights_of_rows_differ(case):
  """Else a mean over microbatches would do."""
  made, *_ = case
  sums = made.batch()["weights"].sum(axis=1)
  assert len({*sums.tolist()}) > 2


def test_a_row_is_a_function_of_seed_and_place_alone(case):
  made, *_ = case
  for number in (0, 5):
    one, again = made.row(number), made.row(number)
    assert one.keys() == again.keys() and all(np.array_equal(one[name], again[name]) for name in one)
    shapes = {name: (value.shape, value.dtype) for name, value in one.items()}
    assert {name: (value.shape, value.dtype) for name, value in made.row(number + 7).items()} == shapes
