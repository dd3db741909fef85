"""Labelled tasks made of the standard library's own source: data for every kind of objective, without a download.

Train and validation are made of different files, by the rule of `lmjax.data.stdlib_source`. A file that Python cannot
parse is left out, what stands twice stands once, and what stands in train is not asked again in validation. Wherever
there is more than a task's cap, what is kept is spread evenly over the files, in the order of their paths.

"docstrings": say in one line what a function does. {"code", "summary", "name"}
  `code` is a function or method from its `def` on, without its docstring and dedented, cut after a line to 2,000
  characters. `summary` is the docstring's first line, of three words or more and no doctest. `name` is as in
  `__qualname__`.

"packages": tell which package a text is from. {"text", "package"}
  `text` has at most 1,000 characters of a module, cut at line ends. `package` is one of `PACKAGES`.

"identifiers": tell what each token is. {"tokens", "kinds"}
  Whole logical lines, 40 to 60 tokens together, without comments, line ends and indentation. A string that has white
  space or more than 30 characters, and every f-string, is its prefix and quotes with ... inside; all other tokens are
  cut to 30 characters. The kind of a name, one of `KINDS`, is given by the first of these that holds:
    keyword: it is reserved.
    function, class: it follows `def`, `class`.
    import: it stands in an import statement.
    parameter: it follows "(", "," or a star after either, right inside the brackets of a `def`'s signature.
    method, attribute: it follows "."; a method has "(" after it.
    argument: it has "=" after it and "(" or "," before it, right inside the brackets of a call or of a class's bases.
    call: it has "(" after it.
    variable: any other.
  Tokens that are not names are of the kind number, string or operator.

"answers": find the answer in a function, or find that there is none. {"question", "context", "answers", "starts"}
  `context` is a whole function of at most 1,500 characters, as in "docstrings". There are two questions a function,
  fewer where it has less to ask, chosen by a hash, its name only where nothing else is left; about a third have no
  answer and empty lists, and no answer has more than 60 characters. Only the function's own statements count, not
  those of functions, lambdas and classes in it:
    its name; its first parameter but `self` and `cls`; the default of a parameter;
    what it returns: the value of the first `return` that has one;
    what it raises: what the first `raise` names, without arguments;
    what it calls first: what is called by the first call in the text.
  What would need more than 60 characters, or more than a line, is not asked; nor what is made of marks and articles
  alone, like () and `a`, which metrics take for no answer; nor the calls of functions with f-strings, whose places in
  the text Python tells only since 3.12.
"""

import ast
import collections
import contextlib
import functools
import gc
import io
import itertools
import keyword
import os
import re
import tokenize
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
import warnings

from lmjax.config import DataConfig, UserError
from lmjax.config_checks import nearest
from lmjax.data.pieces import digest
from lmjax.data.stdlib_source import StdlibSource

# Packages with seven files or more and something held out, in each of Python 3.11 to 3.13; "top" is the root's modules.
PACKAGES = ("asyncio", "email", "idlelib", "importlib", "test", "tkinter", "turtledemo", "unittest", "wsgiref", "xml",
            "top")
KINDS = ("keyword", "function", "class", "parameter", "import", "method", "attribute", "call", "argument", "variable",
         "number", "string", "operator")
_SPLITS = ("train", "validation")
_MAX_CODE = 2000
_MAX_CHUNK, _CHUNKS_PER_FILE = 1000, 4
_MIN_WINDOW, _MAX_WINDOW, _MAX_TOKEN = 40, 60, 30
_MAX_CONTEXT, _MAX_ANSWER = 1500, 60
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_NAME_QUESTION = "What is the name of the function?"


class _Task(NamedTuple):
  """How a task is made.

  Attributes:
    units: from (path, text, tree) to (key, rest) pairs; of units with the same key, the first is kept.
    records: from the units and `caps` of the split to the records.
    max_files: files read, where all would take too long.
    caps: the most of whatever `records` chooses, in each split.
  """
  units: Callable[[str, str, ast.Module], Iterable[tuple[Any, Any]]]
  records: Callable[[dict, int | None], list[dict]]
  max_files: int | None
  caps: dict[str, int | None]


def stdlib_records(name: str, split: str, validation_fraction: float = 0.05,
                   root: str | os.PathLike | None = None) -> list[dict]:
  """Returns the records of a task, always the same for the same Python. See the module's docstring.

  They are built once in a process, so that callers share them and may not change them.

  Args:
    name: one of `STDLIB_TASKS`.
    split: "train" or "validation".
    validation_fraction: share of the text that is held out; with 0, validation is empty.
    root: folder to read instead of the running Python's standard library.

  Raises:
    UserError: for a name or split that there is not.
  """
  for what, given, known in (("task", name, STDLIB_TASKS), ("split", split, _SPLITS)):
    if given not in known:
      raise UserError(f"The standard library's source has no {what} {given!r}{nearest(given, known)}")
  return _records(name, split, validation_fraction, root and os.fspath(root))


@functools.lru_cache(maxsize=16)
def _records(name: str, split: str, fraction: float, root: str | None) -> list[dict]:
  units = _units(name, split, fraction, root)
  if split == "validation":
    seen = _units(name, "train", fraction, root)
    units = {key: rest for key, rest in units.items() if key not in seen}
  return _TASKS[name].records(units, _TASKS[name].caps[split])


@functools.lru_cache(maxsize=16)
def _units(name: str, split: str, fraction: float, root: str | None) -> dict:
  task, source, units = _TASKS[name], _source(fraction, root), {}
  with _parsing():
    for path in _evenly(source.files(split), task.max_files):
      text = source.text(path).replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
      try:
        tree = ast.parse(text)
      except (SyntaxError, ValueError, RecursionError):
        continue
      for key, rest in task.units(path, text, tree):
        units.setdefault(key, rest)
  return units


@functools.lru_cache(maxsize=2)
def _source(fraction: float, root: str | None) -> StdlibSource:
  return StdlibSource(DataConfig(validation_fraction=fraction), root)


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
  """Makes reading millions of nodes quiet and fast."""
  collecting = gc.isenabled()
  # Trees have no cycles, but looking for some takes a fourth of the time.
  gc.disable()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Old code has escapes that are no longer in order.
      yield
  finally:
    if collecting:
      gc.enable()


def _evenly(items: Iterable, most: int | None) -> list:
  """Returns at most `most` of the items, spread evenly."""
  items = list(items)
  if most is None or len(items) <= most:
    return items
  return [items[i * len(items) // most] for i in range(most)]


# Functions.

def _functions(body: Sequence[ast.AST], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
  """Yields (qualified name, node) of every function, in the order of the text."""
  for node in body:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield prefix + node.name, node
      yield from _functions(node.body, f"{prefix}{node.name}.<locals>.")
    elif isinstance(node, ast.ClassDef):
      yield from _functions(node.body, f"{prefix}{node.name}.")
    else:
      for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        yield from _functions(getattr(node, field, ()), prefix)


def _code(lines: list[str], node: ast.AST) -> str | None:
  """Returns a function from its `def` on, dedented, without docstring; None where that shares a line with code."""
  first, last = node.lineno, node.end_lineno
  kept = list(range(first, last + 1))
  if ast.get_docstring(node, clean=False) is not None:
    doc = node.body[0]
    before, after = lines[doc.lineno - 1].encode()[:doc.col_offset], lines[doc.end_lineno - 1].encode()
    rest = after[doc.end_col_offset:].strip()
    if before.strip() or rest and not rest.startswith(b"#"):
      return None
    kept = [number for number in kept if not doc.lineno <= number <= doc.end_lineno]
  indent = node.col_offset
  # Lines inside a string may begin left of the function.
  texts = [lines[number - 1] for number in kept]
  return "\n".join(text if text[:indent].strip() else text[indent:] for text in texts).rstrip()


def _cut(text: str, most: int) -> str:
  """Returns the whole lines of a text that fit in `most` characters, or a part of its first line."""
  if len(text) <= most:
    return text
  end = text.rfind("\n", 0, most + 1)
  return text[:end if end > 0 else most]


def _docstring_units(path: str, text: str, tree: ast.Module) -> Iterator[tuple]:
  lines = text.split("\n")
  for name, node in _functions(tree.body):
    summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    code = _code(lines, node) if len(summary.split()) >= 3 and not summary.startswith(">>>") else None
    if code:
      yield (_cut(code, _MAX_CODE), summary), name


def _docstring_records(units: dict, cap: int | None) -> list[dict]:
  return [{"code": code, "summary": summary, "name": name} for (code, summary), name in _evenly(units.items(), cap)]


# Packages.

def _package_units(path: str, text: str, tree: ast.Module) -> Iterator[tuple]:
  package = path.partition("/")[0] if "/" in path else "top"
  if package in PACKAGES:
    yield from ((chunk, package) for chunk in _evenly(_chunks(text), _CHUNKS_PER_FILE))


def _chunks(text: str) -> Iterator[str]:
  while text:
    chunk = _cut(text, _MAX_CHUNK)
    text = text[len(chunk):].removeprefix("\n")
    if chunk.strip():
      yield chunk


def _package_records(units: dict, cap: int | None) -> list[dict]:
  chunks = collections.defaultdict(list)
  for chunk, package in units.items():
    chunks[package].append({"text": chunk, "package": package})
  return [record for package in PACKAGES for record in _evenly(chunks[package], cap)]


# Identifiers.

def _identifier_units(path: str, text: str, tree: ast.Module) -> Iterator[tuple]:
  window = []
  for line in _logical_lines(text):
    if len(window) + len(line) > _MAX_WINDOW:
      window = []
    if len(line) <= _MAX_WINDOW:
      window += zip(line, _kinds(line))
    if len(window) >= _MIN_WINDOW:
      tokens, kinds = zip(*window)
      yield tuple(token for _, token in tokens), kinds
      window = []


def _logical_lines(text: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the (type, text) of each logical line's names, numbers, strings and operators; no text has white space."""
  line, opened = [], []
  try:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      kind = tokenize.tok_name[token.type]
      # Since Python 3.12 an f-string is many tokens, between its start and its end.
      if kind == "FSTRING_START":
        opened.append(token.string)
      elif kind == "FSTRING_END":
        start = opened.pop()
        if not opened:
          line.append(("STRING", _short_string(f"{start} {token.string}")))
      elif opened:
        continue
      elif kind == "NEWLINE":
        yield line
        line = []
      elif kind == "STRING":
        line.append((kind, _short_string(token.string)))
      elif kind in ("NAME", "NUMBER", "OP"):
        line.append((kind, token.string[:_MAX_TOKEN]))
  except (tokenize.TokenError, SyntaxError):
    return


def _short_string(text: str) -> str:
  prefix, quotes = re.match(r"""(\w*)('''|\"""|'|")""", text).groups()
  plain = len(text) <= _MAX_TOKEN and not re.search(r"\s", text) and "f" not in prefix.lower()
  return text if plain else f"{prefix}{quotes}...{quotes}"


def _kinds(line: list[tuple[str, str]]) -> list[str]:
  """Returns the kind of each token of a logical line, by the rules of the module's docstring."""
  kinds, brackets, head, importing = [], [], None, False
  texts = ["", "", *(text for _, text in line), ""]
  for (kind, text), (before2, before, _, after) in zip(line, zip(texts, texts[1:], texts[2:], texts[3:])):
    if kind != "NAME":
      kinds.append({"OP": "operator"}.get(kind, kind.lower()))
      if kind != "OP":
        continue
      if text in "([{":
        # What was defined in this line owns its first round bracket.
        called = kinds[-2:-1] and kinds[-2] in ("call", "method") or before in (")", "]")
        brackets.append(head if head and text == "(" and not brackets else "call" if called and text == "(" else None)
        head = None if text == "(" else head
      elif text in ")]}":
        brackets = brackets[:-1]
      elif text == ";":
        importing = False
      continue
    inside = brackets[-1] if brackets else None
    importing = importing or text == "import" or (text == "from" and before in ("", ";", ":"))
    listed = before in ("(", ",") or (before in ("*", "**") and before2 in ("(", ","))
    rules = (("keyword", keyword.iskeyword(text)), ("function", before == "def"), ("class", before == "class"),
             ("import", importing), ("parameter", inside == "function" and listed),
             ("method", before == "." and after == "("), ("attribute", before == "."),
             ("argument", inside in ("call", "class") and after == "=" and before in ("(", ",")),
             ("call", after == "("), ("variable", True))
    kinds.append(next(name for name, holds in rules if holds))
    if kinds[-1] in ("function", "class"):
      head = kinds[-1]
  return kinds


def _identifier_records(units: dict, cap: int | None) -> list[dict]:
  return [{"tokens": list(tokens), "kinds": list(kinds)} for tokens, kinds in _evenly(units.items(), cap)]


# Answers.

class _Context:
  """A function's text and tree, and where in the text a node stands."""

  def __init__(self, text: str):
    self.text = text
    self.node = ast.parse(text).body[0]
    self._lines = text.split("\n")
    self._starts = list(itertools.accumulate((len(line) + 1 for line in self._lines), initial=0))

  def span(self, node: ast.AST) -> tuple[int, int]:
    return self._place(node.lineno, node.col_offset), self._place(node.end_lineno, node.end_col_offset)

  def _place(self, line: int, column: int) -> int:
    # Python counts columns in bytes.
    return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())


def _answer_units(path: str, text: str, tree: ast.Module) -> Iterator[tuple]:
  lines = text.split("\n")
  for _, node in _functions(tree.body):
    has_code = len(node.body) > 1 or ast.get_docstring(node, clean=False) is None
    code = _code(lines, node) if has_code else None
    if code and len(code) <= _MAX_CONTEXT:
      yield code, None


def _answer_records(units: dict, cap: int | None) -> list[dict]:
  return [record for text in _evenly(units, cap // 2) for record in _ask(_Context(text))]


def _ask(context: _Context) -> Iterator[dict]:
  """Yields up to two questions about a function; by a hash, a third are taken from those without an answer."""
  spans = {question: span for question, span in _spans(context) if not span or _can_answer(context.text[slice(*span)])}
  # Every function has a name, so that is asked where there is nothing better.
  left = sorted(spans, key=lambda question: (question == _NAME_QUESTION, digest(context.text, question)))
  for number in range(min(2, len(left))):
    unanswered = int(digest(context.text, number), 16) % 3 == 0
    question = next((question for question in left if (spans[question] is None) == unanswered), left[0])
    left.remove(question)
    start, end = spans[question] or (0, 0)
    found = spans[question] is not None
    yield {"question": question, "context": context.text, "answers": [context.text[start:end]] * found,
           "starts": [start] * found}


def _can_answer(text: str) -> bool:
  words = re.sub(r"[^\w\s]|_", "", text.lower())
  return len(text) <= _MAX_ANSWER and "\n" not in text and bool(re.sub(r"\b(a|an|the)\b|\s", "", words))


def _spans(context: _Context) -> Iterator[tuple[str, tuple[int, int] | None]]:
  """Yields each question that can be asked about a function, and where its answer is, if there is one."""
  node, text = context.node, context.text
  yield _NAME_QUESTION, re.match(r"(?:async\s+)?def\s+(\w+)", text).span(1)
  positional = [*node.args.posonlyargs, *node.args.args]
  defaults = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults + node.args.kw_defaults
  named = [*zip([*positional, *node.args.kwonlyargs], defaults)]
  every = [*positional, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
  names = [arg for arg in every if arg and arg.arg not in ("self", "cls")]
  first = context.span(names[0])[0] if names else None
  yield "What is its first parameter?", names and (first, first + len(names[0].arg)) or None
  for has_default in (False, True):
    some = [pair for pair in named if (pair[1] is not None) == has_default and pair[0] in names]
    if some:
      arg, default = min(some, key=lambda pair: digest(text, pair[0].arg))
      yield f"What is the default of {arg.arg}?", default and context.span(default)
  own = [inner for statement in node.body for inner in _own_nodes(statement)]
  returned = [inner.value for inner in own if isinstance(inner, ast.Return) and inner.value]
  yield "What does it return?", context.span(returned[0]) if returned else None
  raised = [inner.exc for inner in own if isinstance(inner, ast.Raise) and inner.exc]
  raised = [inner.func if isinstance(inner, ast.Call) else inner for inner in raised]
  yield "What does it raise?", context.span(raised[0]) if raised else None
  if not any(isinstance(inner, ast.JoinedStr) for inner in own):
    # Of a().b() both calls begin at the same place, and a() is the first.
    yield "What does it call first?", min((context.span(inner.func) for inner in own if isinstance(inner, ast.Call)),
                                          default=None)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
  """Yields a node and what is in it, in the order of the text, but nothing of other functions and classes."""
  if not isinstance(node, _SCOPES):
    yield node
    for child in ast.iter_child_nodes(node):
      yield from _own_nodes(child)


_TASKS = {
    "docstrings": _Task(_docstring_units, _docstring_records, None, {"train": None, "validation": None}),
    "packages": _Task(_package_units, _package_records, None, {"train": 400, "validation": 20}),
    "identifiers": _Task(_identifier_units, _identifier_records, 300, {"train": 6000, "validation": 400}),
    "answers": _Task(_answer_units, _answer_records, 600, {"train": 8000, "validation": 500}),
}
STDLIB_TASKS = tuple(_TASKS)
