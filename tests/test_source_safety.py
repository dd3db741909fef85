"""No pickle, no code or shell line made from what a user gives: read from the sources themselves."""

import ast
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = sorted(path for folder in ("lmjax", "launch", "experiments") for path in (ROOT / folder).rglob("*.py"))
SHELL = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "tests").rglob("*.sh"), ROOT / ".ci" / "run"])
# It reads pickles by a subclass of the unpickler that looks no name up; what it may use of the module stands here.
UNPICKLER = ROOT / "lmjax" / "convert" / "torch_pickle.py"
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "commands", "pty"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execl", "os.execv", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load", "torch.load", "subprocess.getoutput", "subprocess.getstatusoutput"}


def wrong_in(source):
  """Returns (line, what) for each thing that a source must not do."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names if alias.name.partition(".")[0] in MODULES]
    elif isinstance(node, ast.ImportFrom):
      module = node.module or ""
      found += [(node.lineno, module)] * (module.partition(".")[0] in MODULES)
      found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names if f"{module}.{alias.name}" in CALLS]
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      # `model.eval()`, a method, is not the builtin; `os.system` is known by its full name.
      found += [(node.lineno, name)] * (name in CALLS)
      for keyword in node.keywords:
        if keyword.arg in ("shell", "allow_pickle") and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
          found.append((node.lineno, f"{name}({keyword.arg}=...)"))
  return found


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_runs_no_code_but_its_own(path):
  found = wrong_in(path.read_text())
  assert [what for _, what in found] == (["pickle"] if path == UNPICKLER else [])


def test_the_one_unpickler_uses_the_class_and_nothing_else_of_the_module():
  tree = ast.parse(UNPICKLER.read_text())
  (unpickler,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases
                  and ast.unparse(node.bases[0]).startswith("pickle.")]
  assert ast.unparse(unpickler.bases[0]) == "pickle.Unpickler"
  assert {"find_class", "persistent_load"} <= {node.name for node in unpickler.body if hasattr(node, "name")}
  uses = [ast.unparse(node) for node in ast.walk(tree)
          if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
  assert uses == ["pickle.Unpickler"]
  # Nor does it look a name up by other means.
  names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  assert not {"getattr", "import_module", "globals"} & names
  super_calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)
                 and ast.unparse(node.func).startswith("super()")}
  assert super_calls == {"super().__init__"}


@pytest.mark.parametrize("source, what", [
    ("import pickle", "pickle"), ("from pickle import loads", "pickle"), ("import os\nos.system('ls')", "os.system"),
    ("from os import system", "os.system"), ("eval('1')", "eval"), ("exec(code)", "exec"),
    ("subprocess.run(f'ls {x}', shell=True)", "subprocess.run(shell=...)"), ("yaml.load(f)", "yaml.load"),
    ("np.load(path, allow_pickle=True)", "np.load(allow_pickle=...)"), ("torch.load(path)", "torch.load"),
    ("def f():\n  import dill as d", "dill"), ("run(x, shell=wanted)", "run(shell=...)")])
def test_the_check_sees(source, what):
  assert [found for _, found in wrong_in(source)] == [what]


def test_the_check_lets_pass():
  assert wrong_in("model.eval()\nnp.load(p, allow_pickle=False)\nre.compile('a')\nimport os\nos.replace(a, b)") == []


def unquoted(text):
  """Returns the words of shell lines that expand a variable outside quotes, where a space in it would split it."""
  text = re.sub(r"<<'(\w+)'.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)  # A text for another program.
  found = []
  for line in text.splitlines():
    line = re.sub(r"(^|\s)#.*", "", line)
    line = re.sub(r"\[\[.*?\]\]|\(\(.*?\)\)|\bcase \S+ in\b", "", line)  # Where the shell does not split.
    line = re.sub(r"'[^']*'", "", line)
    while (shorter := re.sub(r'"(?:[^"$\\]|\\.|\$(?!\()|\$\((?:[^()"]|"[^"]*")*\))*"', "", line)) != line:
      line = shorter
    line = re.sub(r"^\s*(export |local )?[\w\[\]]+=\S*", "", line)  # Nor in an assignment.
    line = re.sub(r"\$\{\w+\[@\]\+\}", "", line)  # What was "${array[@]}" within ${array[@]+...}.
    found += re.findall(r"\$(?:\w+|\{[^}]*\}|[@*])", line)
  return found


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shell_script_is_valid_and_quotes_what_it_expands(path):
  text = path.read_text()
  assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
  assert re.search(r"^set -euo pipefail$", text, re.MULTILINE) or text.startswith("# Sourced by")
  assert unquoted(text) == []
  assert not re.search(r"\beval\b|\bsource <\(|curl[^\n]*\|\s*(ba)?sh", text)


def test_the_check_of_scripts_sees():
  assert unquoted("rm -r $folder") == ["$folder"]
  assert unquoted('python x.py "$a" $@ # $comment') == ["$@"]
  assert unquoted("run ${flags[@]}") == ["${flags[@]}"]
  assert unquoted('a=$b\nrun "$@" "${x}/y" \'$z\'\n[[ -n $q ]]\n') == []
  assert unquoted('run ${f[@]+"${f[@]}"}\ncat <<\'PY\'\nprint($x)\nPY') == []


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(path):
  done = subprocess.run(["shellcheck", "--shell=bash", "--external-sources", path], cwd=ROOT, capture_output=True,
                        text=True)
  assert done.stdout == ""
