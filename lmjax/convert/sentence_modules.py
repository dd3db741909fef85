"""Folders of sentence-transformers: a model of transformers, and beside it what makes one vector of its features.

modules.json lists the steps. Done here are the mean over the real tokens and its scaling to length 1, which is what the
pooled head does (Reimers and Gurevych 2019, arXiv 1908.10084).
"""

import json
from typing import Any

from etils import epath

from lmjax.config_checks import UserError
from lmjax.convert.family import Family

CLASS = "SentenceTransformer"  # Among the classes of a family: the pooled head.
_LIST, _POOLING = "modules.json", "1_Pooling"
_STEPS = ("Transformer", "Pooling", "Normalize")


def described(path: epath.Path, hf: dict[str, Any]) -> dict[str, Any]:
  """Returns the config.json of a folder, as one of a sentence model where modules.json says that it is one.

  Raises:
    UserError: where its steps are others than those done here.
  """
  if not (path / _LIST).exists():
    return hf
  try:
    modules = json.loads((path / _LIST).read_text())
    steps = tuple(module["type"].rpartition(".")[2] for module in modules)
    pooling = json.loads((path / modules[1]["path"] / "config.json").read_text()) if steps[1:2] == ("Pooling",) else {}
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value]
  except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
    raise UserError(f"{path / _LIST} does not describe modules ({type(e).__name__}: {e}); put back a good copy.") from e
  if steps != _STEPS or modes != ["pooling_mode_mean_tokens"]:
    raise UserError(f"{path / _LIST} has the steps {', '.join(steps)} with {', '.join(modes) or 'no pooling'}, which "
                    f"lmjax does not do; it does {', '.join(_STEPS)} with pooling_mode_mean_tokens: remove {_LIST} to "
                    "have the model without them.")
  return {**hf, "architectures": [CLASS]}


def write_modules(folder: epath.Path, embed_dim: int) -> None:
  """Writes the steps of the pooled head."""
  paths = ("", _POOLING, "2_Normalize")
  modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{step}"}
             for i, (step, path) in enumerate(zip(_STEPS, paths))]
  (folder / _LIST).write_text(json.dumps(modules, indent=2) + "\n")
  (folder / _POOLING).mkdir()
  settings = {"word_embedding_dimension": embed_dim, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
              "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
  (folder / _POOLING / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def base_class(family: Family) -> str:
  """Returns the class of transformers that holds a sentence model's parameters."""
  return next(name for name, settings in family.architectures.items() if settings["head"] == "none")
