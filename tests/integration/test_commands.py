"""The commands one after the other on one finished run, as a user goes through them."""

import json

import pytest

from lmjax.commands import cli


@pytest.fixture(scope="module")
def finished(texts, debug, command_line_in, tmp_path_factory):
  """Returns (workdir, what the run printed to stdout, to stderr) of a small Llama-style run."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  settings = {
      "data.source": texts / "notes/*.txt", "data.tokenizer": "bpe", "data.tokenizer_vocab_size": 300,
      "train.num_steps": 40, "train.ema_decay": 0.8, "eval.final_num_batches": None, "checkpoint.every_steps": 30,
      "model.norm": "rmsnorm", "model.position": "rotary", "model.activation": "silu", "model.gated_mlp": True,
      "model.use_bias": False, "model.num_kv_heads": 2, "model.tie_embeddings": False}
  status, out, err = command_line_in(workdir.parent)(
      "train", debug, f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items()))
  assert status == 0, err
  return workdir, out, err


@pytest.fixture
def succeed(capsys):
  """Returns a function that runs lmjax in this process, asserts that all went well, and gives what it printed."""
  def succeed(*argv):
    capsys.readouterr()
    assert cli.run([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out
  return succeed


@pytest.fixture(scope="module")
def converted(finished, command_line_in):
  """Returns (a Hugging Face folder made of that run, what was printed)."""
  workdir, _, _ = finished
  folder = workdir.parent / "hf"
  return folder, command_line_in(workdir.parent).succeed("convert", f"--source={workdir}", f"--target={folder}")


def test_train_leaves_what_it_should_and_says_what_it_did(finished, read_result):
  workdir, out, err = finished
  names = {path.name for path in workdir.iterdir()}
  assert {"config.json", "metrics.jsonl", "samples.jsonl", "result.json", "tokenizer.json", "checkpoints"} <= names
  assert any(name.startswith("events.out.tfevents") for name in names)
  assert not any(name.endswith(".tmp") for name in names)
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["30", "40"]
  sample = json.loads((workdir / "samples.jsonl").read_text())
  assert sample["step"] == 40 and sample["prompt"] + sample["text"] in out
  assert "step 40/40 (100%)" in err and "Traceback" not in err and "Warning" not in err
  assert f"step 40  validation: loss {read_result(workdir)['eval_loss']:.3f}" in err
  assert f"bits per byte {read_result(workdir)['bits_per_byte']:.3f}" in err


def test_training_again_changes_nothing(finished, lmjax_command):
  workdir, _, _ = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  status, out, err = lmjax_command("train", "--config=" + str(_experiment(workdir)), f"--workdir={workdir}")
  assert status == 0 and "already finished" in err and out == ""
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def _experiment(workdir):
  """Writes the run's own config as an experiment file."""
  path = workdir.parent / "same.py"
  path.write_text(f"""\
import json
from lmjax.config import base_config
def get_config():
  config = base_config()
  for name, value in json.load(open({str(workdir / 'config.json')!r})).items():
    if isinstance(value, dict):
      with config.unlocked():
        config[name].update({{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}})
    else:
      config[name] = value
  return config
""")
  return path


def test_eval_gives_the_numbers_of_the_final_evaluation(finished, lmjax_command, read_metrics):
  workdir, _, _ = finished
  final = {name: value for name, value in read_metrics(workdir)[-1].items() if name != "step"}
  out = lmjax_command.succeed("eval", f"--workdir={workdir}")
  assert json.loads(out.splitlines()[-1]) == pytest.approx(final, rel=1e-6)


def test_eval_of_an_earlier_step_gives_others(finished, succeed, read_metrics):
  workdir, _, _ = finished
  out = succeed("eval", workdir, "--step=30", "--sets=validation")
  assert json.loads(out.splitlines()[-1])["validation/loss"] > read_metrics(workdir)[-1]["validation/loss"]


def test_generate_is_greedy_or_follows_its_seed(finished, succeed):
  workdir, _, _ = finished
  generate = lambda *flags: succeed(
      "generate", workdir, "--prompt=The cat", "--max_new_tokens=20", *flags)
  greedy = generate("--temperature=0")
  assert greedy.startswith("The cat") and len(greedy) > len("The cat\n")
  assert generate("--temperature=0", "--seed=1") == greedy
  assert generate("--seed=1") != generate("--seed=2")


def test_data_describes_what_was_trained_on(finished, succeed, read_metrics):
  workdir, _, _ = finished
  out = succeed("data", f"--config={_experiment(workdir)}")
  assert "validation" in out and "bytes per token" in out and "The " in out


def test_report_draws_the_run(finished, succeed):
  workdir, _, _ = finished
  out = succeed("report", workdir)
  page = workdir / "report.html"
  assert out == f"{page}\n" and "<svg" in page.read_text()


def test_convert_keeps_the_model(finished, converted, succeed):
  workdir, _, _ = finished
  folder, said = converted
  assert "model_type llama" in said
  assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
  flags = ("--prompt=The dog", "--max_new_tokens=20", "--temperature=0")
  assert succeed("generate", folder, *flags) == succeed("generate", workdir, *flags)


def test_a_run_starts_from_another_and_from_a_hugging_face_folder(finished, converted, lmjax_command, tmp_path,
                                                                  read_metrics):
  workdir, _, _ = finished
  folder, _ = converted
  first = {}
  for name, path in (("restore_from", workdir), ("import_from", folder)):
    lmjax_command.succeed(
        "train", f"--config={_experiment(workdir)}", f"--workdir={tmp_path / name}",
        f"--config.checkpoint.{name}={path}", "--config.train.num_steps=1", "--config.train.log_every_steps=1",
        "--config.optim.warmup_steps=0", "--config.train.sample_length=0",
        f"--config.data.tokenizer={folder / 'tokenizer.json'}")
    first[name] = read_metrics(tmp_path / name)[0]["loss"]
  assert first["restore_from"] == pytest.approx(first["import_from"], abs=1e-6)
  assert first["restore_from"] < read_metrics(workdir)[0]["loss"] - 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
  assert cli.run([command, "--help"]) == 0
  assert capsys.readouterr().out.startswith(f"lmjax {command}: ")
