"""Labelled tasks made of the standard library's own source, so that there are real ones on every machine.

Held-out records come of held-out files, as `StdlibSource` splits them: whole files without near-copies.

  packages      a part of a module's text, and the package that the module is of; "top" where it is of none
  identifiers   the tokens of some lines of code, and what kind each is
  answers       a question about a function, its source, and where the answer stands in that, if it does
  docstrings    the source of a function without its docstring, and the first line of that

Kinds of identifiers, by the tokens around them: a name is a `keyword`; the `function` or `class` being defined; a
`parameter` where it is declared; an `import` anywhere in an import statement; after a dot a `method` where it is
called, else an `attribute`; the name of an `argument` in a call; a `call` before an opening bracket; any other is a
`variable`. Other tokens are a `number`, a `string` or an `operator`.
"""

import ast
import functools
import io
import keyword
import os
import re
import textwrap
import tokenize
from typing import Any, Callable, Iterator
import warnings

from lmjax.config import DataConfig
from lmjax.config_checks import UserError, nearest
from lmjax.data.pieces import digest
from lmjax.data.stdlib_source import StdlibSource

# Those that Python 3.11 to 3.13 have with some files (the encodings, tables alike, are never held out), and the modules
# outside packages.
PACKAGES = ("asyncio", "ctypes", "email", "idlelib", "importlib", "multiprocessing", "test", "tkinter",
            "turtledemo", "unittest", "xml", "top")
KINDS = ("keyword", "function", "class", "parameter", "import", "method", "attribute", "argument", "call", "variable",
         "number", "string", "operator")
_CHUNK, _CHUNKS_A_FILE, _MOST_OF_A_PACKAGE = 1000, 4, 400
# Reading tokens and questions takes long: of each file a part must do.
_WINDOW, _MOST_WINDOWS, _READ_OF_A_FILE = 40, 6000, 6000
_FUNCTIONS_A_FILE, _MOST_QUESTIONS = 8, 8000
_LONGEST_CODE, _LONGEST_CONTEXT, _LONGEST_ANSWER, _LONGEST_STRING = 2000, 1200, 60, 30
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Record = dict[str, Any]


@functools.lru_cache
def stdlib_records(name: str, split: str, validation_fraction: float = 0.05,
                   root: str | os.PathLike | None = None) -> list[Record]:
  """Returns the records of a task, in an order that does not change.

  Args:
    name: of the task.
    split: "train" or "validation".
    validation_fraction: share of the text that is held out.
    root: folder to read instead of the running Python's standard library.

  Raises:
    UserError: for a name that is no task.
  """
  if name not in _TASKS:
    raise UserError(f"There is no task stdlib:{name}{nearest(name, _TASKS)}")
  source = StdlibSource(DataConfig(validation_fraction=validation_fraction), root)
  share = 1.0 if split == "train" else validation_fraction / (1 - validation_fraction)
  records = _TASKS[name]({path: source.text(path) for path in source.files(split)}, share)
  if split == "validation" and name == "docstrings":
    known = {(r["code"], r["summary"]) for r in stdlib_records(name, "train", validation_fraction, root)}
    records = [record for record in records if (record["code"], record["summary"]) not in known]
  return records


def _evenly(items: list, count: float) -> list:
  """Returns at most so many of some items, at even distances."""
  count = max(1, round(count))
  return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _packages(files: dict[str, str], share: float) -> list[Record]:
  found: dict[str, list[Record]] = {package: [] for package in PACKAGES}
  for path, text in files.items():
    package = path.partition("/")[0] if "/" in path else "top"
    if package in found:
      chunks = _evenly([chunk for chunk in _chunks(text) if chunk.strip()], _CHUNKS_A_FILE)
      found[package] += [{"text": chunk, "package": package} for chunk in chunks]
  return [record for records in found.values() for record in _evenly(records, _MOST_OF_A_PACKAGE * share)]


def _chunks(text: str) -> Iterator[str]:
  """Yields whole lines of a text, of at most _CHUNK characters together but for a longer line, which is cut."""
  chunk = ""
  for line in text.splitlines(keepends=True):
    if chunk and len(chunk) + len(line) > _CHUNK:
      yield chunk
      chunk = ""
    chunk += line[:_CHUNK]
  if chunk:
    yield chunk


def _identifiers(files: dict[str, str], share: float) -> list[Record]:
  windows = []
  for text in files.values():
    window: list[tuple[str, str]] = []
    for line in _logical_lines(_cut(text, _READ_OF_A_FILE)):
      window += _kinds(line)
      if len(window) >= _WINDOW:
        tokens, kinds = zip(*window[:2 * _WINDOW])
        windows.append({"tokens": [*tokens], "kinds": [*kinds]})
        window = []
  return _evenly(windows, _MOST_WINDOWS * share)


def _logical_lines(text: str) -> Iterator[list[tokenize.TokenInfo]]:
  """Yields the names, numbers, strings and operators of each logical line, as far as a text can be read."""
  line: list[tokenize.TokenInfo] = []
  try:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      if token.type == tokenize.NEWLINE:
        yield line
        line = []
      elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
        line.append(token)
  except (tokenize.TokenError, SyntaxError):
    return


def _kinds(line: list[tokenize.TokenInfo]) -> Iterator[tuple[str, str]]:
  """Yields (token, kind) of a logical line."""
  words = [token.string for token in line]
  depth, of_def = 0, None  # How many brackets are open, and at which depth a definition's parameters stand.
  for place, (token, word) in enumerate(zip(line, words)):
    before, after = words[place - 1] if place else "", words[place + 1] if place + 1 < len(words) else ""
    if word in "([{" and before and place >= 2 and words[place - 2] == "def" and not depth:
      of_def = 1
    depth += (word in ("(", "[", "{")) - (word in (")", "]", "}"))
    if token.type != tokenize.NAME:
      kind = {tokenize.NUMBER: "number", tokenize.STRING: "string"}.get(token.type, "operator")
    elif keyword.iskeyword(word):
      kind = "keyword"
    elif before in ("def", "class"):
      kind = "function" if before == "def" else "class"
    elif words[0] in ("import", "from"):
      kind = "import"
    elif before == ".":
      kind = "method" if after == "(" else "attribute"
    elif depth and depth == of_def and before in ("(", ",", "*", "**"):
      kind = "parameter"
    elif depth and after == "=" and before in ("(", ","):
      kind = "argument"
    else:
      kind = "call" if after == "(" else "variable"
    if of_def and not depth:
      of_def = None
    yield _shown(word), kind


def _shown(word: str) -> str:
  """Returns a token without white space and of bounded length."""
  word = re.sub(r"\s+", "_", word)
  return word if len(word) <= _LONGEST_STRING else word[:_LONGEST_STRING - 4] + "..." + word[-1]


def _functions(text: str) -> Iterator[tuple[str, ast.AST, str]]:
  """Yields (qualified name, definition, dedented source without the docstring) of each function that has more in it."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError):
    return
  lines = text.splitlines(keepends=True)
  waiting = [("", node) for node in reversed(tree.body)]
  while waiting:
    prefix, node = waiting.pop()
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
      waiting += [(f"{prefix}{node.name}.", child) for child in reversed(node.body)]
    if isinstance(node, _FUNCTIONS):
      if (code := _without_docstring(node, lines)) is not None:
        yield prefix + node.name, node, code


def _without_docstring(node: Any, lines: list[str]) -> str | None:
  """Returns a function's dedented source without its docstring, or None where nothing else is in it."""
  kept = lines[node.lineno - 1:node.end_lineno]
  if ast.get_docstring(node, clean=False) is not None:
    first, last = (line - node.lineno for line in (node.body[0].lineno, node.body[0].end_lineno))
    if len(node.body) == 1 or not first or node.body[1].lineno - node.lineno <= last:
      return None  # It shares a line with code.
    kept = kept[:first] + kept[last + 1:]
  return textwrap.dedent("".join(kept)).rstrip() + "\n"


def _docstrings(files: dict[str, str], share: float) -> list[Record]:
  del share
  found = {}
  for text in files.values():
    for name, node, code in _functions(text):
      summary = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
      if len(summary.split()) >= 3:
        record = {"code": _cut(code, _LONGEST_CODE), "summary": summary, "name": name}
        found.setdefault((record["code"], summary), record)
  return [*found.values()]


def _cut(text: str, length: int) -> str:
  """Returns a text's beginning, to the end of a line where there is one."""
  return text if len(text) <= length else text[:text.rfind("\n", 0, length) + 1 or length]


def _answers(files: dict[str, str], share: float) -> list[Record]:
  made = []
  for text in files.values():
    fitting = [(name, context) for name, _, context in _functions(text) if len(context) <= _LONGEST_CONTEXT]
    for name, context in _evenly(fitting, _FUNCTIONS_A_FILE):
      made += _questions(name, context)
  return _evenly(made, _MOST_QUESTIONS * share)


def _questions(name: str, context: str) -> list[Record]:
  """Returns two questions about a function, of which one alone may be without an answer."""
  try:
    node = ast.parse(context).body[0]
  except (SyntaxError, IndexError):
    return []
  found = {question: find(node, context) for question, find in _QUESTIONS.items()}
  order = sorted(_QUESTIONS, key=lambda question: digest(name, context, question))
  answered = [question for question in order if found[question] is not None][:1]
  other = [question for question in order if question not in answered][:1]
  return [_question(question, found[question], context) for question in answered + other
          if found[question] is None or _is_short(found[question], context)]


def _is_short(node: ast.AST | tuple[int, str], context: str) -> bool:
  text = _span(node, context)[1]
  return bool(text) and len(text) <= _LONGEST_ANSWER and "\n" not in text


def _question(question: str, answer: Any, context: str) -> Record:
  start, text = (0, "") if answer is None else _span(answer, context)
  return {"question": question, "context": context, "answers": [text] if text else [],
          "starts": [start] if text else []}


def _span(node: ast.AST | tuple[int, str], context: str) -> tuple[int, str]:
  """Returns the first character and the text of a node in the source it was parsed from."""
  if isinstance(node, tuple):
    return node
  lines = context.splitlines(keepends=True)
  offset = lambda line, column: sum(map(len, lines[:line - 1])) + len(lines[line - 1].encode()[:column].decode())
  start, stop = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
  return start, context[start:stop]


def _name(node: ast.AST, context: str) -> tuple[int, str]:
  return context.index(f"def {node.name}") + 4, node.name


def _parameter(node: ast.AST, context: str) -> tuple[int, str] | None:
  named = [arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
           if arg.arg not in ("self", "cls")]
  return (_span(named[0], context)[0], named[0].arg) if named else None


def _default(node: ast.AST, context: str) -> ast.AST | None:
  return (*node.args.defaults, *filter(None, node.args.kw_defaults), None)[0]


def _first(kind: type, part: str) -> Callable[[ast.AST, str], ast.AST | None]:
  """Returns a function that finds a part of the first node of a kind, in the order of the source."""
  def find(node: ast.AST, context: str) -> ast.AST | None:
    found = sorted((child for statement in node.body for child in ast.walk(statement) if isinstance(child, kind)),
                   key=lambda child: (child.lineno, child.col_offset))
    parts = (getattr(child, part) for child in found)
    return next(filter(None, parts), None)

  return find


_QUESTIONS: dict[str, Callable[[ast.AST, str], Any]] = {
    "What is the function called?": _name, "What is its first parameter?": _parameter,
    "What is the first default?": _default, "What does it return first?": _first(ast.Return, "value"),
    "What does it raise first?": _first(ast.Raise, "exc"), "What does it call first?": _first(ast.Call, "func"),
    "What does it loop over first?": _first(ast.For, "iter"), "What does it test first?": _first(ast.If, "test")}

_TASKS: dict[str, Callable[[dict[str, str], float], list[Record]]] = {
    "packages": _packages, "identifiers": _identifiers, "answers": _answers, "docstrings": _docstrings}
STDLIB_TASKS = tuple(_TASKS)
