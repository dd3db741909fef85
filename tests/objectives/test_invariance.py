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
# Those that have the loss of another.
SAME_LOSS = {
    "fill_in_the_middle": dict(family="llama", name="fill_in_the_middle"),
    "mixture_of_denoisers": dict(family="t5", seq_len=48, name="mixture_of_denoisers"),
}
_WORDS = ["red", "blue", "green", "old", "new", "cat", "dog", "house"]
_TEXTS = [" ".join(_WORDS[(i * 5 + j * (i + 3)) % 8] for j in range(2 + i % 5)) for i in range(40)]
_LABEL = dict(name="label", kind="classification", text="{text}", label="label")
_NAMES = dict(name="names", kind="token_classification", words="words", label="tags")
_FIND = dict(name="find", kind="extractive_qa", text="which", text_pair="{text}", answers="answer")
_WRITE = dict(name="write", kind="text_to_text", text="{text}", target="{target}", max_target_tokens=12)
_SCORE = dict(name="score", kind="regression", text="{text}", label="score")
_CHOOSE = dict(name="choose", kind="multiple_choice", text="{text}", choices=("{one}", "{other}"), label="label")
_TALK = dict(name="talk", kind="chat", messages="messages")
_ROWS = {
    "score": [dict(text=text, score=len(text) / 10) for text in _TEXTS],
    "choose": [dict(text=text, one=text[:3], other=text[-3:], label=i % 2) for i, text in enumerate(_TEXTS)],
    "talk": [dict(messages=[dict(role=role, content=content) for role, content in (
        ("user", text), ("assistant", text.split()[0]))]) for text in _TEXTS],
    "label": [dict(text=text, label=str(i % 3)) for i, text in enumerate(_TEXTS)],
    "names": [dict(words=text.split(), tags=[str(len(word) % 2) for word in text.split()]) for text in _TEXTS],
    "find": [dict(text=text, answer=text.split()[i % 2] if i % 3 else "") for i, text in enumerate(_TEXTS)],
    "write": [dict(text=text, target=" ".join(text.split()[:1 + i % 3])) for i, text in enumerate(_TEXTS)]}
LABELLED = {
    "multi_task": (("bert", dict(head="tasks")), (_LABEL, _NAMES, _FIND), dict(name="multi_task")),
    "weighted": (("bert", dict(head="tasks")), (_LABEL, _NAMES), dict(name="multi_task", task_weights=(2.0, 0.5))),
    "classification": (("bert", dict(head="sequence")), (_LABEL,), dict(name="classification", label_smoothing=0.1)),
    "regression": (("bert", dict(head="sequence")), (_SCORE,), dict(name="regression")),
    "extractive_qa": (("bert", dict(head="span")), (_FIND,), dict(name="extractive_qa")),
    "multiple_choice": (("bert", dict(head="choice", init_std=0.2)), (_CHOOSE,), dict(name="multiple_choice")),
    "chat": (("llama", {}), (_TALK,), dict(name="chat")),
    "token_classification": (("bert", dict(head="token")), (_NAMES,), dict(name="token_classification")),
    "text_to_text": (("t5", {}), (_WRITE, _LABEL), dict(name="text_to_text", task_weights=(1.0, 3.0))),
}
SPLITS = [(1, 2), (1, 4), (8, 2)]


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
  """Compiling is most of the time here, and optimising most of that."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=[
    *CASES, *LABELLED, *(pytest.param(name, marks=pytest.mark.slow) for name in SAME_LOSS)])
def case(request, task, labelled):
  """Returns an experiment, and a function from (devices, microbatches) to the gradients and what a step reports."""
  cases = CASES | SAME_LOSS
  if request.param in cases:
    made = task(**cases[request.param])
  else:
    family, tasks, objective = LABELLED[request.param]
    rows, seq_len = [_ROWS[one["name"]] for one in tasks], 96 if request.param == "chat" else 40
    made = labelled(family, tasks, rows, seq_len=seq_len, **objective)

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
  if made.config.objective.name in ("classification", "regression", "extractive_qa", "multiple_choice"):
    return  # Each row counts the same.
  batch = made.batch()
  weights = [value.reshape(len(value), -1).sum(axis=1) for name, value in batch.items() if name.endswith("weights")]
  assert len({*zip(*(sums.tolist() for sums in weights))}) > 1


def test_a_row_is_a_function_of_seed_and_place_alone(case):
  made, *_ = case
  for number in (0, 5):
    one, again = made.row(number), made.row(number)
    assert one.keys() == again.keys() and all(np.array_equal(one[name], again[name]) for name in one)
    shapes = {name: (value.shape, value.dtype) for name, value in one.items()}
    assert {name: (value.shape, value.dtype) for name, value in made.row(number + 7).items()} == shapes
