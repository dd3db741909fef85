"""Objectives: a module each, with `make_example` for the host and `loss` for the device."""

from types import ModuleType

from lmjax.config_checks import UserError
from lmjax.objectives import causal_lm

OBJECTIVES = {"causal_lm": causal_lm}


def get_objective(name: str) -> ModuleType:
  """Returns the module of an objective.

  Raises:
    UserError: for "none".
  """
  if name not in OBJECTIVES:
    raise UserError(f"config.objective.name is {name}, by which no model is trained or evaluated; set it to one of "
                    f"{', '.join(OBJECTIVES)}.")
  return OBJECTIVES[name]
