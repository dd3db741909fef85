"""Models by their name on the hub, from a cache as the hub's own library lays it out; nothing here has a network."""

import shutil

import jax
import numpy as np
import pytest

import lmjax
from lmjax import convert
from lmjax.config_checks import Refused, UserError

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Returns a function that puts a folder into the cache under a name."""
  monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

  def put(name, folder, revision="main"):
    root = tmp_path / "hub" / ("models--" + name.replace("/", "--"))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text("0" * 40)
    shutil.copytree(folder, root / "snapshots" / ("0" * 40), dirs_exist_ok=True)
  return put


def test_a_name_stands_for_the_folder_in_the_cache(cache, folder_of, tmp_path):
  _, folder = folder_of("llama_tied")
  cache("someone/small-llama", folder)
  for path in ("hf:someone/small-llama", "hf:someone/small-llama@main"):
    model, params = lmjax.load(path)
    expected = lmjax.load(folder)
    assert model.cfg == expected[0].cfg
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
  assert "Wrote" in convert.convert("hf:someone/small-llama", tmp_path / "run")


@pytest.mark.parametrize("path, kind, told", [
    ("hf:someone/other", Refused, "hf:someone/other could not be downloaded"),
    ("hf:a/b/c", UserError, "hf:a/b/c is not a name on the hub; give hf:OWNER/NAME"),
])
def test_what_cannot_be_had_is_one_sentence(cache, path, kind, told):
  with pytest.raises(kind) as error:
    lmjax.load(path)
  assert told in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")
