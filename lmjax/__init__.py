"""lmjax: language-model research in JAX and Flax.

The public surface; each name is imported when it is first used, so that `import lmjax` costs nothing.

  model, params = lmjax.load(PATH)                  a Hugging Face folder or the workdir of a run
  tokenizer = lmjax.load_tokenizer(PATH)
  lmjax.generate(model, params, prompts, ...)       lists of token ids
  lmjax.save_hf(model, params, PATH)
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load": "lmjax.convert",
    "save_hf": "lmjax.convert",
    "load_tokenizer": "lmjax.convert",
    "generate": "lmjax.generation",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module 'lmjax' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
  return sorted([*globals(), *_HOMES])
