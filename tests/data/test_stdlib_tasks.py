import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from lmjax.config import DataConfig, UserError
from lmjax.data.stdlib_source import StdlibSource
from lmjax.data.stdlib_tasks import KINDS, PACKAGES, STDLIB_TASKS, stdlib_records

FIELDS = {"docstrings": {"code", "summary", "name"}, "packages": {"text", "package"},
          "identifiers": {"tokens", "kinds"}, "answers": {"question", "context", "answers", "starts"}}

TINY = '''\
import os.path as p


class Box(Base, metaclass=Meta):

  async def get(self, key, *rest, size: int = 10, **more):
    """Return the value of a key.

    More of it.
    """
    if size > 3:
      raise KeyError("no key é")
    return await self.items[key].read(size, mode=f"{size}")  # why

def odd(): "A docstring that shares a line"
'''
GET = '''\
async def get(self, key, *rest, size: int = 10, **more):
  if size > 3:
    raise KeyError("no key é")
  return await self.items[key].read(size, mode=f"{size}")  # why'''
IDENTIFIERS = """
import keyword, os import, . operator, path import, as keyword, p import,
class keyword, Box class, ( operator, Base variable, COMMA operator, metaclass argument, = operator, Meta variable,
) operator, : operator,
async keyword, def keyword, get function, ( operator, self parameter, COMMA operator, key parameter, COMMA operator,
* operator, rest parameter, COMMA operator, size parameter, : operator, int variable, = operator, 10 number,
COMMA operator, ** operator, more parameter, ) operator, : operator,
\"""...\""" string,
if keyword, size variable, > operator, 3 number, : operator"""


@pytest.fixture
def tiny(tmp_path):
  (tmp_path / "email").mkdir()
  (tmp_path / "email" / "box.py").write_text(TINY)
  (tmp_path / "old.py").write_text("print 'no longer in order'\n")
  return tmp_path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """A folder of eighty modules, each with functions of its own."""
  root = tmp_path_factory.mktemp("library")
  (root / "xml").mkdir()
  for i in range(80):
    functions = "".join(
        f'def read_{i}_{j}(left_{i}, right_{j}={j}):\n  """Reads number {j} of module {i}."""\n'
        f"  return join_{i}(left_{i}, right_{j})\n\n" for j in range(12))
    (root / ("xml" if i % 2 else ".") / f"m{i}.py").write_text(functions)
  return root


def test_docstrings_of_a_tiny_file(tiny):
  assert stdlib_records("docstrings", "train", 0.0, tiny) == [
      {"code": GET, "summary": "Return the value of a key.", "name": "Box.get"}]


def test_packages_of_a_tiny_file(tiny):
  assert stdlib_records("packages", "train", 0.0, tiny) == [{"text": TINY.rstrip("\n") + "\n", "package": "email"}]


def test_identifiers_of_a_tiny_file(tiny):
  pairs = [pair.split() for pair in IDENTIFIERS.replace("\n", " ").split(", ")]
  expected = {"tokens": [token.replace("COMMA", ",") for token, _ in pairs], "kinds": [kind for _, kind in pairs]}
  assert stdlib_records("identifiers", "train", 0.0, tiny) == [expected]


@pytest.mark.parametrize("line, kinds", [
    ("from . import a; b = c.d.e(f, g=h)(i=j)",
     "keyword operator keyword import operator variable operator variable operator attribute operator method operator "
     "variable operator argument operator variable operator operator argument operator variable operator"),
    ("raise A('x y', B, c=1) from d",
     "keyword call operator string operator variable operator argument operator number operator keyword variable"),
    ("def f(a, /, b=g(c, d=2), *, e: {1: h} = i ** j) -> k: yield from l",
     "keyword function operator parameter operator operator operator parameter operator call operator variable "
     "operator argument operator number operator operator operator operator parameter operator operator number "
     "operator variable operator operator variable operator variable operator operator variable operator keyword "
     "keyword variable"),
    ("x = f'{a:{b}} c' 'a b' r'very_long_string_of_more_than_thirty' + 'short'",
     "variable operator string string string operator string"),
])
def test_kinds_of_tokens(tmp_path, line, kinds):
  padding = "; ".join(["n"] * 10)
  (tmp_path / "a.py").write_text(f"{line}\n{padding}\n{padding}\n{padding}\n")
  (record,) = stdlib_records("identifiers", "train", 0.0, tmp_path)
  count = len(kinds.split())
  assert " ".join(record["kinds"][:count]) == kinds
  assert record["tokens"][count:count + 3] == ["n", ";", "n"]


def test_strings_are_shortened_the_same_in_every_python(tmp_path):
  padding = "; ".join(["n"] * 20)
  (tmp_path / "a.py").write_text(
      f"x = f'{{a:{{b}}}} c' 'a b' r'very_long_string_of_more_than_thirty' 'short'\n{padding}\n")
  (record,) = stdlib_records("identifiers", "train", 0.0, tmp_path)
  assert record["tokens"][:6] == ["x", "=", "f'...'", "'...'", "r'...'", "'short'"]


def test_answers_of_a_tiny_file(tiny):
  assert stdlib_records("answers", "train", 0.0, tiny) == [
      {"question": "What is the default of size?", "context": GET, "answers": ["10"], "starts": [44]},
      {"question": "What does it raise?", "context": GET, "answers": ["KeyError"], "starts": [82]}]


def test_every_question_about_a_function(tmp_path):
  """What it calls first is not asked, as it has an f-string; nor is its name, as there is more to ask."""
  (tmp_path / "a.py").write_text("".join(f"{GET}\n  {number}\n\n" for number in range(60)))
  records = stdlib_records("answers", "train", 0.0, tmp_path)
  assert {(r["question"], *r["answers"], *r["starts"]) for r in records} == {
      ("What is its first parameter?", "key", 20), ("What is the default of size?", "10", 44),
      ("What is the default of key?",), ("What does it raise?", "KeyError", 82),
      ("What does it return?", 'await self.items[key].read(size, mode=f"{size}")', 112)}


@pytest.mark.parametrize("code, question, answer", [
    ("def f(self):\n  pass", "What is its first parameter?", None),
    ("def f(cls, *é, k=(1)):\n  é.a().b()", "What does it call first?", "é.a"),
    ("def f(self, *, k='é', v='é' + 'x'):\n  pass", "What is the default of v?", "'é' + 'x'"),
    ("def f(a):\n  def g():\n    return 1\n  raise", "What does it return?", None),
    ("def f(a):\n  try:\n    g()\n  except b:\n    raise\n  raise x.Error(1)", "What does it raise?", "x.Error"),
])
def test_answers_to_questions(tmp_path, code, question, answer):
  """Copies that differ in a number are asked different questions; among them is the one sought."""
  copies = [f"{code}\n  {number}" for number in range(60)]
  (tmp_path / "a.py").write_text("\n\n".join(copies) + "\n")
  records = [r for r in stdlib_records("answers", "train", 0.0, tmp_path)
             if r["question"] == question and r["context"] in copies]
  assert records
  for record in records:
    assert record["answers"] == ([] if answer is None else [answer])
    assert record["starts"] == ([] if answer is None else [code.index(answer)])


def test_answers_leave_out_what_is_long(tmp_path):
  long = " + ".join(["value"] * 20)
  (tmp_path / "a.py").write_text("\n".join(
      f"def f{i}(a):\n  return {long}\ndef g{i}(a):\n  return (a +\n    {i})\n" for i in range(40)))
  records = stdlib_records("answers", "train", 0.0, tmp_path)
  assert len(records) == 160
  assert not [r for r in records if r["question"] == "What does it return?"]


def test_answers_leave_out_what_metrics_take_for_none(tmp_path):
  (tmp_path / "a.py").write_text("\n".join(
      f"def f{i}(a, the=(), _={{}}):\n  {i}\n  return []\n" for i in range(40)))
  records = stdlib_records("answers", "train", 0.0, tmp_path)
  assert {(r["question"], *map(bool, r["answers"])) for r in records} == {
      ("What is the name of the function?", True), ("What is the default of a?",), ("What does it raise?",),
      ("What does it call first?",)}


def test_answers_of_functions_with_less_than_two_questions(tmp_path):
  body = "def a({}=()):\n  f'{{b}}'\n  if b:\n    return []\n  raise {}\n"
  (tmp_path / "a.py").write_text(body.format("a", "_") + body.format("a", "Error"))
  assert stdlib_records("answers", "train", 0.0, tmp_path) == [
      {"question": "What does it raise?", "context": body.format("a", "Error").rstrip(), "answers": ["Error"],
       "starts": [52]}]


def test_docstrings_leave_out_doctests_and_short_lines(tmp_path):
  lines = (">>> f() + 1 == 2", "Two words", "Now three words")
  (tmp_path / "a.py").write_text("".join(
      f"def f{i}():\n  '{line}'\n  return {i}\n" for i, line in enumerate(lines)))
  assert [r["summary"] for r in stdlib_records("docstrings", "train", 0.0, tmp_path)] == ["Now three words"]


def test_unknown_names():
  with pytest.raises(UserError, match="no task 'answer'; did you mean 'answers'"):
    stdlib_records("answer", "train")
  with pytest.raises(UserError, match="no split 'valid'; did you mean 'validation'"):
    stdlib_records("answers", "valid")


@pytest.mark.parametrize("name", STDLIB_TASKS)
def test_the_splits_are_of_different_files(library, name):
  def modules(split):
    text = json.dumps(stdlib_records(name, split, 0.2, library))
    return {int(number) for number in re.findall(r"left_(\d+)", text)}
  source = StdlibSource(DataConfig(validation_fraction=0.2), library)
  files = {split: {int(path.split("m")[-1][:-3]) for path in source.files(split)} for split in ("train", "validation")}
  assert len(files["validation"]) > 3
  assert {split: modules(split) for split in files} == files
  assert stdlib_records(name, "validation", 0.0, library) == []


@pytest.mark.parametrize("name", ["docstrings", "packages", "answers"])
def test_validation_has_nothing_that_stands_in_train(library, tmp_path, name):
  held_out = StdlibSource(DataConfig(validation_fraction=0.2), library).files("validation")
  known = stdlib_records(name, "validation", 0.2, library)
  for path in library.rglob("*.py"):
    relative = path.relative_to(library)
    (tmp_path / relative).parent.mkdir(exist_ok=True)
    (tmp_path / relative).write_text(path.read_text())
  # One function of a held-out file is copied to a training file: it is too little to make them near-copies.
  copied = "\n".join((tmp_path / held_out[0]).read_text().split("\n")[:3])
  train = StdlibSource(DataConfig(validation_fraction=0.2), library).files("train")[0]
  (tmp_path / train).write_text((tmp_path / train).read_text() + copied + "\n")
  assert StdlibSource(DataConfig(validation_fraction=0.2), tmp_path).files("validation") == held_out
  lost = [r for r in known if r not in stdlib_records(name, "validation", 0.2, tmp_path)]
  first = copied.split("\n")[0]
  expected = [] if name == "packages" else [r for r in known if r.get("code", r.get("context")).startswith(first)]
  assert lost == expected
  assert len(lost) == {"docstrings": 1, "packages": 0, "answers": 2}[name]


def test_records_do_not_depend_on_the_hash_seed(library):
  code = ("import hashlib, json, sys; from lmjax.data.stdlib_tasks import STDLIB_TASKS, stdlib_records\n"
          "everything = [stdlib_records(name, split, 0.2, sys.argv[1]) for name in STDLIB_TASKS "
          "for split in ('train', 'validation')]\n"
          "print(*map(len, everything), hashlib.sha256(json.dumps(everything).encode()).hexdigest())")
  printed = [subprocess.run([sys.executable, "-c", code, library], check=True, text=True, stdout=subprocess.PIPE,
                            cwd=pathlib.Path(__file__).parents[2],
                            env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}).stdout
             for seed in ("1", "2")]
  assert printed[0] == printed[1]
  assert all(int(count) > 0 for count in printed[0].split()[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", STDLIB_TASKS)
def test_tasks_of_the_whole_library(name):
  train, validation = (stdlib_records(name, split) for split in ("train", "validation"))
  assert (len(train), len(validation)) > (1000, 100)
  for record in (*train, *validation):
    assert record.keys() == FIELDS[name]
    CHECKS[name](record)
  known = {json.dumps(record) for record in train}
  assert not [record for record in validation if json.dumps(record) in known]
  if name == "packages":
    assert {record["package"] for record in train} == set(PACKAGES)
  if name == "identifiers":
    assert {kind for record in train for kind in record["kinds"]} == set(KINDS)
  if name == "answers":
    assert 0.25 < sum(not record["answers"] for record in validation) / len(validation) < 0.42


def check_docstring(record):
  assert len(record["summary"].split()) >= 3 and "\n" not in record["summary"]
  assert len(record["code"]) <= 2000 and record["code"].startswith(("def ", "async def "))


def check_package(record):
  assert record["package"] in PACKAGES and 0 < len(record["text"]) <= 1000 and record["text"].strip()


def check_identifiers(record):
  assert 40 <= len(record["tokens"]) == len(record["kinds"]) <= 60
  assert all(token.split() == [token] and len(token) <= 30 for token in record["tokens"])


def check_answer(record):
  assert len(record["context"]) <= 1500 and record["context"].startswith(("def ", "async def "))
  assert len(record["answers"]) == len(record["starts"]) <= 1
  for answer, start in zip(record["answers"], record["starts"]):
    assert record["context"][start:start + len(answer)] == answer
    assert 0 < len(answer) <= 60 and "\n" not in answer


CHECKS = {"docstrings": check_docstring, "packages": check_package, "identifiers": check_identifiers,
          "answers": check_answer}
