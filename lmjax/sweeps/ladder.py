"""A sweep of the runs that `lmjax isoflop` lays out."""

from typing import Any, Mapping, Sequence

import ml_collections

from lmjax.config import Config, from_config_dict
from lmjax.plan.batches import vocab_size
from lmjax.scaling import isoflop
from lmjax.sweeps.space import Chain, chain, grid


def lay_out(config: Config, budgets: Sequence[float] = (), depths: Sequence[int] = (),
            rules: isoflop.Rules = isoflop.Rules(), total: float | None = None,
            law: Mapping[str, Any] | None = None) -> list[isoflop.Run]:
  """Lays out runs of an experiment, with the vocabulary of its tokenizer; see `lmjax.scaling.isoflop.lay_out`."""
  return isoflop.lay_out(config, vocab_size(config), budgets, depths, rules, total, law)


def ladder(config: ml_collections.ConfigDict, budgets: Sequence[float] = (), depths: Sequence[int] = (), *,
           total: float | None = None, **rules: Any) -> Chain:
  """Returns the space of the runs that `lmjax isoflop` lays out for an experiment.

  Args:
    config: the experiment.
    budgets: FLOPs, rising.
    depths: rising.
    total: FLOPs that all runs together may cost.
    **rules: of `isoflop.Rules`.
  """
  runs = lay_out(from_config_dict(config), budgets, depths, isoflop.Rules(**rules), total)
  return chain(*(grid({name: [value] for name, value in run.settings.items()}) for run in runs))
