"""An optimizer whose moments live in the host's memory (Rajbhandari et al. 2021, ZeRO-Infinity, arXiv 2104.07857).

A parameter's moments come to the device when it is updated, and go back before those of the next come: asked for
together all come at once, and the device needs as much memory as if they had stayed. The compiler still fetches some
ahead where it finds room.
"""

from typing import Any, Callable

import flax.traverse_util
import jax
import jax.numpy as jnp

from lmjax.optim.gates import split
from lmjax.optim.optimizer import Optimizer
from lmjax.partitioning import HOST_MEMORY, platform


def on_host(shapes: Any, shardings: Any) -> Any:
  """Returns the shardings of an optimizer's state, with those of moments in the host's memory."""
  place = lambda x, sharding: sharding.with_memory_kind(HOST_MEMORY) if _is_moment(x) else sharding
  return jax.tree.map(place, shapes, shardings)


def in_turn(make: Callable[[Any], Optimizer], params: Any, frozen: Any | None) -> Optimizer:
  """Returns an optimizer whose state `on_host` has placed, and that updates one parameter after another.

  Args:
    make: frozen -> the optimizer of the others, which must treat each parameter for itself.
    params: the parameters, or their shapes.
    frozen: tree of booleans, which of them never learn; None where all do.
  """
  whole, flat = make(frozen), flax.traverse_util.flatten_dict
  learned = list(flat(split(params, frozen)[0]))

  def update(grads, state, params, hparams, loss_fn, accept=True):
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    # The first wait for what is known when all gradients are.
    old, new, before = dict(leaves), {}, accept
    for path in learned:
      others = flax.traverse_util.unflatten_dict({key: key != path for key in flat(params)})
      alone, part = make(others), lambda tree, path=path: flax.traverse_util.unflatten_dict({path: flat(tree)[path]})
      paths, form = jax.tree_util.tree_flatten_with_path(jax.eval_shape(alone.init, params))
      mine = form.unflatten([old[where] for where, _ in paths])
      if platform() != "cpu":  # There the host's memory is the device's, and waiting would only round otherwise.
        mine, _ = jax.lax.optimization_barrier((mine, before))
      own = {name: part(value) if name == "gates" else value for name, value in hparams.items()}
      params, mine = alone.update(part(grads), _moved(mine, jax.memory.Space.Device), params, own, loss_fn, accept)
      mine = before = _moved(mine, jax.memory.Space.Host)
      new.update(jax.tree_util.tree_leaves_with_path(mine))
    return params, structure.unflatten([new[where] for where, _ in leaves])

  return Optimizer(whole.init, update, whole.eval_params)


def _is_moment(x: Any) -> bool:
  return x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _moved(state: Any, space: jax.memory.Space) -> Any:
  return jax.tree.map(lambda x: jax.device_put(x, space) if _is_moment(x) else x, state)
