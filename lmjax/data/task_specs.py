"""Ready tasks, by the names that `config.data.tasks` may give.

Records are those of TFDS, prepared as array_record in `config.data.data_dir`, or of the standard library. Metrics are
the ones that the tasks were published with:

  - GLUE (Wang et al., arXiv 1804.07461), one table row a task; mnli is measured on its matched validation split, and
    mnli_mismatched, which trains on the same records, on the other.
  - SuperGLUE (Wang et al., arXiv 1905.00537); multirc's f1 is that over all answers, and record is read as SQuAD is.
  - SQuAD (Rajpurkar et al., arXiv 1606.05250), and its second version (arXiv 1806.03822), which asks what
    the text does not answer.
  - WMT 2014 and 2016 (Bojar et al., W14-3302 and W16-2301 of the ACL Anthology), which rank by human judgement; BLEU
    and chrF are what is usually reported.
  - CNN/DailyMail (Nallapati et al., arXiv 1602.06023), with the names left in (See et al., arXiv 1704.04368).

Prefixes are those of T5 (Raffel et al., arXiv 1910.10683, appendix D): none for SQuAD, and for the rest what the data
set is called there. C4 and LM1B are plain text and so no tasks: they are read by
config.data.source = "tfds:c4/en" or "tfds:lm1b".
"""

from typing import Any, Iterator

from lmjax.data.task import Task, parse_task

_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_FALSE_TRUE = ("False", "True")
_LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}


def _classified(name: str, columns: tuple[str, ...], labels: tuple, metrics: tuple = ("accuracy",),
                **settings: Any) -> Task:
  """Returns a task that tells the label of one or two texts."""
  return Task(**dict(name=name, source=f"tfds:{name}", **_texts(*columns), label="label", labels=labels,
                     metrics=metrics) | settings)


def _texts(text: str, text_pair: str = "") -> dict[str, str]:
  return dict(text=text, text_pair=text_pair)


def _glue() -> Iterator[Task]:
  sentences = ("{sentence1}", "{sentence2}")
  nli = ("{premise}", "{hypothesis}")
  yield _classified("glue/cola", ("{sentence}",), ("unacceptable", "acceptable"), ("matthews",))
  yield _classified("glue/sst2", ("{sentence}",), ("negative", "positive"))
  yield _classified("glue/mrpc", sentences, ("not_equivalent", "equivalent"), ("f1", "accuracy"))
  yield _classified("glue/qqp", ("{question1}", "{question2}"), ("not_duplicate", "duplicate"), ("f1", "accuracy"))
  yield _classified("glue/stsb", sentences, (), ("pearson", "spearman"), kind="regression")
  yield _classified("glue/mnli", nli, _NLI, validation="tfds:glue/mnli[validation_matched]")
  yield _classified("glue/mnli_mismatched", nli, _NLI, source="tfds:glue/mnli", prefix="mnli ",
                    validation="tfds:glue/mnli[validation_mismatched]")
  yield _classified("glue/qnli", ("{question}", "{sentence}"), _ENTAILMENT)
  yield _classified("glue/rte", sentences, _ENTAILMENT)
  yield _classified("glue/wnli", sentences, ("not_entailment", "entailment"))


def _super_glue() -> Iterator[Task]:
  nli = ("{premise}", "{hypothesis}")
  yield _classified("super_glue/boolq", ("{question}", "{passage}"), _FALSE_TRUE)
  yield _classified("super_glue/cb", nli, ("entailment", "contradiction", "neutral"), ("accuracy", "f1_macro"))
  # The column `question` holds the word "cause" or "effect".
  yield Task(name="super_glue/copa", kind="multiple_choice", source="tfds:super_glue/copa",
             text="{premise} What was the {question}?", choices=("{choice1}", "{choice2}"), label="label",
             metrics=("accuracy",))
  yield _classified("super_glue/multirc", ("{question} {answer}", "{paragraph}"), _FALSE_TRUE, ("f1",))
  yield _answered("super_glue/record", "super_glue/record", text="{query}", text_pair="{passage}", answers="answers",
                  no_answer=False)
  yield _classified("super_glue/rte", nli, _ENTAILMENT)
  yield _classified("super_glue/wic", ("{word}: {sentence1}", "{sentence2}"), _FALSE_TRUE)
  yield _classified("super_glue/wsc.fixed", ("{text}", "{span2_text} refers to {span1_text}"), _FALSE_TRUE,
                    prefix="wsc ")


def _answered(name: str, data: str, **settings: Any) -> Task:
  """Returns a task that finds the answer to a question in a text."""
  return Task(name=name, kind="extractive_qa", source=f"tfds:{data}", metrics=("squad",), **settings)


def _squad() -> Iterator[Task]:
  same = dict(text="{question}", text_pair="{context}", answers="answers/text", starts="answers/answer_start",
              prefix="")
  yield _answered("squad", "squad/v1.1", **same, no_answer=False)
  yield _answered("squad/v2", "squad/v2.0", **same)


def _translated(year: str, pair: str) -> Iterator[Task]:
  """Yields a pair of languages in both directions; TFDS calls it by the foreign one first."""
  languages = pair.split("-")
  for given, wanted in (languages, languages[::-1]):
    yield Task(name=f"{year}/{given}-{wanted}", kind="text_to_text", source=f"tfds:{year}_translate/{pair}",
               text=f"{{{given}}}", target=f"{{{wanted}}}", metrics=("bleu", "chrf"),
               prefix=f"translate {_LANGUAGES[given]} to {_LANGUAGES[wanted]}: ")


def _stdlib() -> Iterator[Task]:
  both = ("accuracy", "f1_macro")
  yield Task(name="stdlib/packages", source="stdlib:packages", text="{text}", label="package", metrics=both)
  yield Task(name="stdlib/identifiers", kind="token_classification", source="stdlib:identifiers", words="tokens",
             label="kinds", metrics=both)
  yield Task(name="stdlib/answers", kind="extractive_qa", source="stdlib:answers", text="{question}",
             text_pair="{context}", answers="answers", starts="starts", metrics=("squad",))
  yield Task(name="stdlib/docstrings", kind="text_to_text", source="stdlib:docstrings", text="{code}",
             target="{summary}", metrics=("rouge", "chrf"), max_target_tokens=48)


_SUMMARIZED = Task(name="cnn_dailymail", kind="text_to_text", source="tfds:cnn_dailymail", text="{article}",
                   target="{highlights}", prefix="summarize: ", metrics=("rouge",), max_target_tokens=128)

TASKS: dict[str, Task] = {task.name: task for task in (
    *_glue(), *_super_glue(), *_squad(), *_translated("wmt14", "de-en"), *_translated("wmt14", "fr-en"),
    *_translated("wmt16", "ro-en"), _SUMMARIZED, *_stdlib())}


def set_tasks(config: Any, names: str) -> Any:
  """Sets the tasks of an experiment's ConfigDict, and with them its objective and the head of its model.

  Args:
    config: as `lmjax.config.base_config` makes it.
    names: of ready tasks, with commas between; several of labels get a head each.

  Returns:
    The same config.

  Raises:
    UserError: for a name that is no task.
  """
  tasks = [parse_task(name.strip(), TASKS) for name in names.split(",")]
  kinds = {task.kind for task in tasks}
  several = len(tasks) > 1 and kinds != {"text_to_text"}
  config.data.tasks = tuple(task.name for task in tasks)
  config.objective.name = "multi_task" if several else tasks[0].kind
  config.model.head = "tasks" if several else tasks[0].head
  return config
