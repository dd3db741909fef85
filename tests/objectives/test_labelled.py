"""Labelled objectives: losses equal transformers', rows hold what the records say, and predictions become answers."""

import dataclasses

from flax import linen as nn
import jax
import numpy as np
import pytest
import tokenizers

import lmjax
from lmjax import objectives
from lmjax.config import ObjectiveConfig, UserError
from lmjax.models.transformer import init_params, make_model
from lmjax.objectives import extractive_qa, text_to_text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BERT = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64)
TEXTS = ["the red cat", "a dog of one colour", "blue house on a hill", "no", "one two three four five six"] * 4
LABEL = dict(name="label", kind="classification", text="{text}", label="label", labels=("no", "yes", "so"))
PAIR = dict(LABEL, text_pair="and {text}")
ROWS = [dict(text=text, label=["no", "yes", "so"][i % 3]) for i, text in enumerate(TEXTS)]


def reference(name, folder, **settings):
  torch.manual_seed(0)
  model = getattr(transformers, name)(transformers.BertConfig(**BERT, **settings)).eval()
  model.save_pretrained(folder)
  return model, *lmjax.load(folder)


def inputs(seed=0, shape=(4, 12)):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(5, shape[-1] + 1, shape[:-1])
  real = (np.arange(shape[-1]) < lengths[..., None]).astype(np.int32)
  types = (np.arange(shape[-1]) >= 4).astype(np.int32) * real
  return {"inputs": rng.integers(5, 300, shape).astype(np.int32) * real, "segment_ids": real, "token_types": types}


def theirs(batch):
  names = {"input_ids": "inputs", "attention_mask": "segment_ids", "token_type_ids": "token_types"}
  return {name: torch.tensor(batch[ours]).long() for name, ours in names.items()}


def loss_of(name, model, params, batch):
  total, sums = objectives.OBJECTIVES[name].loss(model, params, batch, ObjectiveConfig(name=name))
  np.testing.assert_allclose(total, sums["loss"], rtol=1e-6)
  return float(total / sums["weight"])


def test_classification_equals_transformers(tmp_path):
  hf, model, params = reference("BertForSequenceClassification", tmp_path, num_labels=3)
  batch = inputs() | {"labels": np.array([0, 2, 1, 1], np.int32), "weights": np.ones(4, np.float32)}
  expected = hf(**theirs(batch), labels=torch.tensor(batch["labels"]).long()).loss.item()
  assert loss_of("classification", model, params, batch) == pytest.approx(expected, abs=1e-4)


def test_regression_equals_transformers(tmp_path):
  hf, model, params = reference("BertForSequenceClassification", tmp_path, num_labels=1)
  batch = inputs() | {"numbers": np.array([0, 2.5, -1, 1], np.float32), "weights": np.ones(4, np.float32)}
  expected = hf(**theirs(batch), labels=torch.tensor(batch["numbers"])).loss.item()
  assert loss_of("regression", model, params, batch) == pytest.approx(expected, abs=1e-4)


def test_token_classification_equals_transformers(tmp_path):
  hf, model, params = reference("BertForTokenClassification", tmp_path, num_labels=5)
  batch = inputs()
  labels = np.random.default_rng(1).integers(0, 5, (4, 12)).astype(np.int32)
  batch |= {"labels": labels, "weights": (batch["segment_ids"] * (labels != 2)).astype(np.float32)}
  marked = torch.tensor(np.where(batch["weights"] > 0, labels, -100)).long()
  expected = hf(**theirs(batch), labels=marked).loss.item()
  assert loss_of("token_classification", model, params, batch) == pytest.approx(expected, abs=1e-4)


def test_extractive_qa_equals_transformers_but_for_padding(tmp_path):
  hf, model, params = reference("BertForQuestionAnswering", tmp_path)
  batch = inputs() | {"starts": np.array([0, 1, 2, 3], np.int32), "ends": np.array([0, 3, 2, 4], np.int32),
                      "weights": np.ones(4, np.float32)}
  expected = []
  for i, length in enumerate(batch["segment_ids"].sum(1)):  # Theirs spreads probability over padding.
    row = {name: value[i:i + 1, :length] for name, value in batch.items() if value.ndim == 2}
    at = {f"{name}_positions": torch.tensor(batch[f"{name}s"][i:i + 1]).long() for name in ("start", "end")}
    expected.append(hf(**theirs(row), **at).loss.item())
  assert loss_of("extractive_qa", model, params, batch) == pytest.approx(np.mean(expected), abs=1e-4)


def test_multiple_choice_equals_transformers(tmp_path):
  hf, model, params = reference("BertForMultipleChoice", tmp_path)
  batch = inputs(shape=(4, 3, 12)) | {"labels": np.array([0, 2, 1, 1], np.int32), "weights": np.ones(4, np.float32)}
  expected = hf(**theirs(batch), labels=torch.tensor(batch["labels"]).long()).loss.item()
  assert loss_of("multiple_choice", model, params, batch) == pytest.approx(expected, abs=1e-4)


def test_a_pair_is_framed_and_cut_at_the_longer_text(labelled):
  made = labelled(("bert", dict(head="sequence")), [PAIR], [ROWS], seq_len=16, name="classification")
  cls, sep = (made.tokenizer.add_special([name])[name] for name in ("cls", "sep"))
  row, example = made.row(0), made.data.train[0]
  words = made.tokenizer.decode(row["inputs"][row["segment_ids"] > 0])
  assert example["record"]["text"] == "the red cat" and words == "[CLS]the re[SEP]and the[SEP]"
  assert row["inputs"][0] == cls and np.flatnonzero(row["inputs"] == sep).tolist() == [7, 15]
  np.testing.assert_array_equal(row["token_types"], [0] * 8 + [1] * 8)
  assert row["labels"] == 0 and row["weights"] == 1


def test_the_first_piece_of_each_word_bears_its_label(labelled):
  rows = [dict(words=["ab", "cde", "f"], tags=["X", "Y", "X"])] * 8
  task = dict(name="names", kind="token_classification", words="words", label="tags")
  made = labelled(("bert", dict(head="token")), [task], [rows], seq_len=10, name="token_classification")
  row = made.row(0)  # [CLS] a b _ c d e _ f [SEP], a byte a token.
  np.testing.assert_array_equal(np.flatnonzero(row["weights"]), [1, 4, 8])
  np.testing.assert_array_equal(row["labels"][[1, 4, 8]], [0, 1, 0])
  short = labelled(("bert", dict(head="token")), [task], [rows], seq_len=6, name="token_classification").row(0)
  np.testing.assert_array_equal(np.flatnonzero(short["weights"]), [1, 4])


QA = dict(name="find", kind="extractive_qa", text="which", text_pair="{text}", answers="answer", starts="start")


@pytest.fixture(scope="module")
def found(labelled):
  text = " ".join(f"word{i}" for i in range(12))
  rows = [dict(text=text, answer=f"word{i}", start=text.index(f"word{i}")) for i in range(10)]
  rows += [dict(text=text, answer="", start=0)] * 2
  return labelled(("bert", dict(head="span")), [QA], [rows], seq_len=40, name="extractive_qa")


def test_each_answer_is_in_some_window_and_null_elsewhere(found):
  train, seen = found.data.train, {}
  assert train.num_examples > len(train.parts[0].records)
  for number in range(train.num_examples):
    example = train[number]
    row = found.make(example, (0, number))
    text = found.tokenizer.decode(row["inputs"][row["starts"]:row["ends"] + 1])
    seen.setdefault(example["of"], set()).add(text)
    assert text in ("[CLS]", example["record"]["answer"]), text
  for of, texts in seen.items():
    answer = train.parts[0].records[of]["answer"]
    assert (answer in texts) == bool(answer) and "[CLS]" in texts


def test_the_best_answer_is_searched_over_all_windows(found):
  recipe, task, train = found.recipe, found.data.tasks[0], found.data.train
  examples = [train[number] for number in range(train.num_examples)]
  rows = [found.make(example, (0, 0)) for example in examples]
  starts, ends = (np.stack([np.eye(40)[row[name]] * 5 for row in rows]) for name in ("starts", "ends"))
  right = extractive_qa.score(task, examples, {"starts": starts, "ends": ends}, recipe)
  assert right == {"exact_match": 1.0, "f1": 1.0}
  shy = starts.copy()
  shy[:, 0] += 20  # No answer everywhere: right for those without one.
  share = np.mean([not record["answer"] for record in {e["of"]: e["record"] for e in examples}.values()])
  for no_answer, expected in ((True, share), (False, 1 - share)):
    task = dataclasses.replace(task, no_answer=no_answer)
    values = extractive_qa.score(task, examples, {"starts": shy, "ends": ends}, recipe)
    assert values["exact_match"] == pytest.approx(expected)


def test_a_span_neither_ends_before_it_starts_nor_is_too_long(found):
  task, example = dataclasses.replace(found.data.tasks[0], max_answer_tokens=5), found.data.train[0]
  starts, ends = np.zeros(40), np.zeros(40)
  row = found.make(example, (0, 0))
  context = int(np.flatnonzero(row["token_types"])[0])
  starts[context + 6], ends[context] = 9, 9  # Backwards.
  ends[context + 16] = 8  # Eleven tokens.
  ends[context + 10] = 1
  best = extractive_qa.best_answer(example, task, starts, ends, found.recipe)
  assert best.text == example["record"]["text"][6:11] and best.value == 10


def test_a_decoder_whose_texts_have_no_end_may_tell_that_there_is_no_answer(labelled):
  made = labelled(("gpt2", dict(head="span")), [QA], [[dict(text="ab cd", answer="cd", start=3)] * 8], seq_len=40,
                  name="extractive_qa")
  example, task = made.data.train[0], made.data.tasks[0]
  # As the tokenizers of Llama frame texts: with a token before each, and none after.
  end = made.tokenizer.names_of_special()["eos_token"]
  framer = made.recipe.framer
  framer._windowed.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, made.tokenizer.eos_id)])
  last = len(framer.windows([("which", "ab cd")])[0][0].ids) - 1
  nothing = np.eye(40)[last] * 5
  assert extractive_qa.best_answer(example, task, nothing, nothing, made.recipe).answer(task) == ""
  start = np.eye(40)[last - 1] * 9
  assert extractive_qa.best_answer(example, task, start, nothing, made.recipe).answer(task) == "cd"


WRITE = dict(name="write", kind="text_to_text", text="{text}", target="{label}", max_target_tokens=6, prefix="say: ")


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_what_is_read_and_written_stands_in_the_row(labelled, family):
  made = labelled((family, {}), [WRITE], [ROWS], name="text_to_text")
  row, decode = made.row(0), made.tokenizer.decode
  if family == "t5":
    assert decode(row["encoder_inputs"][row["encoder_segment_ids"] > 0]) == "say: the red cat<|endoftext|>"
    assert row["inputs"][0] == made.recipe.start_id and row["targets"].shape == (6,)
  else:
    assert decode(row["inputs"][row["segment_ids"] > 0]) == "say: the red cat\nno"
    assert decode(row["prompts"][-int(row["prompt_lengths"]):]) == "say: the red cat\n"
  assert decode(row["targets"][row["weights"] > 0]) == "no<|endoftext|>"


def test_what_is_written_begins_and_ends_as_that_of_bart(labelled):
  made = labelled(("bart", {}), [WRITE], [ROWS], name="text_to_text")
  backend, end = made.tokenizer._backend, made.recipe.eos_id
  begin = made.tokenizer.add_special(["<s>"])["<s>"]
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A <|endoftext|>", pair="<s> $A <|endoftext|> $B <|endoftext|>",
      special_tokens=[("<s>", begin), ("<|endoftext|>", end)])
  vars(made.recipe).pop("opening", None)
  row, text = made.row(0), made.tokenizer.encode("no")
  theirs = transformers.models.bart.modeling_bart.shift_tokens_right(
      torch.tensor([[begin, *text, end]]), pad_token_id=0, decoder_start_token_id=end)[0].tolist()
  assert row["inputs"].tolist() == [*theirs, 0, 0] and row["targets"].tolist() == [begin, *text, end, 0, 0]
  example, task = made.data.train[0], dataclasses.replace(made.data.tasks[0], metrics=("exact_match",))
  assert example["record"]["label"] == "no" and text_to_text.written_bytes(task, [example], made.recipe) == 2
  for written in ([begin, *text], text):
    tokens = np.array([[*written, end, 5, 5]])
    assert text_to_text.score(task, [example], {"tokens": tokens}, made.recipe) == {"exact_match": 1.0}


def test_labels_are_written_in_words_as_t5_has_them(labelled):
  made = labelled(("t5", {}), [dict(PAIR, name="glue/mrpc".replace("/", "-"))], [ROWS], seq_len=64, name="text_to_text")
  row, decode = made.row(0), made.tokenizer.decode
  read = decode(row["encoder_inputs"][row["encoder_segment_ids"] > 0])
  assert read == "glue-mrpc text: the red cat sentence2: and the red cat<|endoftext|>"
  assert decode(row["targets"][row["weights"] > 0]) == "no<|endoftext|>"
  examples = [made.data.train[i] for i in range(3)]
  ids = [made.tokenizer.encode(text) + [made.recipe.eos_id] * 9 for text in ("no", "yes", "what")]
  tokens = np.array([row[:9] for row in ids])
  true = [example["record"]["label"] for example in examples]
  share = np.mean([said == label for said, label in zip(("no", "yes", "what"), true)])
  values = text_to_text.score(made.data.tasks[0], examples, {"tokens": tokens}, made.recipe)
  assert values == {"accuracy": pytest.approx(share)} and 0 < share < 1


def test_task_weights_make_the_loss_a_weighted_sum_of_the_tasks_means(labelled):
  other = dict(LABEL, name="other")
  made = labelled(("t5", {}), [WRITE, other], [ROWS, ROWS], name="text_to_text", task_weights=(2.0, 0.5))
  model = make_model(made.config.model)
  params = nn.unbox(init_params(model, jax.random.key(0)))
  batch = made.batch(12)
  loss = lambda batch, cfg: text_to_text.loss(model, params, batch, cfg)
  plain = dataclasses.replace(made.config.objective, task_weights=())
  of_task = []
  for task in range(2):
    own = {**batch, "weights": batch["weights"] * (batch["task"] == task)[:, None]}
    assert own["weights"].sum() > 0
    of_task.append(loss(own, plain)[0] / own["weights"].sum())
  total, sums = loss(objectives.balance(text_to_text, batch, made.config.objective), made.config.objective)
  np.testing.assert_allclose(total / sums["weight"], 2.0 * of_task[0] + 0.5 * of_task[1], rtol=1e-5)


CHAT = dict(name="chat", kind="chat", messages="messages")


def messages(*contents):
  roles = ["user", "assistant"] * len(contents)
  return {"messages": [dict(role=role, content=content) for role, content in zip(roles, contents)]}


def test_only_the_answers_of_a_chat_count(labelled):
  made = labelled(("llama", {}), [CHAT], [[messages("a b", "yes", "sure?", "no")] * 8], seq_len=128, name="chat")
  row, decode = made.row(0), made.tokenizer.decode
  im_end = made.tokenizer.add_special(["<|im_end|>"])["<|im_end|>"]
  assert decode(row["targets"][row["weights"] > 0]) == "yes<|im_end|>no<|im_end|>"
  assert row["targets"][row["weights"] > 0].tolist().count(im_end) == 2  # A token, and not its letters.
  assert decode(row["inputs"][row["segment_ids"] > 0]).startswith("<|im_start|>user\na b<|im_end|>\n<|im_start|>assis")


def test_a_chat_without_an_answer_is_told(labelled):
  made = labelled(("llama", {}), [CHAT], [[messages("a")] * 8], seq_len=64, name="chat")
  with pytest.raises(UserError, match="has no message of the role assistant"):
    made.row(0)


def test_a_training_text_is_augmented_and_one_for_evaluation_is_not(labelled):
  made = labelled(("bert", dict(head="sequence")), [LABEL], [ROWS], name="classification",
                  data=dict(augment_swap=0.5, augment_delete=0.3))
  plain = dataclasses.replace(made.recipe, training=False)
  example = next(one for one in map(made.data.train.__getitem__, range(9)) if len(one["record"]["text"]) > 20)
  texts = {made.make(example, (0, i))["inputs"].tobytes() for i in range(20)}
  same = {objectives.OBJECTIVES["classification"].make_example(example, (0, i), plain)["inputs"].tobytes()
          for i in range(20)}
  assert len(texts) > 5 and len(same) == 1
