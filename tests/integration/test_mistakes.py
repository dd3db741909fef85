"""What a user can get wrong: each mistake ends in one sentence with the way out, and leaves nothing half-written."""

import json
import re
import shutil

import pytest

from lmjax.commands import cli

# Settings of every run here: small, on the tests' eight devices.
SMALL = ("data.tokenizer=bytes", "data.source={texts}/notes/*.txt", "train.num_steps=2", "optim.warmup_steps=0",
         "train.sample_length=0", "eval.num_batches=1", "eval.final_num_batches=1", "tracking.tensorboard=false")


@pytest.fixture(scope="module")
def finished(texts, debug, tmp_path_factory):
  """Returns the workdir of a finished run."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  flags = [f"--config.{setting.format(texts=texts)}" for setting in SMALL]
  assert cli.run(["train", debug, f"--workdir={workdir}", *flags]) == 0
  return workdir


@pytest.fixture
def fail(capsys):
  """Returns a function that runs lmjax in this process, asserts that it fails as it should, and gives its sentence."""
  def fail(*argv):
    capsys.readouterr()
    status = cli.run([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == "" and "Traceback" not in err
    assert "(run again with --debug" not in err, err
    line = err.splitlines()[-1]
    assert line.startswith("lmjax: error: ") and line.endswith((".", "?")), err
    return line.removeprefix("lmjax: error: ")
  return fail


@pytest.fixture
def broken(tmp_path):
  """Returns a folder of files that are no good, among them an empty one."""
  folder = tmp_path / "broken"
  folder.mkdir()
  (folder / "empty.txt").write_bytes(b"")
  (folder / "binary.txt").write_bytes(bytes(range(256)))
  (folder / "latin1.txt").write_bytes("Gödel".encode("latin-1"))
  (folder / "cut.jsonl").write_text('{"text": "one"}\n{"text": "tw\n')
  (folder / "records.jsonl").write_text('{"txt": "one"}\n')
  (folder / "table.parquet").write_text("no table")
  (folder / "tokenizer.json").write_text("{}")
  return folder


def snapshot(folder):
  return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("override, message", [
    ("data.source={texts}/nothing/*.txt", r"matches no file or folder .*; give stdlib, a path or glob"),
    ("data.source={broken}/empty.txt", r"nothing in \S*empty\.txt .*; give files that hold text"),
    ("data.source={broken}/binary.txt", r"binary\.txt is not UTF-8 text \(byte 128\); convert it, or leave it out"),
    ("data.source={broken}/latin1.txt", r"latin1\.txt is not UTF-8 text \(byte 1\)"),
    ("data.source={broken}/cut.jsonl", r"cut\.jsonl:2 is not valid JSON"),
    ("data.source={broken}/records.jsonl", r"records\.jsonl:1 has no field 'text' .*did you mean 'txt'\?"),
    ("data.source={broken}/table.parquet", r"table\.parquet is not a readable parquet file"),
    ("data.source=tfds:imdb", r"'imdb'"),
    ("data.source=", r"config\.data\.source"),
    ("data.weights=(1.0,2.0)", r"2 values for the 1 sources of config\.data\.source"),
    ("data.validation_fraction=0", r"validation split .* has no text; raise config\.data\.validation_fraction"),
    ("data.tokenizer={broken}/none.json", r"no tokenizer file \S*none\.json .*; give bytes, bpe or the path"),
    ("data.tokenizer={broken}/tokenizer.json", r"tokenizer\.json is not a tokenizer file"),
    ("model.vocab_size=100", r"has 257 tokens but config\.model\.vocab_size is 100; set it to 257 or more"),
    ("model.num_heads=3", r"num_heads = 3 does not divide embed_dim = 64"),
    ("model.max_positions=10", r"more than the 10 learned positions"),
    ("train.batch_size=6", r"make batch_size a multiple of 8"),
    ("train.grad_accum_steps=3", r"which config\.train\.grad_accum_steps = 3 does not divide"),
    ("mesh.tensor=3", r"tensor=3.* does not fit 8 device"),
    ("mesh.fsdp=-1", r"Only one axis of config\.mesh may be -1"),
    ("mesh.stage=2", r"config\.mesh\.stage is 2, but splitting over stage is not supported yet"),
    ("optim.warmup_steps=3", r"warms up for 3 steps, but the run has only 2"),
    ("optim.weight_decay_policy=(('nothing/here', 0.0),)", r"nothing/here"),
    ("optim.name=adam", r"did you mean 'adamw'\?"),
    ("optim.learning_rate=fast", r"--config\.optim\.learning_rate is 'fast', but it must be a value of type float"),
    ("optim.larning_rate=1", r"did you mean 'optim\.learning_rate'\?"),
    ("eval.sets=('validaton',)", r"did you mean 'validation'\?"),
    ("checkpoint.restore_from={broken}", r"\S*broken has no checkpoints; give the workdir of a run"),
    ("checkpoint.restore_from={broken}/none", r"no folder \S*broken/none"),
    ("checkpoint.import_from={broken}", r"\S*broken has no config\.json; give a Hugging Face folder"),
])
def test_a_run_that_cannot_start(fail, texts, broken, debug, tmp_path, override, message):
  settings = [setting.format(texts=texts, broken=broken) for setting in (*SMALL, override)]
  workdir = tmp_path / "run"
  said = fail("train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings))
  assert re.search(message, said), said
  assert not workdir.exists() or not any(path.is_file() for path in workdir.rglob("*"))


@pytest.mark.parametrize("override, message", [
    ("model.embed_dim=128", r"The checkpoint of step 2 in \S*checkpoints has \S+ of shape .*; use the config it was "
     "saved with, or another workdir"),
    ("model.num_layers=3", r"of shape \(2, .*, but the config makes it \(3, "),
    ("model.tie_embeddings=false", r"has no params/head"),
    ("optim.name=lion", r"; use the config it was saved with, or another workdir"),
    ("train.ema_decay=0.9", r"has no ema/"),
])
def test_a_changed_config_cannot_go_on(fail, finished, texts, debug, tmp_path, override, message):
  workdir = shutil.copytree(finished, tmp_path / "run")
  before = snapshot(workdir)
  settings = [setting.format(texts=texts) for setting in (*SMALL, "train.num_steps=3", override)]
  said = fail("train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings))
  assert re.search(message, said), said
  assert snapshot(workdir) == before


def test_a_loss_that_is_not_finite_stops_the_run(fail, texts, debug, tmp_path):
  settings = [setting.format(texts=texts) for setting in (
      *SMALL, "train.num_steps=20", "optim.name=sgd", "optim.learning_rate=1e30", "optim.clip_norm=none")]
  said = fail("train", debug, f"--workdir={tmp_path / 'run'}", *(f"--config.{setting}" for setting in settings))
  assert re.search(r"at step \d+ is not finite .*; lower config\.optim\.learning_rate or set "
                   r"config\.train\.on_nonfinite=skip", said), said
  assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("argv, message", [
    (["train", "--config=nowhere.py", "--workdir=w"], r"--config=nowhere\.py names no file"),
    (["train", "--config={root}/experiments/gpt2.py:125M", "--workdir=w"], r"125M.*124M"),
    (["train", "--config={root}/experiments/llama.py:9B", "--workdir=w"], r"9B.*8B"),
    (["train", "--config={root}/experiments/debug.py:large", "--workdir=w"], r"takes no argument, but 'large' was"),
    (["train", "--config={root}/experiments/debug.py"], r"needs --workdir"),
    (["eval", "--workdir={broken}"], r"\S*broken holds no run: it has no config\.json"),
    (["eval", "--workdir={run}", "--step=7"], r"no checkpoint of step 7; it has those of 2"),
    (["eval", "--workdir={run}", "--sets=tset"], r"no evaluation set 'tset'; known are: validation"),
    (["eval", "--workdir={run}", "--step=last"], r"flag --step=last must be of type int"),
    (["generate", "--workdir=nowhere", "--prompt=a"], r"folder nowhere"),
    (["generate", "--workdir={run}", "--prompt=a", "--max_new_tokens=64"], r"the model has 64 learned positions"),
    (["generate", "--workdir={run}", "--prompt=a", "--top_p=2"], r"top_p is 2\.0, but it must be above 0"),
    (["convert", "--source=nowhere", "--target=t"], r"There is no folder nowhere"),
    (["convert", "--source={run}", "--target={broken}"], r"\S*broken exists already and is not an empty folder"),
    (["report", "--workdir={broken}"], r"\S*broken"),
    (["data", "--config={root}/experiments/debug.py", "--config.data.source=nowhere"], r"'nowhere' matches no file"),
    (["trian"], r"no command 'trian'; did you mean 'train'\?"),
])
def test_a_wrong_request(fail, finished, broken, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  root = cli.__file__.removesuffix("/lmjax/commands/cli.py")
  before = snapshot(tmp_path), snapshot(finished)
  said = fail(*(argument.format(root=root, run=finished, broken=broken) for argument in argv))
  assert re.search(message, said), said
  assert (snapshot(tmp_path), snapshot(finished)) == before


def test_a_workdir_that_is_a_file(fail, texts, debug, tmp_path):
  (tmp_path / "file").write_text("mine")
  settings = [f"--config.{setting.format(texts=texts)}" for setting in SMALL]
  assert str(tmp_path / "file") in fail("train", debug, f"--workdir={tmp_path / 'file'}", *settings)
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name, text, argv", [
    ("config.json", "{", ["eval"]),
    ("config.json", "{}", ["eval"]),
    ("config.json", '{"model": {"num_layer": 2}}', ["eval"]),
    ("config.json", "{", ["generate", "--prompt=a"]),
    ("tokenizer.json", "{", ["generate", "--prompt=a"]),
    ("metrics.jsonl", "{\n", ["report"]),
])
def test_a_damaged_workdir(fail, finished, tmp_path, name, text, argv):
  workdir = shutil.copytree(finished, tmp_path / "run")
  (workdir / name).write_text(text)
  before = snapshot(workdir)
  assert name in fail(argv[0], f"--workdir={workdir}", *argv[1:])
  assert snapshot(workdir) == before
