"""Tests of the command line from outside: help, exit status, and what each command asks of the library."""

import ast
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

import lmjax
from lmjax.commands import cli
from lmjax.config import UserError

EXPERIMENT = """\
from lmjax.config import base_config
def get_config():
  c = base_config()
  c.train.num_steps = 10
  return c
"""
CONTRACT = {"train", "eval", "generate", "convert", "plan", "sweep", "report", "data", "fit", "isoflop", "coordcheck"}
# Where lmjax lies, for programs that are started in another folder.
SOURCE = str(pathlib.Path(lmjax.__file__).parent.parent)


@pytest.fixture
def library(monkeypatch):
  """Returns a function that puts a module with one function in place of a part of lmjax, and records its calls."""
  def put(name, function, result=None):
    calls = []

    def record(*args, **kwargs):
      calls.append((args, kwargs))
      if isinstance(result, BaseException):
        raise result
      return result
    module = types.ModuleType(f"lmjax.{name}")
    setattr(module, function, record)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parent, _, leaf = module.__name__.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), leaf, module, raising=False)
    return calls
  return put


@pytest.fixture
def config(tmp_path):
  (tmp_path / "exp.py").write_text(EXPERIMENT)
  return f"--config={tmp_path / 'exp.py'}"


def test_help_lists_every_command_of_the_contract(capsys):
  assert cli.run(["--help"]) == 0
  out = capsys.readouterr().out
  assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} == CONTRACT
  assert all(len(line) <= 120 for line in out.splitlines())


def test_no_command_prints_the_help_and_fails(capsys):
  assert cli.run([]) == 2
  assert "usage: lmjax COMMAND" in capsys.readouterr().out


def test_every_file_is_a_command_or_shared():
  files = {path.stem for path in pathlib.Path(cli.__file__).parent.glob("*.py")}
  assert files == {*cli.COMMANDS, "__init__", "cli", "experiment", "help_text"}
  assert {*cli.COMMANDS} == CONTRACT


@pytest.mark.parametrize("command", sorted(CONTRACT))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_each_command(command, flag, capsys):
  assert cli.run([command, flag]) == 0
  out, err = capsys.readouterr()
  assert out.startswith(f"lmjax {command}: ") and not err
  assert all(len(line) <= 120 for line in out.splitlines())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_every_flag_and_examples_can_be_read(command, capsys):
  cli.run([command, "--help"])
  out = capsys.readouterr().out
  module = __import__(f"lmjax.commands.{command}", fromlist=["_"])
  for name in module.REQUIRED:
    assert f"--{name}=" in out
  assert out.count("Required.") == len(module.REQUIRED)
  assert f"  lmjax {command} " in module.__doc__


def test_help_of_the_settings(capsys):
  assert cli.run(["train", "--help_config"]) == 0
  out = capsys.readouterr().out
  assert "--config.optim.learning_rate=0.001" in out and "--config.seed=0" in out


@pytest.mark.parametrize("argv, message", [
    (["trian"], "lmjax has no command 'trian'; did you mean 'train'?"),
    (["train", "--workdr=a"], "lmjax train has no flag --workdr; did you mean 'workdir'?"),
    (["train", "--workdir=a"], "lmjax train needs --config: "),
    (["report"], "lmjax report needs --workdir: "),
    (["generate", "--workdir=a"], "lmjax generate needs --prompt: "),
    (["eval", "--workdir=a", "--step=soon"], "lmjax eval cannot read its flags: flag --step=soon"),
    (["eval", "--workdir"], "cannot read its flags (Missing value for flag --workdir); lmjax eval --help lists them."),
    (["train", "experiments/quickstart.py"], "does not know what to do with 'experiments/quickstart.py'"),
    (["report", "a", "b"], "does not know what to do with 'b'"),
    (["generate", "a", "--prompt=x", "--num_samples=0"], "--num_samples is 0, but it must be at least 1."),
])
def test_a_wrong_request_is_one_sentence_and_2(argv, message, capsys):
  assert cli.run(argv) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith("lmjax: error: ") and message in err and err.count("\n") == 1


def test_train(library, config):
  calls = library("train", "train_and_evaluate", {"status": "finished"})
  assert cli.run(["train", config, "--workdir=w", "--config.seed=3"]) == 0
  [((experiment, workdir, profile), _)] = calls
  assert experiment.train.num_steps == 10 and experiment.seed == 3 and workdir == "w" and profile is None


def test_eval_prints_a_table_and_json(library, capsys):
  calls = library("evaluate", "evaluate_workdir", {"validation/loss": 2.5, "validation/accuracy": 0.4})
  assert cli.run(["eval", "w", "--step=5", "--sets=validation,train"]) == 0
  assert calls == [(("w",), {"step": 5, "sets": ["validation", "train"]})]
  lines = capsys.readouterr().out.splitlines()
  assert lines[:2] == ["validation/loss      2.5", "validation/accuracy  0.4"]
  assert json.loads(lines[2]) == {"validation/loss": 2.5, "validation/accuracy": 0.4}


def test_convert_prints_what_was_done(library, capsys):
  calls = library("convert", "convert", "Wrote b.")
  assert cli.run(["convert", "--source=a", "--target=b"]) == 0
  assert calls == [(("a", "b"), {"adapter": False})] and capsys.readouterr().out == "Wrote b.\n"


def test_data_prints_a_table(library, config, capsys):
  library("data.pipeline", "describe", {"tokenizer size": 4096, "sets": {"train": {"tokens": 1234567, "share": 0.5}},
                                        "sample": "a\nb"})
  assert cli.run(["data", config]) == 0
  assert capsys.readouterr().out.splitlines() == [
      "tokenizer size  4,096", "sets", "  train", "    tokens  1,234,567", "    share   0.5", "sample", "  | a",
      "  | b"]


def test_report_prints_the_path(library, capsys):
  library("report", "write_report", "w/report.html")
  assert cli.run(["report", "--workdir=w"]) == 0
  assert capsys.readouterr().out == "w/report.html\n"


class Letters:
  """A tokenizer whose tokens are letters; 0 ends a text."""
  eos_id, size = 0, 128

  def encode(self, text, add_special_tokens=False):
    return [ord(c) for c in text] + [0] * add_special_tokens

  def decode(self, tokens):
    return "".join(map(chr, tokens))


@pytest.fixture
def model(monkeypatch):
  calls = []

  def generate(model, params, prompts, **options):
    calls.append((model.cfg.architecture, params, prompts, options))
    return [[ord("x")]] * len(prompts)
  loaded = types.SimpleNamespace(cfg=types.SimpleNamespace(architecture="decoder"))
  monkeypatch.setattr(lmjax, "load", lambda path: (loaded, f"params of {path}"), raising=False)
  monkeypatch.setattr(lmjax, "load_tokenizer", lambda path: Letters(), raising=False)
  monkeypatch.setattr(lmjax, "generate", generate, raising=False)
  monkeypatch.setattr("lmjax.convert.sees_both_sides", lambda path: path == "prefix")
  return calls


def test_generate(model, capsys):
  assert cli.run(["generate", "w", "--prompt=ab", "--top_k=5", "--temperature=0.5", "--seed=7"]) == 0
  assert model == [("decoder", "params of w", [[97, 98]], {
      "max_new_tokens": 128, "temperature": 0.5, "top_k": 5, "top_p": 1.0, "seed": 7, "eos_id": 0,
      "vocab_size": 128, "decoder_start_token_id": None, "both_sides": False})]
  assert capsys.readouterr().out == "abx\n"
  assert cli.run(["generate", "prefix", "--prompt=ab"]) == 0
  assert model[-1][3]["both_sides"]


def test_generate_several(model, capsys):
  assert cli.run(["generate", "--workdir=w", "--prompt=a", "--num_samples=2"]) == 0
  assert model[0][2] == [[97], [97]]
  assert capsys.readouterr().out == "--- 1 ---\nax\n--- 2 ---\nax\n"


def test_an_empty_prompt_starts_from_the_end_of_a_text(model, capsys):
  assert cli.run(["generate", "w", "--prompt="]) == 0
  assert model[0][2] == [[0]] and capsys.readouterr().out == "x\n"


@pytest.mark.parametrize("error, status, message", [
    (UserError("Say it better."), 2, "lmjax: error: Say it better.\n"),
    (RuntimeError("a\n  b"), 1, "lmjax: error: RuntimeError: a b (run again with --debug for the traceback)\n"),
    (KeyboardInterrupt(), 130, ""),
])
def test_errors_of_the_library(library, capsys, error, status, message):
  library("report", "write_report", error)
  assert cli.run(["report", "--workdir=w"]) == status
  assert capsys.readouterr() == ("", message)


def test_debug_shows_the_traceback(library, capsys):
  library("report", "write_report", UserError("Say it better."))
  assert cli.run(["report", "--workdir=w", "--debug"]) == 2
  err = capsys.readouterr().err
  assert "Traceback" in err and err.endswith("lmjax: error: Say it better.\n")


def test_as_a_program_from_any_folder(tmp_path):
  done = subprocess.run([sys.executable, "-m", "lmjax", "report", "--workdir=nowhere"], cwd=tmp_path, timeout=60,
                        env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "lmjax: error: There is no folder nowhere; give the --workdir of a run or a sweep.\n"


def test_a_reader_that_stops_early_is_no_error():
  done = subprocess.run(f"{sys.executable} -m lmjax train --help_config | head -n 1", shell=True, timeout=60,
                        env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True)
  assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_no_command_imports_the_library_before_it_is_run():
  for name in cli.COMMANDS:
    tree = ast.parse((pathlib.Path(cli.__file__).parent / f"{name}.py").read_text())
    tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {node.module for node in tops if isinstance(node, ast.ImportFrom)}
    assert modules <= {"absl", "typing", "lmjax.commands", "lmjax.config"}
