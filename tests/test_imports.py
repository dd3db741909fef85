"""Tests that imports run downwards, and that importing the library stays light."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import lmjax

ROOT = pathlib.Path(lmjax.__file__).parent
LAYERS = (
    ("config_checks",),
    ("config",),
    ("partitioning", "parametrization", "workdir"),
    ("metrics", "records", "scores", "tracking", "models", "data", "optim"),
    ("objectives", "generation", "convert", "checkpoint", "scaling"),
    ("train", "loop", "stack", "evaluate", "finetune", "plan", "resume", "interrupt", "memory", "watch", "peers"),
    ("sweeps",),
    ("report",),
    ("commands",),
    ("__init__", "__main__"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# Siblings here know nothing of each other; further up they may, where no circle comes of it.
SEPARATE = LAYERS[3]
HEAVY = ("grain", "tensorflow_datasets", "tokenizers", "matplotlib", "optuna", "torch", "transformers", "wandb",
         "trackio", "pyarrow", "tensorboardX", "sklearn", "sacrebleu", "rouge_score", "seqeval", "jinja2")


def part_of(path):
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(source):
  """Returns the parts of lmjax that a source imports, anywhere in it, and every other package's name."""
  parts, packages = set(), set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are written out in full"
      names = [f"lmjax.{alias.name}" for alias in node.names] if node.module == "lmjax" else [node.module]
    else:
      continue
    for name in names:
      if name.startswith("lmjax."):
        parts.add(name.split(".")[1])
      else:
        packages.add(name.split(".")[0])
  return parts, packages


def edges():
  """Yields (file, its part, a part it imports)."""
  for path in sorted(ROOT.rglob("*.py")):
    part = part_of(path)
    for other in sorted(imported_parts(path.read_text())[0] & LEVEL.keys() - {part}):
      yield path, part, other


def test_every_part_has_its_layer():
  found = {part_of(path) for path in ROOT.rglob("*.py")}
  assert found <= LEVEL.keys(), "a new part needs a place in LAYERS"


def test_every_folder_is_a_package():
  folders = {path.parent for path in ROOT.rglob("*.py")}
  assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_imports_run_downwards():
  wrong = [f"{path} imports lmjax.{other}" for path, part, other in edges()
           if LEVEL[other] > LEVEL[part] or (LEVEL[other] == LEVEL[part] and part in SEPARATE)]
  assert wrong == []


def test_no_circles_between_parts():
  needs = {}
  for _, part, other in edges():
    needs.setdefault(part, set()).add(other)
  while needs:
    free = {part for part, others in needs.items() if not others & needs.keys()}
    assert free, f"these import each other: {sorted(needs)}"
    needs = {part: others for part, others in needs.items() if part not in free}


def test_the_library_knows_no_experiment_launcher_or_test():
  wrong = [str(path) for path in ROOT.rglob("*.py")
           if imported_parts(path.read_text())[1] & {"experiments", "launch", "tests"}]
  assert wrong == []


def test_the_check_itself_sees_imports_of_every_form():
  source = "import lmjax.data.packing\nfrom lmjax import train as t, __version__\ndef f():\n  from lmjax.optim import a"
  assert imported_parts(source) == ({"data", "train", "__version__", "optim"}, set())
  assert imported_parts("import jax.numpy\nfrom experiments import x") == (set(), {"jax", "experiments"})


def loaded_by(statement):
  """Returns the top-level packages that a fresh interpreter has loaded after a statement."""
  code = f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return set(done.stdout.split())


@pytest.mark.skipif(not importlib.util.find_spec("lmjax.train"), reason="lmjax.train is missing")
def test_train_loads_nothing_heavy():
  assert loaded_by("import lmjax.train") & set(HEAVY) == set()


@pytest.mark.parametrize("module", ["lmjax", "lmjax.config", "lmjax.tracking", "lmjax.report", "lmjax.commands.cli"])
def test_what_needs_no_accelerator_loads_no_jax(module):
  assert loaded_by(f"import {module}") & {"jax", *HEAVY} == set()


def test_public_names_are_listed_and_typos_are_told():
  assert {"load", "save_hf", "generate", "load_tokenizer"} <= set(dir(lmjax))
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    lmjax.lod  # noqa: B018
