"""What a user can get wrong: each mistake ends in one sentence with the way out, and leaves nothing half-written."""

import gzip
import json
import re
import shutil

import pytest

from lmjax.commands import cli

# Settings of every run here: small, on the tests' eight devices.
SMALL = ("data.tokenizer=bytes", "data.source={texts}/notes/*.txt", "train.num_steps=2", "optim.warmup_steps=0",
         "train.sample_length=0", "eval.num_batches=1", "eval.final_num_batches=1", "tracking.tensorboard=false")

_BASE = "from lmjax.config import base_config\ndef get_config():\n  c = base_config()\n  c.train.num_steps = 2\n"
# Experiment files that are no good.
EXPERIMENTS = {
    "syntax": "def get_config(:\n  pass\n", "raises": "def get_config():\n  return open('/none')\n",
    "exits": "import sys\nsys.exit(3)\n", "zero": "x = 1\0\n", "without": "x = 1\n", "value": "get_config = 3\n",
    "endless": "def get_config():\n  return get_config()\n", "needs": "def get_config(size):\n  return size\n",
    "unset": "from lmjax.config import base_config\nget_config = base_config\n",
    "nan": _BASE + "  c.optim.learning_rate = float('nan')\n  return c\n",
    "typo": _BASE + "  c.optim.lerning_rate = 1.0\n  return c\n",
    "group": _BASE + "  with c.unlocked():\n    c.foo = 3\n  return c\n"}


@pytest.fixture(scope="module")
def finished(texts, debug, tmp_path_factory):
  """Returns the workdir of a finished run."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  flags = [f"--config.{setting.format(texts=texts)}" for setting in SMALL]
  assert cli.run(["train", debug, f"--workdir={workdir}", *flags]) == 0
  return workdir


@pytest.fixture
def fail(run_wrong):
  """Returns a function that runs lmjax in this process, asserts that it fails as it should, and gives its sentence."""
  def fail(*argv):
    status, err, line = run_wrong(*argv)
    assert status in (1, 2) and "(run again with --debug" not in err, err
    assert line.endswith((".", "?")), err
    return line.removeprefix("lmjax: error: ")
  return fail


@pytest.fixture
def broken(tmp_path):
  """Returns a folder of files that are no good, among them an empty one."""
  pa = pytest.importorskip("pyarrow")
  from pyarrow import parquet
  folder = tmp_path / "broken"
  folder.mkdir()
  (folder / "empty.txt").write_bytes(b"")
  (folder / "binary.txt").write_bytes(bytes(range(256)))
  (folder / "latin1.txt").write_bytes("Gödel".encode("latin-1"))
  (folder / "cut.jsonl").write_text('{"text": "one"}\n{"text": "tw\n')
  (folder / "records.jsonl").write_text('{"txt": "one"}\n')
  (folder / "table.parquet").write_text("no table")
  (folder / "tokenizer.json").write_text("{}")
  (folder / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
  (folder / "list.jsonl").write_text('["one"]\n')
  (folder / "number.jsonl").write_text('{"text": NaN}\n')
  (folder / "one_line.jsonl").write_text('{"text": "' + "all in one line " * (1 << 18) + '"}\n')
  (folder / "cut.gz").write_bytes(gzip.compress(b"text " * 1000)[:40])
  parquet.write_table(pa.table({"text": ["one two three"] * 1000}), folder / "cut.parquet")
  (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:200])
  parquet.write_table(pa.table({"text": [1, 2, 3]}), folder / "numbers.parquet")
  (folder / "words.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {
      "type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1}, "unk_token": "[UNK]"}}))
  for name, text in EXPERIMENTS.items():
    (folder / f"{name}.py").write_text(text)
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
    ("mesh.stage=8", r"config\.mesh\.stage is 8 .*does not divide config\.model\.num_layers = 2"),
    ("optim.warmup_steps=3", r"warms up for 3 steps, but the run has only 2"),
    ("optim.weight_decay_policy=(('nothing/here', 0.0),)", r"nothing/here"),
    ("optim.name=adam", r"did you mean 'adamw'\?"),
    ("optim.learning_rate=fast", r"--config\.optim\.learning_rate is 'fast', but it must be a value of type float"),
    ("optim.larning_rate=1", r"did you mean 'optim\.learning_rate'\?"),
    ("eval.sets=('validaton',)", r"did you mean 'validation'\?"),
    ("data.source=日本.txt", r"'日本\.txt' matches no file or folder"),
    ("data.source={broken}/deep.jsonl", r"deep\.jsonl:1 is not valid JSON"),
    ("data.source={broken}/list.jsonl", r"list\.jsonl:1 is not a JSON object but a list"),
    ("data.source={broken}/number.jsonl", r"number\.jsonl:1: the field 'text' is a number, not text"),
    ("data.source={broken}/one_line.jsonl", r"validation split .* has no text; raise config\.data\."),
    ("data.source={broken}/cut.gz", r"cut\.gz is not UTF-8 text"),
    ("data.source={broken}/cut.parquet", r"cut\.parquet is not a readable parquet file"),
    ("data.source={broken}/numbers.parquet", r"numbers\.parquet, record 1: the field 'text' is a number"),
    ("data.source={texts}/notes/*.txt,{broken}/none.txt", r"none\.txt' matches no file"),
    ("data.cache_dir={broken}/empty.txt", r"cannot be written to \S*empty\.txt/tokens .*set config\.data\.cache_dir"),
    ("data.tokenizer={broken}/words.json", r"cannot encode the text .*give one that knows every character"),
    ("data.tokenizer={broken}", r"tokenizer\.json is not a tokenizer file"),
    ("data.tokenizer=", r"There is no tokenizer file"),
    ("data.weights=(1e999,)", r"config\.data\.weights is \(inf,\)"),
    ("data.packing=none", r"config\.data\.packing is 'none', .*; known are: best_fit, concat"),
    ("data.prefetch=0", r"config\.data\.prefetch is 0, but it must be at least 1 batches"),
    ("data.num_workers=-1", r"config\.data\.num_workers is -1"),
    ("eval.sets=(1,2)", r"config\.eval\.sets has the entry 1, but every entry must be text"),
    ("eval.sets=mine=", r"config\.eval\.sets has the entry 'mine='"),
    ("eval.batch_size=3", r"An evaluation takes 3 sequences at a time .*make it a multiple of 8"),
    ("train.batch_size=0", r"config\.train\.batch_size is 0, but it must be at least 1"),
    ("train.batch_size=1e400", r"--config\.train\.batch_size is '1e400'"),
    ("train.num_steps=1e300", r"config\.train\.num_steps is \d+, but it must be at most 2147483647 steps"),
    ("train.num_tokens=inf", r"config\.train\.num_tokens is inf, but it must be a finite number"),
    ("optim.learning_rate=nan", r"config\.optim\.learning_rate is nan, but it must be a finite number"),
    ("optim.learning_rate=-1", r"config\.optim\.learning_rate is -1\.0, but it must be at least 0"),
    ("optim.learning_rate=", r"--config\.optim\.learning_rate is '', but it must be a value of type float"),
    ("optim.learning_rate_policy=(('bias', -1.0),)", r"learning_rate_policy has the entry .*factor must be 0 or more"),
    ("optim.weight_decay_policy=((1, 2),)", r"weight_decay_policy has the entry \(1, 2\)"),
    ("seed=-1", r"config\.seed is -1, but it must be at least 0"),
    ("seed=5000000000", r"config\.seed is 5000000000, but it must be at most 4294967295"),
    ("model.num_layers=0", r"config\.model\.num_layers is 0, but it must be at least 1"),
    ("model.embed_dim=1e12", r"config\.model\.embed_dim is 1000000000000, but it must be at most"),
    ("model.embed_dim=400000", r"state take [\d,.]+ GB, but this machine has [\d.]+ GB; make the model smaller"),
    ("model.remat_policy=None", r"config\.model\.remat_policy is 'None', .*did you mean 'none'\?"),
    ("checkpoint.restore_from=", r"config\.checkpoint\.restore_from is empty; give a folder, or None"),
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
    ("model.embed_dim=128", r"The run in \S* has config\.model\.embed_dim = 64, but now it is 128; to go on keep 64, "
     "to start another run give another --workdir"),
    ("model.num_layers=3", r"config\.model\.num_layers = 2, but now it is 3"),
    ("model.tie_embeddings=false", r"config\.model\.tie_embeddings = True, but now it is False"),
    ("model.init_std=0.1", r"config\.model\.init_std = 0\.02, but now it is 0\.1"),
    ("optim.name=lion", r"config\.optim\.name = 'adamw', but now it is 'lion'"),
    ("train.ema_decay=0.9", r"config\.train\.ema_decay = 0\.0, but now it is 0\.9; to go on keep 0\.0"),
    ("train.batch_size=16", r"config\.train\.batch_size = 8, but now it is 16"),
    ("data.tokenizer=bpe", r"config\.data\.tokenizer = 'bytes', but now it is 'bpe'"),
    ("seed=1", r"config\.seed = 0, but now it is 1"),
    ("train.num_steps=1", r"is already at step 2, beyond the 1 of this run"),
])
def test_a_changed_config_cannot_go_on(fail, finished, texts, debug, tmp_path, override, message):
  workdir = shutil.copytree(finished, tmp_path / "run")
  before = snapshot(workdir)
  settings = [setting.format(texts=texts) for setting in (*SMALL, "train.num_steps=3", override)]
  said = fail("train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings))
  assert re.search(message, said), said
  assert snapshot(workdir) == before


def test_a_changed_config_is_told_before_the_data_is_opened(fail, finished, texts, debug, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / "run")
  settings = [setting.format(texts=texts) for setting in (*SMALL, "data.tokenizer={texts}/none.json", "seed=1")]
  said = fail("train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings))
  assert "config.seed = 0, but now it is 1" in said
  settings[-1] = "seed=0"
  said = fail("train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings))
  assert "config.data.tokenizer = 'bytes', but now it is" in said


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
    (["train", "--config={root}/experiments/moe.py:large", "--workdir=w"], r"takes no argument, but 'large' was"),
    (["train", "--config={root}/experiments/debug.py:lama", "--workdir=w"], r"no family 'lama'; did you mean 'llama'"),
    (["train", "--config={root}/experiments/debug.py"], r"needs --workdir"),
    (["train", "--config={root}/experiments/debug.py", "--workdir="], r"needs --workdir"),
    (["train", "--config={root}/experiments/debug.py", "--workdir=a", "--workdir=b"], r"--workdir more than once"),
    (["train", "--config={root}/experiments/debug.py", "--workdir=w", "--batch_size=4"],
     r"no flag --batch_size; did you mean --config\.train\.batch_size\?"),
    (["train", "--config={root}/experiments/debug.py", "--workdir=w", "--wrkdir=a"], r"did you mean 'workdir'\?"),
    (["train", "--config={root}/experiments/debug.py", "--workdir=w", "--nodebug=3"], r"does not take an argument"),
    (["train", "--config={root}/experiments/debug.py", "--workdir=w", "also"], r"does not know what to do with 'also'"),
    (["train", "--config={broken}", "--workdir=w"], r"--config=\S*broken names no file"),
    (["train", "--config={broken}/syntax.py", "--workdir=w"], r"syntax\.py, line 1, is not valid Python"),
    (["train", "--config={broken}/zero.py", "--workdir=w"], r"zero\.py is not valid Python"),
    (["train", "--config={broken}/raises.py", "--workdir=w"], r"raises\.py, line 2, raised FileNotFoundError"),
    (["train", "--config={broken}/exits.py", "--workdir=w"], r"exits\.py, line 2, raised SystemExit"),
    (["train", "--config={broken}/endless.py", "--workdir=w"], r"endless\.py, line 2, raised RecursionError"),
    (["train", "--config={broken}/without.py", "--workdir=w"], r"has no function get_config\(\)"),
    (["train", "--config={broken}/value.py", "--workdir=w"], r"has no function get_config\(\)"),
    (["train", "--config={broken}/needs.py", "--workdir=w"], r"needs an argument; write --config="),
    (["train", "--config={broken}/unset.py", "--workdir=w"], r"The length of the run is not set"),
    (["train", "--config={broken}/nan.py", "--workdir=w"], r"learning_rate is nan, but it must be a finite number"),
    (["train", "--config={broken}/typo.py", "--workdir=w"], r"did you mean 'learning_rate'\?"),
    (["train", "--config={broken}/group.py", "--workdir=w"], r"config has no setting 'foo'"),
    (["eval"], r"needs --workdir"),
    (["eval", "--workdir="], r"needs --workdir"),
    (["eval", "--workdir={run}", "--sets="], r"--sets is empty"),
    (["eval", "--workdir={run}", "--step=-1"], r"no checkpoint of step -1; it has those of 2"),
    (["eval", "{run}", "also"], r"does not know what to do with 'also'"),
    (["generate", "{run}"], r"needs --prompt"),
    (["generate", "{broken}", "--prompt=a"], r"\S*broken"),
    (["generate", "{run}", "--prompt=a", "--max_new_tokens=0"], r"max_new_tokens is 0, but it must be at least 1"),
    (["generate", "{run}", "--prompt=" + "long " * 20, "--max_new_tokens=1"], r"the model has 64 learned positions"),
    (["generate", "{run}", "--prompt=a", "--temperature=nan"], r"temperature is nan, but it must be 0 or more"),
    (["generate", "{run}", "--prompt=a", "--top_k=-1"], r"top_k is -1, but it must be 0"),
    (["generate", "{run}", "--prompt=a", "--seed=-1"], r"--seed is -1, but it must be at least 0"),
    (["generate", "{run}", "--prompt=a", "--num_samples=0"], r"--num_samples is 0"),
    (["convert", "--source=", "--target=t"], r"needs --source"),
    (["convert", "--source={run}"], r"needs --target"),
    (["convert", "--source={run}", "--target={run}"], r"exists already and is not an empty folder"),
    (["convert", "--source={run}", "--target={broken}/empty.txt"], r"exists already and is not an empty folder"),
    (["convert", "--source={run}", "--target={broken}/empty.txt/a"], r"could not be written \(Not a directory\)"),
    (["convert", "--source={broken}", "--target=t"], r"has no config\.json"),
    (["report", "nowhere"], r"There is no folder nowhere"),
    (["report"], r"needs --workdir"),
    (["data"], r"needs --config"),
    (["data", "--config={root}/experiments/debug.py", "--config.data.source={broken}/cut.jsonl"], r"cut\.jsonl:2"),
    (["data", "--config={root}/experiments/debug.py", "--config.data.tokenizer={broken}/empty.txt"],
     r"is not a tokenizer file"),
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


def test_a_file_that_is_deleted_between_listing_and_reading(fail, broken, debug, tmp_path, monkeypatch):
  from lmjax.data import file_sources
  read = file_sources._read_text

  def vanish(path, size):
    path.unlink()
    yield from read(path, size)
  monkeypatch.setattr(file_sources, "_read_text", vanish)
  (broken / "note.txt").write_text("some text\n" * 100)
  said = fail("data", debug, f"--config.data.source={broken}/note.txt")
  assert re.search(r"note\.txt cannot be read \(No such file or directory\); make it readable or leave it out", said)


def test_a_file_that_is_deleted_while_files_are_listed(fail, broken, debug, monkeypatch):
  from lmjax.data import file_sources
  find = file_sources.find_files

  def vanish(*args):
    found = find(*args)
    found[0].unlink()
    return found
  monkeypatch.setattr(file_sources, "find_files", vanish)
  (broken / "note.txt").write_text("some text\n" * 100)
  said = fail("data", debug, f"--config.data.source={broken}/note.txt")
  assert re.search(r"note\.txt cannot be read \(No such file or directory\); make it readable or leave it out", said)


@pytest.mark.parametrize("command", ["generate --prompt=a", "convert --target=t --source=x"])
def test_several_processes_are_refused_where_one_does_the_work(fail, finished, monkeypatch, command):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  name, *flags = command.split()
  workdir = [f"--workdir={finished}"] if name == "generate" else []
  assert f"lmjax {name} runs in one process, but JAX_NUM_PROCESSES is 2; start it once" in fail(name, *workdir, *flags)


@pytest.mark.parametrize("variables, message", [
    ({"JAX_NUM_PROCESSES": "2"}, "but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID; set all or none"),
    ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, "is 'two'"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_PROCESS_ID is '2'")])
def test_an_environment_that_names_processes_wrongly(fail, debug, tmp_path, monkeypatch, variables, message):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert message in fail("train", debug, f"--workdir={tmp_path / 'run'}")
  assert not (tmp_path / "run").exists()


def test_a_setting_that_may_change_is_told_and_the_run_goes_on(finished, texts, debug, tmp_path, capfd):
  workdir = shutil.copytree(finished, tmp_path / "run")
  settings = [setting.format(texts=texts) for setting in (*SMALL, "train.num_steps=3", "optim.learning_rate=1e-4")]
  assert cli.run(["train", debug, f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]) == 0
  err = capfd.readouterr().err
  assert "warning: The run goes on with config.optim.learning_rate = 0.0001 (it was 0.003)." in err
  assert "warning: The run goes on with config.train.num_steps = 3 (it was 2)." in err


def test_debug_shows_the_traceback(capsys):
  assert cli.run(["report", "--workdir=nowhere", "--debug"]) == 2
  err = capsys.readouterr().err
  assert "Traceback" in err and err.splitlines()[-1].startswith("lmjax: error: There is no folder nowhere")


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "There is not enough memory; lower config.train.batch_size"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8796093022208 bytes."),
     "There is not enough memory (for 8796093022208 bytes); lower config.train.batch_size")])
def test_memory_that_runs_out(fail, monkeypatch, tmp_path, error, message):
  from lmjax import report

  def run_out(*_):
    raise error
  monkeypatch.setattr(report, "write_report", run_out)
  assert message in fail("report", tmp_path)
