"""Chat templates: what is rendered, which parts the assistant has written, and where a template comes from."""

import json

import pytest

from lmjax.config import UserError
from lmjax.data import chat
from lmjax.data.tokenizer import byte_tokenizer

USER, ANSWER = dict(role="user", content="Hi"), dict(role="assistant", content="Hello\nyou")
LLAMA = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
         "{{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}"
         "{{ eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}")


def test_chatml():
  text, answers = chat.answers_in([USER, ANSWER, USER, ANSWER], chat.CHATML, {}, "it")
  turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello\nyou<|im_end|>\n"
  assert text == turn * 2
  assert [text[start:stop] for start, stop in answers] == ["Hello\nyou<|im_end|>"] * 2


def test_a_template_of_another_kind_names_special_tokens():
  special = {"bos_token": "<s>", "eos_token": "</s>"}
  text, answers = chat.answers_in([USER, ANSWER], LLAMA, special, "it")
  assert text == "<s>[INST] Hi [/INST] Hello\nyou</s>"
  assert [text[start:stop] for start, stop in answers] == [" Hello\nyou</s>"]


@pytest.mark.parametrize("messages,template,told", [
    ([dict(role="tool", content="x"), ANSWER], LLAMA, r"does not take the messages \(no such role\)"),
    ([USER], chat.CHATML, "it has no message of the role assistant"),
    ([USER, ANSWER], "{% for", "does not take the messages"),
    ([USER, ANSWER, USER], "{{ messages[-1].content }}", "it: the chat template writes message 1 otherwise once"),
])
def test_what_cannot_be_told_is_one_sentence(messages, template, told):
  with pytest.raises(UserError, match=told):
    chat.answers_in(messages, template, {"bos_token": "", "eos_token": ""}, "it")


def test_a_template_cannot_reach_python():
  with pytest.raises(UserError, match="does not take the messages"):
    chat.rendered([USER], "{{ messages.__class__.__mro__[1].__subclasses__() }}", {})


def test_a_template_lies_beside_the_tokenizer(tmp_path):
  file = tmp_path / "tokenizer.json"
  assert chat.chat_template(str(file)) == chat.CHATML and not chat.has_template("bpe")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "A"}]}))
  assert chat.chat_template(str(file)) == "A"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "B"}))
  assert chat.chat_template(str(tmp_path)) == "B"
  (tmp_path / chat.TEMPLATE_FILE).write_text("C")
  assert chat.chat_template(str(file)) == "C"


def test_a_prompt_ends_where_the_answer_begins(tmp_path):
  tokenizer = byte_tokenizer()
  ids = tokenizer.add_special(chat.SPECIAL_TOKENS)
  made, end = chat.prompt("Hi", tokenizer, str(tmp_path / "tokenizer.json"))
  assert tokenizer.decode(made) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  assert end == ids["<|im_end|>"] and made.count(end) == 1
