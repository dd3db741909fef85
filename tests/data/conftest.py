"""Small sources, stores and configs for the data tests."""

import json

import numpy as np
import pytest

from lmjax.config import base_config, from_config_dict
from lmjax.data.token_store import TokenStore


@pytest.fixture
def make_config(tmp_path):
  """Returns a function from settings of the data group (and batch_size, seed, eval_sets) to a Config."""
  def make(*, batch_size=4, seed=0, eval_sets=("validation",), **data):
    config = base_config()
    config.train.num_steps = 1
    config.train.batch_size = batch_size
    config.seed = seed
    config.eval.sets = eval_sets
    config.data.cache_dir = str(tmp_path / "cache")
    for name, value in data.items():
      config.data[name] = value
    return from_config_dict(config)
  return make


@pytest.fixture
def make_store(tmp_path):
  """Returns a function from document lengths to a store whose token i is i + 100, ends of documents being 0."""
  def make(lengths):
    path = tmp_path / f"store{'_'.join(map(str, lengths[:20]))}"
    path.mkdir(exist_ok=True)
    ends = np.cumsum(lengths).astype(np.int64)
    tokens = np.arange(100, 100 + int(ends[-1]), dtype=np.uint32)
    tokens[ends - 1] = 0
    tokens.tofile(path / "tokens.bin")
    ends.tofile(path / "ends.bin")
    (path / "manifest.json").write_text(json.dumps({
        "format_version": 1, "source": "s", "tokenizer": "t", "split": "train", "dtype": "uint32",
        "num_tokens": len(tokens), "num_documents": len(lengths), "num_bytes": len(tokens)}))
    return TokenStore(path)
  return make
