"""What the backward pass finds saved of a block, beside its input, and where; all else it makes again.

Layers name their results by `checkpoint_name`: a linear map's is called as its module is, and what softmax makes of the
values "attention" (`config_checks.REMAT_NAMES`). A policy is a choice among these names (Chen et al. 2016, arXiv
1604.06174); what lies in the host's memory comes back when the backward pass has need of it.
"""

from typing import Any, Callable

import jax

from lmjax.config import ModelConfig
from lmjax.config_checks import REMAT_NAMES
from lmjax.partitioning import HOST_MEMORY


def kept(cfg: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the names of the results that are saved in the device's memory, and in the host's.

  Args:
    cfg: with another remat_policy than none, which saves everything, named or not.
  """
  return {"products": (REMAT_NAMES, ()), "offload": ((), REMAT_NAMES), "attention": (("attention",), ()),
          "full": ((), ()), "names": (cfg.remat_save, cfg.remat_offload)}[cfg.remat_policy]


def policy(cfg: ModelConfig) -> Callable[..., Any]:
  """Returns what `jax.checkpoint` takes for a config's remat_policy, another than none."""
  save, offload = kept(cfg)
  by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=save, names_which_can_be_offloaded=offload, offload_src="device",
      offload_dst=HOST_MEMORY)
  attention = "attention" in (*save, *offload)

  def decide(primitive: Any, *args, **params) -> Any:
    # cuDNN's attention names none of its results, and its softmax sums are no output that could be named here. So they
    # stay on the device.
    fused = attention and primitive.name.startswith("dot_product_attention_fwd")
    return fused or by_name(primitive, *args, **params)

  return decide
