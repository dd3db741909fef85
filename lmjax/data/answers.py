"""Answers that stand in a text: where they are in characters, and which tokens of an encoding cover them."""

from typing import Any, Mapping, NamedTuple

from lmjax.config_checks import UserError
from lmjax.data.task import Task, render, value_at


class Answer(NamedTuple):
  """An answer and the character of the text at which it starts."""
  text: str
  start: int


def find_answers(task: Task, record: Mapping[str, Any], where: str) -> list[Answer]:
  """Returns the answers of a record of extractive_qa; none where the text holds none.

  Raises:
    UserError: for an answer that does not stand in the text, or not where the record says.
  """
  text = render(task.text_pair, record, where)
  answers = value_at(record, task.answers, where)
  answers = [answer for answer in (answers if isinstance(answers, list) else [answers]) if answer not in ("", None)]
  for answer in answers:
    if not isinstance(answer, str):
      raise UserError(f"{where} has the answer {answer!r}, which is no text; mend the record.")
  starts = value_at(record, task.starts, where) if task.starts else [text.find(answer) for answer in answers]
  starts = [_character(start, where) for start in (starts if isinstance(starts, list) else [starts])[:len(answers)]]
  if len(starts) < len(answers):
    raise UserError(f"{where} has {len(answers)} answers but {len(starts)} starts; mend the record.")
  for answer, start in zip(answers, starts):
    if start < 0 or text[start:start + len(answer)] != answer:
      raise UserError(f"{where} has the answer {answer[:60]!r}, which does not stand in the text"
                      f"{f' at character {start}' if start >= 0 else ''}; mend the record.")
  return [Answer(*pair) for pair in zip(answers, starts)]


def _character(value: Any, where: str) -> int:
  """Returns the number of a character, which a .csv has as text."""
  try:
    return int(value)
  except (TypeError, ValueError) as e:
    raise UserError(f"{where} has an answer that starts at {value!r}, which is no number; mend the record.") from e


def tokens_of(encoding: Any, answer: Answer) -> tuple[int, int] | None:
  """Returns the first and the last token of an answer in a window of its text, or None where it is not whole there."""
  stop = answer.start + len(answer.text)
  inside = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
  if not inside or encoding.offsets[inside[0]][0] > answer.start or encoding.offsets[inside[-1]][1] < stop:
    return None
  covering = [place for place in inside if encoding.offsets[place][1] > answer.start
              and encoding.offsets[place][0] < stop]
  return (covering[0], covering[-1]) if covering else None


def check_answers(task: Task, answers: list[Answer], windows: list[Any], where: str) -> None:
  """Raises a UserError for an answer that has more tokens than the task allows, or fits into no window."""
  for answer in answers[:1]:
    spans = [span for window in windows if (span := tokens_of(window, answer))]
    if not spans:
      raise UserError(f"{where} has the answer {answer.text[:60]!r}, which is too long to stand in a window of "
                      "config.data.seq_len tokens; make that larger, or leave the record out.")
    length = spans[0][1] - spans[0][0] + 1
    if length > task.max_answer_tokens:
      raise UserError(f"{where} has the answer {answer.text[:60]!r} of {length} tokens, longer than the "
                      f"{task.max_answer_tokens} of the task's max_answer_tokens; raise that, or leave the record out.")
