"""Tests of laying out runs: the formulas, what stays within what, and what a wrong request is told."""

import dataclasses

import numpy as np
import pytest

from lmjax import metrics, objectives
from lmjax.config import base_config, from_config_dict, resolve_durations, resolve_model
from lmjax.config_checks import UserError
from lmjax.models import families
from lmjax.scaling import isoflop
from lmjax.scaling.isoflop import Rules, lay_out


def experiment(**model):
  config = base_config()
  config.model.update({**families.llama_style(), "num_layers": 4, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2,
                       "mlp_dim": 176, **model})
  config.data.seq_len = 64
  config.train.update(num_steps=100, batch_size=8)
  return from_config_dict(config)


def as_run(config, run):
  """Returns the resolved config of a run, made as a sweep makes it."""
  groups = {}
  for name, value in run.settings.items():
    group, key = name.split(".")
    groups.setdefault(group, {})[key] = value
  config = dataclasses.replace(
      config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()})
  return resolve_durations(resolve_model(config, 256), 10 ** 6)


def test_one_dial_makes_the_shape():
  runs = lay_out(experiment(), 256, depths=(1, 4, 8), rules=Rules(aspect=20))
  assert [(run.depth, run.width, run.heads) for run in runs] == [(1, 16, 1), (4, 80, 5), (8, 160, 10)]
  # Two heads a key and value head, where that divides; an MLP of 2.75 widths, in whole heads of 16.
  assert [run.settings["model.num_kv_heads"] for run in runs] == [1, 1, 5]
  assert [run.settings["model.mlp_dim"] for run in runs] == [48, 224, 448]
  assert [run.settings["model.head_dim"] for run in runs] == [16] * 3
  own = lay_out(experiment(), 256, depths=(4,))[0]
  assert (own.width, own.heads, own.settings["model.mlp_dim"]) == (64, 4, 176)  # The experiment's own shape.


@pytest.mark.parametrize("model", [{}, {"attention_window": 16, "attention_pattern": ("local", "global")},
                                   {"num_experts": 4, "expert_dim": 64}])
def test_what_is_laid_out_is_what_a_run_counts(model):
  config = experiment(**model)
  for run in lay_out(config, 256, budgets=(2e12,), rules=Rules(sizes=3)):
    made = as_run(config, run)
    tokens = made.train.num_steps * made.train.batch_size * 64
    assert (made.model.num_layers, tokens) == (run.depth, run.num_tokens)
    assert run.train_flops == tokens * metrics.flops_per_token(made.model, 64)
    assert isoflop._count(made.model) == (run.num_params, run.num_params_non_embedding)
    one_step = made.train.batch_size * 64 * metrics.flops_per_token(made.model, 64)
    assert run.budget - one_step < run.train_flops <= run.budget


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_is_laid_out_is_what_an_objective_costs(family):
  """Logits of hidden tokens alone, and a decoder that writes less than its encoder reads."""
  config = base_config()
  config.model.update(families.debug(families.preset(family)))
  config.objective.update(families.objective_of(config.model))
  config.data.seq_len = 64
  config.train.update(num_steps=100, batch_size=8)
  config = from_config_dict(config)
  run, = lay_out(config, 256, budgets=(2e13,), rules=Rules(sizes=1), depths=(2,))
  made = as_run(config, run)
  assert run.train_flops == run.num_tokens * objectives.flops_per_token(made)
  assert objectives.flops_per_token(made) < 0.9 * metrics.flops_per_token(made.model, 64)


def test_sizes_lie_around_twenty_tokens_a_parameter():
  for budget in (1e13, 1e14):
    runs = lay_out(experiment(), 256, budgets=(budget,))
    ratio = np.array([run.num_tokens / run.num_params for run in runs])
    sizes = np.array([run.num_params for run in runs])
    assert len(runs) == 5 and (np.diff(sizes) > 0).all()
    best = 2
    assert 10 < ratio[best] < 40  # A layer more doubles the size of such a small model.
    np.testing.assert_allclose([sizes[4] / sizes[2], sizes[2] / sizes[0]], 3, rtol=0.5)


def test_a_fitted_law_moves_the_best_size():
  law = {"form": "chinchilla", "E": 1.0, "A": 400.0, "alpha": 0.34, "B": 400.0, "beta": 0.28,
         "conventions": {"N": "column num_params"}}
  config, budget = experiment(), 1e13
  center = lambda runs: np.exp(np.mean(np.log([run.num_params for run in runs])))
  at = lambda law: center(lay_out(config, 256, budgets=(budget,), rules=Rules(sizes=1), law=law))
  # Under C = 6 N D the best size is G (C / 6)^a; the cost of attention moves it a little.
  a, g = 0.28 / 0.62, (0.34 / 0.28) ** (1 / 0.62)
  assert at(law) == pytest.approx(g * (budget / 6) ** a, rel=0.35)
  assert at({**law, "A": 4000.0}) > 5 * at(law)


def test_depths_alone_are_trained_as_long_as_is_best():
  for run in lay_out(experiment(), 256, depths=(2, 4), rules=Rules(tokens_per_param=50)):
    assert run.budget is None and run.num_tokens / run.num_params == pytest.approx(50, rel=0.02)


def test_depths_at_budgets_are_a_grid():
  runs = lay_out(experiment(), 256, budgets=(1e12, 2e12), depths=(2, 3))
  assert [(run.budget, run.depth) for run in runs] == [(1e12, 2), (1e12, 3), (2e12, 2), (2e12, 3)]


def test_batch_and_rate_follow_the_formulas():
  rules = Rules(batch="step_law", rate="step_law", batch_multiple=2, batch_scale=0.5, rate_scale=0.1, sizes=1)
  run, = lay_out(experiment(), 256, budgets=(1e14,), rules=rules)
  d, n = run.num_tokens, run.num_params_non_embedding
  assert run.batch_size % 2 == 0 and run.batch_size * 64 == pytest.approx(0.5 * 0.58 * d ** 0.571, abs=64)
  assert run.learning_rate == pytest.approx(0.1 * 1.79 * n ** -0.713 * d ** 0.307, rel=2e-3)
  assert run.settings["optim.warmup_steps"] == round(0.05 * run.num_steps)
  own, = lay_out(experiment(), 256, budgets=(1e14,), rules=Rules(batch="own", rate="own", sizes=1))
  assert (own.batch_size, own.learning_rate) == (8, 1e-3)
  narrow, wide = lay_out(experiment(), 256, depths=(2, 8), rules=Rules(batch="own", rate="width"))
  assert narrow.learning_rate == pytest.approx(2e-3) and wide.learning_rate == pytest.approx(5e-4)
  moved, = lay_out(experiment(), 256, depths=(8,), rules=Rules(batch="own", batch_scale=4, rate="transfer"))
  assert moved.learning_rate == pytest.approx(2e-3)


def test_deepseeks_compute_is_without_logits():
  run, = lay_out(experiment(), 2560, budgets=(1e14,), rules=Rules(batch="deepseek", rate="deepseek", sizes=1))
  settings, D, L = run.settings, run.width, run.depth
  heads = 2 * D * 16 * (run.heads + settings["model.num_kv_heads"])
  each = L * (6 * (heads + 3 * D * settings["model.mlp_dim"]) + 6 * 65 * D)  # Each query sees 32.5 keys of 64.
  assert run.learning_rate == pytest.approx(0.3118 * (run.num_tokens * each) ** -0.1250, rel=2e-3)
  assert run.batch_size * 64 == pytest.approx(0.2920 * (run.num_tokens * each) ** 0.3271, abs=64)


def test_the_total_keeps_the_smallest_budgets():
  whole = lay_out(experiment(), 256, budgets=(1e13, 2e13, 4e13), rules=Rules(sizes=2))
  cost = [sum(run.train_flops for run in whole if run.budget == budget) for budget in (1e13, 2e13, 4e13)]
  cut = lay_out(experiment(), 256, budgets=(1e13, 2e13, 4e13), rules=Rules(sizes=2), total=cost[0] + cost[1])
  assert {run.budget for run in cut} == {1e13, 2e13} and sum(run.train_flops for run in cut) <= cost[0] + cost[1]
  with pytest.raises(UserError, match=r"--total is 1e\+13 FLOPs, but the runs of the first budget alone cost"):
    lay_out(experiment(), 256, budgets=(1e13, 2e13), total=1e13)


@pytest.mark.parametrize("given, told", [
    ({}, r"needs --budgets .* or --depths"),
    ({"budgets": (2e13, 1e13)}, r"--budgets has 1e\+13 after 2e\+13; give each once, the smaller first"),
    ({"depths": (2, 2)}, r"--depths has 2 after 2"),
    ({"budgets": (-1e13,)}, r"--budgets has -1e\+13, but each must be a finite number above 0"),
    ({"budgets": (1e9,)}, r"The budget 1e\+09 is too small for the smallest model of this family, one layer of [\d,]+ "
     r"parameters, which wants [\d.e+]+ FLOPs"),
    ({"budgets": (1e8,), "depths": (4,)}, r"The budget 1e\+08 gives the model of 4 layers [\d,]+ tokens, fewer than "
     r"two steps of \d+ sequences of 64"),
    ({"budgets": (1e40,)}, r"more than 1024 layers; give a smaller budget, or a larger --aspect"),
    ({"budgets": (1e13,), "total": 0.0}, r"--total is 0, but it must be a finite number above 0"),
    ({"budgets": (1e13,), "rules": Rules(batch="step")}, r"--batch is 'step', which is no rule; did you mean"),
    ({"budgets": (1e13,), "rules": Rules(rate="mup")}, r"--rate is 'mup', which is no rule; known are"),
    ({"budgets": (1e13,), "rules": Rules(span=1.0)}, r"--span is 1, but the outermost sizes must differ"),
    ({"budgets": (1e13,), "rules": Rules(sizes=0)}, r"--sizes is 0"),
    ({"budgets": (1e13,), "rules": Rules(aspect=-1.0)}, r"--aspect is -1, but"),
    ({"budgets": (1e13,), "rules": Rules(warmup_fraction=1.0)}, r"--warmup_fraction is 1, but"),
    ({"budgets": (1e13,), "law": {"form": "compute"}}, r"has the form 'compute', which does not tell size from tokens"),
    ({"budgets": (1e13,), "law": {"form": "shared", "conventions": {"N": "column width"}}}, r"counts N by 'width'"),
])
def test_a_wrong_request_is_one_sentence(given, told):
  with pytest.raises(UserError, match=told):
    lay_out(experiment(), 256, **given)


def test_an_electra_is_refused():
  config = base_config()
  config.model.update(families.electra_pretraining("small"))
  config.objective.name = "replaced_tokens"
  config.train.num_steps = 10
  with pytest.raises(UserError, match="cannot lay out ELECTRA"):
    lay_out(from_config_dict(config), 256, budgets=(1e13,))
