"""Sweeps: many variants of an experiment, each a normal run.

An experiment file describes one by `get_sweep()`, beside `get_config()`:

    from lmjax.sweeps import Sweep, grid

    def get_sweep():
      return Sweep(grid({"optim.learning_rate": [1e-3, 3e-3], "model.num_layers": [2, 4]}))
"""

from lmjax.sweeps.space import chain, conditional, grid, integer, log_uniform, product, uniform, values, zipped
from lmjax.sweeps.sweep import Sweep

__all__ = ["Sweep", "chain", "conditional", "grid", "integer", "log_uniform", "product", "uniform", "values", "zipped"]
