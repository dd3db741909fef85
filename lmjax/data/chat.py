"""Chats as text: the chat template of a tokenizer's folder, and which parts of the text the assistant has written."""

import functools
import json
from typing import Any, Mapping, Sequence

from etils import epath

from lmjax.config_checks import UserError

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
# ChatML: what is used where the tokenizer's folder has no template.
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def has_template(tokenizer: str) -> bool:
  """Returns whether the folder of a tokenizer, as config.data.tokenizer names it, has a chat template."""
  return _own_template(tokenizer) is not None


def chat_template(tokenizer: str) -> str:
  """Returns the chat template of a tokenizer's folder, else ChatML's."""
  return _own_template(tokenizer) or CHATML


def _own_template(tokenizer: str) -> str | None:
  if tokenizer in ("bytes", "bpe"):
    return None
  path = epath.Path(tokenizer).expanduser()
  folder = path if path.is_dir() else path.parent
  if (folder / TEMPLATE_FILE).exists():
    return (folder / TEMPLATE_FILE).read_text()
  settings = folder / "tokenizer_config.json"
  template = json.loads(settings.read_text()).get("chat_template") if settings.exists() else None
  if isinstance(template, list):  # Several, with names.
    template = next((one["template"] for one in template if one["name"] == "default"), None)
  return template


def rendered(messages: Sequence[Mapping[str, str]], template: str, special: Mapping[str, str],
             add_generation_prompt: bool = False) -> str:
  """Returns the text of a chat.

  Args:
    messages: each with its role and content.
    template: in Jinja, as transformers has them.
    special: the special tokens that a template may name, such as {"eos_token": "</s>"}.
    add_generation_prompt: whether the text ends so that the assistant's next message follows.

  Raises:
    UserError: where the template refuses the messages or cannot be read.
  """
  import jinja2
  try:
    return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **special)
  except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as e:
    raise UserError(f"The chat template of the tokenizer's folder does not take the messages ({e}); mend one of "
                    "them.") from e


@functools.lru_cache
def _compiled(template: str) -> Any:
  import jinja2.sandbox

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                             extensions=["jinja2.ext.loopcontrols"])
  environment.globals |= {"raise_exception": refuse}
  return environment.from_string(template)


def answers_in(messages: Sequence[Mapping[str, str]], template: str, special: Mapping[str, str],
               where: str) -> tuple[str, list[tuple[int, int]]]:
  """Returns the text of a chat, and the characters [start, stop) of each of the assistant's messages in it.

  A message goes from where the text up to it, with what makes the assistant begin, ends, to where the text with it
  ends.

  Args:
    messages, template, special: as `rendered` takes them.
    where: what a message to the user calls the chat.

  Raises:
    UserError: where the assistant says nothing, or the template writes earlier messages otherwise once others follow.
  """
  whole, spans = rendered(messages, template, special), []
  for number, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    before = rendered(messages[:number], template, special, add_generation_prompt=True)
    after = rendered(messages[:number + 1], template, special)
    if not after.startswith(before) or not whole.startswith(after):
      raise UserError(f"{where}: the chat template writes message {number} otherwise once others follow, so that the "
                      "assistant's part cannot be told; use a template that does not.")
    spans.append((len(before), len(after.rstrip("\n"))))
  if not spans:
    raise UserError(f"{where} has no message of the role assistant, so that there is nothing to learn; mend it.")
  return whole, spans


def prompt(message: str, tokenizer: Any, tokenizer_file: str) -> tuple[list[int], int]:
  """Returns the ids of a chat of one message, up to where its answer begins, and the id that ends an answer.

  Args:
    message: the user's.
    tokenizer: a `lmjax.data.tokenizer.Tokenizer`.
    tokenizer_file: beside which the chat template lies.

  Raises:
    UserError: as `rendered` does.
  """
  template, special = chat_template(tokenizer_file), tokenizer.names_of_special()
  messages = [{"role": "user", "content": message}]
  text = rendered(messages, template, special, add_generation_prompt=True)
  whole, spans = answers_in([*messages, {"role": "assistant", "content": "x"}], template, special, "The prompt")
  ids, is_answer = tokenizer.encode_spans(whole, spans)
  last = ids[max(place for place, inside in enumerate(is_answer) if inside)]
  return tokenizer.encode_spans(text, [])[0], last if last in tokenizer.special_ids() else tokenizer.eos_id
