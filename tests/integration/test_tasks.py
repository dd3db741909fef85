"""Labelled tasks from end to end: trained, gone on with, evaluated, written for transformers, and fine-tuned from."""

import csv
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import lmjax
from lmjax import config as config_lib
from lmjax import convert, evaluate, train
from lmjax.commands import cli
from lmjax.models import families

WORDS = ("red", "blue", "green", "old", "new", "cat", "dog", "house")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  texts = [" ".join(WORDS[(i * 5 + j * (i + 3)) % 8] for j in range(2 + i % 5)) for i in range(64)]
  with open(folder / "label.csv", "w", newline="") as file:
    csv.writer(file).writerows([("text", "label", "word", "number"), *(
        (text, ("cold", "warm")["red" in text], text.split()[0], int("red" in text)) for text in texts)])
  rows = [dict(words=text.split(), tags=[("O", "B-C")[len(word) == 3] for word in text.split()],
               messages=[dict(role="user", content=text), dict(role="assistant", content=text[:3])]) for text in texts]
  (folder / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "text.txt").write_text("\n".join(texts * 4))
  return folder


def settings(folder, kind, **changes):
  tasks = {
      "classification": dict(name="label", kind="classification", source="label.csv", text="{text}", label="label"),
      "token_classification": dict(name="names", kind="token_classification", source="names.jsonl", words="words",
                                   label="tags"),
      "text_to_text": dict(name="copy", kind="text_to_text", source="label.csv", text="{text}", target="{label}",
                           max_target_tokens=8),
      "regression": dict(name="score", kind="regression", source="label.csv", text="{text}", label="number"),
      "extractive_qa": dict(name="find", kind="extractive_qa", source="label.csv", text="which", text_pair="{text}",
                            answers="word"),
      "multiple_choice": dict(name="choose", kind="multiple_choice", source="label.csv", text="{text}",
                              choices=("{word}", "{label}"), label="number"),
      "chat": dict(name="talk", kind="chat", source="names.jsonl", messages="messages")}
  heads = {"classification": "sequence", "token_classification": "token", "multi_task": "tasks",
           "regression": "sequence", "extractive_qa": "span", "multiple_choice": "choice"}
  chosen = ("classification", "token_classification") if kind == "multi_task" else (kind,)
  config = config_lib.base_config()
  preset = {"text_to_text": "t5", "chat": "llama"}.get(kind, "bert")
  config.model.update({**families.debug(families.preset(preset)), "head": heads.get(kind, "lm"), "dropout": 0.1})
  config.data.update(tokenizer="bytes", seq_len=40, cache_dir=str(folder / "cache"), validation_fraction=0.25,
                     tasks=tuple(dict(tasks[one], source=str(folder / tasks[one]["source"])) for one in chosen))
  config.objective.name = kind
  config.train.update(num_steps=6, batch_size=8, sample_length=0, log_every_steps=1)
  config.optim.update(learning_rate=1e-3)
  config.checkpoint.every_steps = 3
  config.mesh.update(data=2, fsdp=4)
  for name, value in changes.items():
    group, _, key = name.partition("__")
    config[group][key] = value
  return config


def run(folder, name, kind, **changes):
  return train.train_and_evaluate(config_lib.from_config_dict(settings(folder, kind, **changes)), str(folder / name))


@pytest.fixture(scope="module")
def several(folder):
  return run(folder, "several", "multi_task")


def metrics_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_task_has_its_loss_and_its_metrics(folder, several):
  lines = metrics_of(folder / "several")
  step, last = lines[0], lines[-1]
  assert step["label_loss"] > 0 and step["names_loss"] > 0
  # As many examples are of the one as of the other in the whole, but not in each batch of eight.
  shares = np.linalg.lstsq(*map(np.array, ([(line["label_loss"], line["names_loss"]) for line in lines[:6]],
                                           [line["loss"] for line in lines[:6]])), rcond=None)[0]
  np.testing.assert_allclose(shares, 0.5, atol=0.2)
  names = {"validation/label/loss", "validation/label/accuracy", "validation/label/calibration_error",
           "validation/names/loss", "validation/names/span_f1", "tasks/average"}
  assert names <= last.keys()
  values = [last["validation/label/accuracy"], last["validation/names/span_f1"]]
  assert last["tasks/average"] == pytest.approx(np.mean(values))


OTHER_KINDS = ("classification", "regression", "token_classification", "extractive_qa", "multiple_choice", "chat")


@pytest.mark.parametrize("kind", [
    "multi_task", "text_to_text", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHER_KINDS)])
def test_a_run_that_goes_on_ends_as_an_unbroken_one(folder, kind):
  constant = dict(optim__schedule="constant")
  whole = run(folder, f"whole_{kind}", kind, **constant)
  run(folder, f"broken_{kind}", kind, train__num_steps=3, **constant)
  assert run(folder, f"broken_{kind}", kind, **constant)["params_sha256"] == whole["params_sha256"]


def test_an_evaluation_afterwards_says_the_same(folder, several):
  last = metrics_of(folder / "several")[-1]
  again = evaluate.evaluate_workdir(str(folder / "several"))
  assert again == pytest.approx({name: last[name] for name in again}, rel=1e-5)
  assert evaluate.evaluate_workdir(str(folder / "several"), sets=["validation/names"]).keys() == {
      name for name in again if name.startswith("validation/names/")}


def test_transformers_reads_texts_and_labels_alike(folder, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  run(folder, "label", "classification")
  convert.convert(folder / "label", tmp_path / "hf")
  reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
  assert theirs.config.id2label == {0: "cold", 1: "warm"}
  model, params = lmjax.load(folder / "label")
  texts = ["red cat", "a new blue dog house"]
  batch = reader(texts, padding=True, return_tensors="pt")
  framed = lmjax.load_tokenizer(folder / "label").encode(texts[1], add_special_tokens=True)
  assert batch["input_ids"][1].tolist() == framed
  with torch.no_grad():
    expected = theirs(**batch).logits.numpy()
  logits = model.apply({"params": params}, batch["input_ids"].numpy(), None, batch["attention_mask"].numpy(),
                       batch["token_type_ids"].numpy())
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_transformers_reads_the_same_token_of_a_decoder(folder, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  gpt2 = {**families.debug(families.preset("gpt2")), "head": "sequence", "architecture": "decoder", "token_types": 0,
          "pooler": "none", "head_transform": False, "head_bias": False, "embedding_norm": False, "embedding_dim": None}
  run(folder, "decoder", "classification", **{f"model__{name}": value for name, value in gpt2.items()})
  convert.convert(folder / "decoder", tmp_path / "hf")
  reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
  model, params = lmjax.load(folder / "decoder")
  batch = reader(["red cat", "a new blue dog house"], padding=True, return_tensors="pt")
  with torch.no_grad():
    expected = theirs(**batch).logits.numpy()
  logits = model.apply({"params": params}, batch["input_ids"].numpy(), None, batch["attention_mask"].numpy())
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def leaves(params, *parts):
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
          if any(part in jax.tree_util.keystr(path) for part in parts)}


@pytest.fixture(scope="module")
def pretrained(folder):
  """Returns the workdir and the Hugging Face folder of a model that has learned masked tokens, of another shape."""
  run(folder, "pretrained", "classification", objective__name="masked_lm", data__tasks=(), model__mlp_dim=96,
      objective__sentence_pairs="next", model__head="pretraining", data__source=str(folder / "text.txt"))
  convert.convert(folder / "pretrained", folder / "pretrained_hf")
  return {"run": folder / "pretrained", "hf": folder / "pretrained_hf"}


@pytest.mark.parametrize("source", ["run", "hf"])
@pytest.mark.parametrize("kind", ["classification", "multi_task"])
def test_fine_tuning_starts_from_a_folder(folder, pretrained, source, kind):
  name = f"tuned_{source}_{kind}"
  frozen = dict(optim__learning_rate=0.0, train__num_steps=3)
  run(folder, name, kind, checkpoint__finetune_from=str(pretrained[source]), **frozen)
  _, params = lmjax.load(folder / name)
  model, source_params = lmjax.load(pretrained[source])
  mine, theirs = leaves(params, "['layers']", "['embed']"), leaves(source_params, "['layers']", "['embed']")
  assert mine.keys() == theirs.keys() and len(mine) > 10 and model.cfg.mlp_dim == 96
  assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
  heads = {path.split("'")[1] for path in leaves(params, "_head'")}
  assert heads == ({"sequence_head"} if kind == "classification" else {"label_head", "names_head"})
  pooler = next(leaf for path, leaf in leaves(params, "pooler").items() if "kernel" in path)
  np.testing.assert_array_equal(pooler, source_params["pretraining_head"]["pooler"]["kernel"])


def test_under_adapters_the_new_head_learns(folder, pretrained):
  run(folder, "adapted", "classification", checkpoint__finetune_from=str(pretrained["run"]), optim__lora_rank=2,
      optim__learning_rate=1e-2)
  _, params = lmjax.load(folder / "adapted")
  _, source_params = lmjax.load(pretrained["run"])
  assert np.abs(params["sequence_head"]["out"]["bias"]).max() > 0  # It starts at zero.
  at = lambda tree, path: functools.reduce(dict.__getitem__, path.split("/"), tree)
  same = lambda path: np.array_equal(at(params, path), at(source_params, path))
  assert same("layers/mlp/up/kernel") and not same("layers/attention/query/kernel")


def test_the_best_checkpoint_is_of_a_tasks_metric(folder):
  run(folder, "best", "classification", eval__every_steps=1, eval__best_metric="validation/accuracy",
      eval__patience=2)
  best = json.loads((folder / "best" / "best.json").read_text())
  seen = [line["validation/accuracy"] for line in metrics_of(folder / "best") if "validation/accuracy" in line]
  assert best["value"] == max(seen)


@pytest.mark.parametrize("flags,told", [
    (("data.tasks=stdlib/pakages",), "names 'stdlib/pakages', which is no task; did you mean 'stdlib/packages'"),
    (("data.tasks=glue/sst2", "data.data_dir=."), "TFDS data set 'glue' is not prepared in ."),
    (("checkpoint.finetune_from=nowhere",), "There is no folder nowhere"),
    (("data.tasks=stdlib/identifiers",), "the task 'stdlib/identifiers' of config.data.tasks is of kind token_class"),
])
def test_a_wrong_request_is_one_sentence(run_wrong, flags, told, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  experiment = pathlib.Path(__file__).parents[2] / "experiments" / "finetune.py"
  status, err, line = run_wrong("train", f"--config={experiment}", "--workdir=run", *(f"--config.{f}" for f in flags))
  assert status == 2 and told in line, err
  assert not (tmp_path / "run").exists()


def test_data_describes_a_task(folder, capsys, tmp_path):
  (tmp_path / "e.py").write_text(f"""
from lmjax.config import base_config
def get_config():
  c = base_config()
  c.model.update(architecture="encoder", head="sequence")
  c.data.update(tokenizer="bytes", tasks=(dict(name="label", source={str(folder / "label.csv")!r}, text="{{text}}",
                label="label"),))
  c.objective.name = "classification"
  c.train.num_steps = 1
  return c
""")
  assert cli.run(["data", f"--config={tmp_path / 'e.py'}"]) == 0
  out = capsys.readouterr().out
  assert "records" in out and "cold" in out and "warm" in out
