"""Turns text into tokens and back. Every tokenizer is a `tokenizers.Tokenizer`, whether built in, trained or loaded."""

import functools
import json
import os
import pathlib
from typing import Any, Iterable, Mapping, Sequence

from etils import epath
import numpy as np

from lmjax.config_checks import Refused, UserError
from lmjax.data.pieces import Source, digest

EOS = "<|endoftext|>"

# What the token after a document is called by the tokenizers there are; the first that exists is used.
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "<|eos|>",
              "<EOS>", "[EOS]", "<|im_end|>", "[SEP]")

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")

# What the special tokens that objectives need are called; one that is missing is added by its first name.
_NAMES = {"pad": ("<pad>", "[PAD]"), "mask": ("[MASK]", "<mask>"),
          "cls": ("[CLS]", "<s>", "<cls>"), "sep": ("[SEP]", "</s>", "<sep>"),
          "R": ("[R]", "[NLU]"), "S": ("[S]", "[S2S]"), "X": ("[X]", "[NLG]")}

# How text is split before merging, after GPT-2 and its successors: a word takes along the one character before it (a
# space, a dot, an underscore, an opening bracket); digits come in threes; punctuation takes along the line end and the
# indentation that follow, so that Python's line structure costs few tokens.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\s*(?!\S)|\s+(?!\S)|\s+"
_SAMPLE_BYTES = 64 << 20


class Tokenizer:
  """A `tokenizers.Tokenizer` with one way to encode: nothing is truncated, padded or added, and text is text.

  Attributes:
    size: number of token ids, the largest id plus one.
    eos_id: id of the token that ends a document.
    start_id: id of the token that a decoder's text begins with: 0 where that is <pad>, as in T5, else `eos_id`.
    fingerprint: changes when an id of a text could.
  """

  def __init__(self, backend: Any):
    """Wraps a `tokenizers.Tokenizer`.

    Raises:
      UserError: where it has no token to end a document with.
    """
    backend.no_truncation()
    backend.no_padding()
    # The text of a special token, where it stands in a document, is text.
    backend.encode_special_tokens = True
    self._backend = backend
    self._reader = None  # Of texts that name special tokens.
    vocab = backend.get_vocab(with_added_tokens=True)
    names = [name for name in _EOS_NAMES if name in vocab]
    if not names:
      raise UserError(f"The tokenizer has no token that ends a document; it needs one of {', '.join(_EOS_NAMES)}.")
    self.eos_id = vocab[names[0]]
    self.start_id = 0 if vocab.get("<pad>") == 0 else self.eos_id

  def __reduce__(self) -> tuple:
    # A backend alone would forget in another process that the text of a special token is text.
    return _from_json, (self.to_json(),)

  @property
  def size(self) -> int:
    return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

  def add_special(self, names: Iterable[str]) -> dict[str, int]:
    """Returns the ids of special tokens, after adding those that are missing behind all others.

    Args:
      names: mask, cls, sep, R, S, X, or the token itself, such as <extra_id_0>.
    """
    ids = {}
    for name in names:
      known = _NAMES.get(name, (name,))
      vocab = self._backend.get_vocab(with_added_tokens=True)
      if not any(token in vocab for token in known):
        self._backend.add_special_tokens([known[0]])
        self._reader = None
        vocab = self._backend.get_vocab(with_added_tokens=True)
      ids[name] = next(vocab[token] for token in known if token in vocab)
    return ids

  def add_template(self, single: str, pair: str, ids: Mapping[str, int]) -> None:
    """Sets which special tokens stand around one text and around two, unless the tokenizer has some already.

    Args:
      single, pair: templates as `tokenizers.processors.TemplateProcessing` has them, with names in braces for tokens.
      ids: of those names.
    """
    import tokenizers
    if self._backend.num_special_tokens_to_add(False):
      return
    tokens = {name: self._backend.id_to_token(id) for name, id in ids.items()}
    self._backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single.format(**tokens), pair=pair.format(**tokens),
        special_tokens=[(tokens[name], id) for name, id in ids.items()])

  def special_ids(self) -> list[int]:
    """Returns the ids that no text has."""
    return sorted(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)

  def word_flags(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns [size] booleans: whether a token may go on with the word before it, and whether its word may go on.

    Two tokens are of one word where both hold. Word pieces say so by "##" and sentence pieces by the lack of "▁"; of
    byte-level tokens it is those that meet in a letter or a digit.
    """
    tokens = [self._backend.id_to_token(i) or "" for i in range(self.size)]
    marked = [("##", True)] if any(token.startswith("##") for token in tokens) else (
        [("▁", False)] if any(token.startswith("▁") for token in tokens) else [])
    for mark, goes_on in marked:
      return np.array([token.startswith(mark) == goes_on for token in tokens]), np.ones(self.size, bool)
    texts = [self._backend.decode([i], skip_special_tokens=True) for i in range(self.size)]
    inside = lambda text, place: bool(text) and text[place].isalnum()
    return np.array([inside(text, 0) for text in texts]), np.array([inside(text, -1) for text in texts])

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> "Tokenizer":
    """Loads a tokenizer.json, or the one in a folder.

    Raises:
      UserError: where there is none, or it cannot be read.
    """
    import tokenizers
    path = epath.Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
      raise UserError(f"There is no tokenizer file {file} (config.data.tokenizer); give bytes, bpe or the path of a "
                      "tokenizer.json.")
    try:
      backend = tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as e:  # The Rust side raises plain Exception.
      reason = (str(e).splitlines() or ["unknown"])[0]
      raise UserError(f"{file} is not a tokenizer file of the tokenizers library ({reason}); give a tokenizer.json as "
                      "that library saves it.") from e
    try:
      return cls(backend)
    except UserError as e:
      raise UserError(f"{file}: {e}") from e

  def save(self, path: str | os.PathLike) -> None:
    """Writes a tokenizer.json; either all of it appears or nothing."""
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
      temporary.write_text(self.to_json())
      temporary.replace(path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise

  def to_json(self) -> str:
    """Returns the text of a tokenizer.json."""
    return self._backend.to_str(pretty=True)

  def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
    """Returns the ids of a text; `add_special_tokens` frames it as the tokenizer file says, such as by an end."""
    return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

  @property
  def opening(self) -> list[int]:
    """Ids that the tokenizer file puts before a text, such as BART's <s>; none in T5."""
    framed = self.encode("", add_special_tokens=True)
    return framed[:-1] if framed[-1:] == [self.eos_id] else framed

  def without_opening(self, ids: list[int]) -> list[int]:
    """Returns the ids of a text that a model has written, without `opening` where it has begun with that."""
    opening = self.opening
    return ids[len(opening):] if ids[:len(opening)] == opening else ids

  def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
    """Returns the ids of a text that names special tokens, and [ids] booleans of those within spans of characters."""
    if self._reader is None:  # Apart, for another thread may be reading with the one of plain texts.
      reader = type(self._backend).from_str(self.to_json())
      reader.encode_special_tokens = False
      self._reader = reader
    encoding = self._reader.encode(text, add_special_tokens=False)
    inside = [any(start < end and begin < stop and end > start for start, stop in spans)
              for begin, end in encoding.offsets]
    return encoding.ids, np.array(inside, bool)

  def names_of_special(self) -> dict[str, str]:
    """Returns the special tokens that there are by transformers' names: eos_token, and of others those it has."""
    vocab = self._backend.get_vocab(with_added_tokens=True)
    named = {"bos_token": _BOS_NAMES, **{f"{name}_token": _NAMES[name] for name in ("pad", "mask", "cls", "sep")}}
    found = {name: [token for token in tokens if token in vocab][:1] for name, tokens in named.items()}
    return {"eos_token": self._backend.id_to_token(self.eos_id)} | {name: tokens[0] for name, tokens in found.items()
                                                                   if tokens}

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids (uint32) of each text, using all cores."""
    try:
      encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as e:  # The Rust side raises plain Exception.
      raise UserError(f"The tokenizer of config.data.tokenizer cannot encode the text ({e}); give one that knows every "
                      "character, such as a byte-level one.") from e
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of some ids, special tokens included."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

  @functools.cached_property
  def fingerprint(self) -> str:
    # No text becomes a special token but the one that ends it, so that adding others changes no id.
    made = json.loads(self.to_json())
    made["added_tokens"] = [token for token in made["added_tokens"] if not token["special"]]
    return digest(json.dumps(made, sort_keys=True), self.eos_id)


def _from_json(text: str) -> Tokenizer:
  import tokenizers
  return Tokenizer(tokenizers.Tokenizer.from_str(text))


def byte_tokenizer() -> Tokenizer:
  """Returns the tokenizer whose ids 0 to 255 are the bytes of UTF-8; 256 is `<|endoftext|>`."""
  import tokenizers
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_byte_vocab(), merges=[]))
  return Tokenizer(_with_bytes(backend, []))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE.

  Args:
    texts: what to train on.
    vocab_size: number of tokens, `<|endoftext|>` (the first) and the 256 bytes among them; a small text gives fewer.
  """
  import tokenizers
  split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
  backend = _with_bytes(tokenizers.Tokenizer(tokenizers.models.BPE()), [split])
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False)
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(backend)


def load_tokenizer(spec: str, vocab_size: int, sources: Sequence[Source], cache_dir: str | os.PathLike) -> Tokenizer:
  """Returns the tokenizer that the config names.

  Args:
    spec: `config.data.tokenizer`: bytes, bpe, or the path of a tokenizer.json or of a folder that holds one.
    vocab_size: of a trained one.
    sources: whose training splits `bpe` is trained on; a tokenizer once trained is kept in the cache.
    cache_dir: the cache.

  Raises:
    UserError: where there is no such tokenizer, or nothing to train it on.
  """
  if spec == "bytes":
    return byte_tokenizer()
  if spec != "bpe":
    return Tokenizer.from_file(spec)
  key = digest("bpe", 1, _SPLIT, _SAMPLE_BYTES, vocab_size, *(source.fingerprint for source in sources))[:24]
  path = pathlib.Path(cache_dir) / "tokenizers" / f"{key}.json"
  if path.is_file():
    return Tokenizer.from_file(path)
  texts = [text for source in sources for text in _sample(source, _SAMPLE_BYTES // len(sources))]
  if not texts:
    raise UserError("There is no training text to train config.data.tokenizer = 'bpe' on; check config.data.source.")
  tokenizer = train_bpe(texts, vocab_size)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
  except OSError as e:
    raise Refused(f"The trained tokenizer cannot be written to {path.parent} ({e.strerror or e}); make room there or "
                  "set config.data.cache_dir to another folder.") from e
  return tokenizer


def _sample(source: Source, budget: int) -> list[str]:
  """Returns pieces spread evenly over a source, of about `budget` characters at most, in one pass.

  Every `stride`-th piece is kept. When they become too many, every second one is dropped and the stride doubles.
  """
  kept, size, stride = [], 0, 1
  for number, (text, _) in enumerate(source.pieces("train")):
    if number % stride:
      continue
    kept.append(text)
    size += len(text)
    while size > budget and len(kept) > 1:
      kept = kept[::2]
      size = sum(map(len, kept))
      stride *= 2
  return kept


def _with_bytes(backend: Any, splits: list[Any]) -> Any:
  import tokenizers
  to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, to_bytes])
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens([EOS])
  return backend


def _byte_vocab() -> dict[str, int]:
  """Returns the id of each character by which byte-level tokenizers stand for a byte: the byte itself.

  Printable bytes of Latin-1 stand for themselves; the others take the characters from U+0100 on, in order (GPT-2).
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
