"""Which parameters learn when, by hand and in a real step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import loop, partitioning, train
from lmjax.config import MeshConfig, OptimConfig, UserError, base_config, from_config_dict, resolve_model
from lmjax.models import families
from lmjax.optim.gates import make_gates

AXES = {"embed": {"embedding": ("vocab", "embed")},
        "layers": {"mlp": {"up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}}},
        "final_norm": {"scale": ("norm",)}}
SHAPES = jax.tree.map(lambda names: jax.ShapeDtypeStruct([3 if name == "layers" else 2 for name in names], jnp.float32),
                      AXES, is_leaf=lambda x: isinstance(x, tuple))


def gates_at(step, **settings):
  gates = make_gates(OptimConfig(**settings), AXES, SHAPES)
  at = jax.jit(gates.at)(jnp.int32(step))
  mlp = at["layers"]["mlp"]["up"]
  assert mlp["kernel"].shape == (3, 1, 1) and mlp["bias"].shape == (3, 1)
  return [float(at["embed"]["embedding"]), *mlp["kernel"].ravel().tolist(), float(at["final_norm"]["scale"])], gates


def test_layers_decay_from_the_top():
  assert gates_at(0, layer_decay=0.5)[0] == [0.5 ** 4, 0.5 ** 3, 0.5 ** 2, 0.5, 1.0]


def test_the_first_pattern_says_from_when_on():
  policy = ((r"layers/2/", 0), (r"layers/1/", 10), (r"layers/", 20), (r"embed", -1))
  expected = {0: [0, 0, 0, 1, 1], 9: [0, 0, 0, 1, 1], 10: [0, 0, 1, 1, 1], 20: [0, 1, 1, 1, 1], 10**6: [0, 1, 1, 1, 1]}
  for step, gates in expected.items():
    assert gates_at(step, freeze_policy=policy)[0] == gates
  frozen = gates_at(0, freeze_policy=policy)[1].frozen
  assert frozen["embed"]["embedding"] and not frozen["layers"]["mlp"]["up"]["kernel"]
  assert gates_at(20, freeze_policy=policy, layer_decay=0.5)[0] == [0, 0.5 ** 3, 0.5 ** 2, 0.5, 1.0]


def test_nothing_asked_for_is_nothing_done():
  assert make_gates(OptimConfig(), AXES, SHAPES) is None


def test_a_pattern_that_matches_nothing_is_told():
  with pytest.raises(UserError, match="freeze_policy has the pattern 'layers/3/', which matches no parameter"):
    make_gates(OptimConfig(freeze_policy=((r"layers/3/", -1),)), AXES, SHAPES)


@pytest.mark.parametrize("entry, told", [
    (("a", -2), "the step must be a step, or -1"), (("a", 1.5), "the step must"), (("(", 0), "is not a"), ("a", "is")])
def test_a_wrong_policy_is_told(entry, told):
  config = base_config()
  config.train.num_steps, config.optim.freeze_policy = 1, (entry,)
  with pytest.raises(UserError, match="config.optim.freeze_policy has the entry .*" + told):
    from_config_dict(config)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free"])
def test_what_is_frozen_stays_and_is_not_in_the_norm(optimizer):
  def run(policy):
    config = base_config()
    config.model.update(families.debug(families.llama()))
    config.data.seq_len = 16
    config.optim.update(name=optimizer, schedule="constant", freeze_policy=policy, weight_decay=0.5, clip_norm=None)
    config.train.update(num_steps=4, batch_size=2)
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    setup = train.build(resolve_model(from_config_dict(config), 256), mesh)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 17)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((2, 16), np.float32)}
    hparams = {"learning_rate": np.float32(0.1), "weight_decay": np.float32(0.5), "seed": np.uint32(0)}
    with partitioning.use_mesh(mesh):
      state, step = train.init_state(setup), train.make_train_step(setup)
      states, norms = [jax.device_get(loop.eval_params(setup, state))], []
      for _ in range(3):
        state, out = step(state, batch, hparams)
        states.append(jax.device_get(setup.optimizer.eval_params(state.opt_state, state.params)))
        norms.append(float(out["grad_norm"]))
    return states, norms

  states, norms = run(((r"layers/0/", -1), (r"layers/1/", 2), (r"embed", -1)))
  _, free = run(())
  # Schedule-free goes between two copies of a parameter, which rounds.
  tolerance = 1e-6 if optimizer == "schedule_free" else 0
  same = lambda one, other: np.testing.assert_allclose(one, other, rtol=tolerance, atol=0)
  kernel = lambda step, layer: states[step]["layers"]["mlp"]["up"]["kernel"][layer]
  same(states[3]["embed"]["embedding"], states[0]["embed"]["embedding"])
  same(kernel(3, 0), kernel(0, 0))
  same(kernel(2, 1), kernel(0, 1))
  assert np.abs(kernel(3, 1) - kernel(2, 1)).max() > 1e-3
  assert np.abs(states[1]["final_norm"]["scale"] - states[0]["final_norm"]["scale"]).max() > 1e-3
  assert norms[0] < 0.9 * free[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free", "sophia"])
def test_what_is_frozen_has_no_state(optimizer):
  def held(policy):
    config = base_config()
    config.model.update(families.debug(families.llama()))
    config.data.seq_len = 16
    config.optim.update(name=optimizer, schedule="constant", freeze_policy=policy)
    config.train.update(num_steps=4, batch_size=2, ema_decay=0.9)
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = train.build(resolve_model(from_config_dict(config), 256), mesh).state_shapes
    leaves = jax.tree_util.tree_leaves_with_path((shapes.opt_state, shapes.ema))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

  every, some = held(()), held(((r"embed", -1), (r"attention/", -1)))
  frozen = {path for path in every if "/embed/" in path or "/attention/" in path}
  assert len(frozen) > 5 and some == {path: shape for path, shape in every.items() if path not in frozen}


def test_freezing_all_is_told():
  with pytest.raises(UserError, match="freeze_policy is .*, under which no parameter ever learns"):
    make_gates(OptimConfig(freeze_policy=(("", -1),)), AXES, SHAPES)
