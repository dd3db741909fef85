"""Cloud TPU, by a stand-in for gcloud whose hosts are folders of this machine."""

import os
import shlex

import pytest

# `states` has what the queued resource is at each question; `statuses`, with what each look at the run ends.
GCLOUD = """
def following(path):
  lines = path.read_text().split("\\n")
  path.write_text("\\n".join(lines[1:] or lines))
  return lines[0]
argv = sys.argv[1:]
if argv[2:4] == ["queued-resources", "describe"]:
  print(following(folder / "states"))
elif argv[3] == "ssh" and argv[-1].endswith("follow"):
  sys.exit(int(following(folder / "statuses")))
"""
# Each node is a folder, the home of its user.
HOSTS = """
import shutil, subprocess
argv = sys.argv[1:]
if argv[2:4] == ["queued-resources", "describe"]:
  print("ACTIVE")
elif argv[3] == "scp":
  node, _, name = argv[5].partition(":")
  (folder / node).mkdir(exist_ok=True)
  shutil.copy(argv[4], folder / node / name)
elif argv[3] == "ssh":
  command = argv[-1].removeprefix("--command=")
  sys.exit(subprocess.run(["bash", "-c", command], cwd=folder / argv[4]).returncode)
"""
FLAGS = ("--name=a", "--zone=z", "--type=v5litepod-16")
TRAIN = ("train", "--config=experiments/debug.py", "--workdir=gs://bucket/run")


@pytest.fixture
def launch(platform):
  """Returns a function that runs tpu.sh, with states and statuses as gcloud would tell them."""
  def launch(*argv, states="ACTIVE", statuses="0"):
    platform.add("gcloud", GCLOUD)
    (platform.folder / "states").write_text("\n".join(states.split(",")))
    (platform.folder / "statuses").write_text("\n".join(statuses.split(",")))
    return platform.run("launch/tpu.sh", *argv)
  return launch


def what(call):
  """Returns in a word what a call of gcloud is for."""
  argv = call[1]
  if argv[2] == "queued-resources":
    return argv[3]
  if argv[3] == "scp":
    return "copy"
  return argv[-1].partition("tpu_host.sh ")[2].split()[0]


def asked(platform):
  return [what(call) for call in platform.calls if what(call) != "describe"]


def test_a_tpu_is_asked_for_waited_for_and_trained_on(launch, platform):
  done = launch(*FLAGS, "--spot", "--project=p", *TRAIN, states=",WAITING_FOR_RESOURCES,PROVISIONING,ACTIVE")
  assert done.returncode == 0, done.stderr
  assert [what(call) for call in platform.calls] == [
      "describe", "create", "describe", "describe", "describe", "copy", "install", "start", "follow"]
  create = platform.calls[1][1]
  assert create == ["compute", "tpus", "queued-resources", "create", "a", "--zone=z", "--project=p", "--node-id=a",
                    "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
  workers = [[part for part in argv if part.startswith("--worker")] for _, argv, _, _ in platform.calls[5:]]
  assert workers == [["--worker=all"]] * 3 + [["--worker=0"]]


def test_every_slice_gets_the_code_and_then_all_start(launch, platform):
  done = launch(*FLAGS, "--slices=2", *TRAIN, states=",ACTIVE")
  assert done.returncode == 0, done.stderr
  assert asked(platform) == ["create", "copy", "install", "copy", "install", "start", "start", "follow"]
  assert {"--node-count=2", "--node-prefix=a"} < set(platform.calls[1][1])
  nodes = [argv[4] for _, argv, _, _ in platform.calls if "ssh" in argv]
  assert nodes == ["a-0", "a-1", "a-0", "a-1", "a-0"]


def test_a_preempted_tpu_is_asked_for_again_and_runs_the_same(launch, platform):
  done = launch(*FLAGS, "--spot", *TRAIN, states=",ACTIVE,SUSPENDED,,ACTIVE", statuses="1,0")
  assert done.returncode == 0, done.stderr
  once = ["create", "copy", "install", "start", "follow"]
  assert asked(platform) == [*once, "delete", *once]
  starts = [argv for _, argv, _, _ in platform.calls if what((0, argv)) == "start"]
  assert starts[0] == starts[1] and "taken away (SUSPENDED)" in done.stderr


def test_a_tpu_lost_before_it_was_there_is_asked_for_again(launch, platform):
  done = launch(*FLAGS, *TRAIN, states=",FAILED,FAILED,,ACTIVE")
  assert done.returncode == 0, done.stderr
  assert asked(platform)[:3] == ["create", "delete", "create"]


def test_the_retries_have_an_end(launch, platform):
  done = launch(*FLAGS, "--retries=2", *TRAIN, states="SUSPENDED")
  assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
      "lmjax: error: the TPU was lost, or could not be reached, more than --retries=2 times.")
  assert asked(platform) == ["delete"] * 3


def test_a_run_that_fails_is_not_run_again(launch, platform):
  done = launch(*FLAGS, *TRAIN, statuses="2,0")
  assert done.returncode == 2 and "the run ended with status 2; the TPU is still held" in done.stderr
  assert asked(platform) == ["copy", "install", "start", "follow"]


def test_a_broken_connection_leaves_the_run_alone(launch, platform):
  assert launch(*FLAGS, *TRAIN, statuses="255,0").returncode == 0
  assert asked(platform) == ["copy", "install", "start", "follow", "follow"]


def test_a_state_that_cannot_be_read_deletes_nothing(launch, platform):
  assert launch(*FLAGS, *TRAIN, states="ACTIVE,ACTIVE,,ACTIVE", statuses="255,0").returncode == 0
  assert asked(platform) == ["copy", "install", "start", "follow", "follow"]


def test_a_run_that_was_told_to_stop_starts_again(launch, platform):
  assert launch(*FLAGS, *TRAIN, statuses="75,0").returncode == 0
  assert asked(platform) == ["copy", "install", "start", "follow"] * 2


@pytest.mark.parametrize("more", [(), ("--slices=3", "--spot")])
def test_a_dry_run_prints_what_a_run_calls(launch, platform, more):
  dry = launch(*FLAGS, *more, "--dry_run", *TRAIN, "--config.data.source=two words")
  assert dry.returncode == 0 and platform.calls == []
  printed = [shlex.split(line) for line in dry.stdout.splitlines()]
  assert launch(*FLAGS, *more, *TRAIN, "--config.data.source=two words", states=",ACTIVE").returncode == 0
  called = [["gcloud", *call[1]] for call in platform.calls if what(call) != "describe"]
  assert [line for line in printed if line[0] == "gcloud"] == called
  assert [line[0] for line in printed if line[0] != "gcloud"] == ["tar"]


def test_logs_and_stop(launch, platform):
  assert launch("--name=a", "--zone=z", "logs").returncode == 0
  assert launch("--name=a", "--zone=z", "stop").returncode == 0
  assert asked(platform) == ["follow", "delete"] and "--force" in platform.calls[-1][1]


@pytest.mark.parametrize("argv, says", [
    (("--name=a", "--zone=z", *TRAIN), "--type"), (FLAGS, "a command"),
    ((*FLAGS, "--slices=two", *TRAIN), "are numbers"), ((*FLAGS, "--spots", *TRAIN), "no flag --spots"),
    ((*FLAGS, "train", "--config=x", "--workdir=runs/a"), "gs://"),
    ((*FLAGS, "sweep", "--config=x", "--workdir=gs://bucket/a"), "a folder that locks")])
def test_what_cannot_work_is_refused(launch, platform, argv, says):
  done = launch(*argv)
  assert done.returncode == 2 and platform.calls == []
  assert done.stderr.startswith("lmjax: error: ") and says in done.stderr and done.stderr.count("\n") == 1


def test_the_hosts_install_run_and_tell(platform, root):
  platform.add("gcloud", HOSTS)
  platform.add("python3")
  platform.add("trained", "print('step 1/1'); sys.exit(3)")
  done = platform.run("launch/tpu.sh", *FLAGS, *TRAIN, "--config.data.source=it's two words",
                      PYTHON=str(platform.folder / "trained"))
  assert done.returncode == 3, done.stderr
  assert done.stdout.splitlines() == ["step 1/1"]
  (_, argv, environment, _), = [call for call in platform.calls if call[0] == "trained"]
  assert argv == ["-m", "lmjax", *TRAIN, "--config.data.source=it's two words"]
  assert environment == {"LMJAX_DISTRIBUTED": "auto", "JAX_PLATFORMS": "tpu,cpu", "LMJAX_INTERRUPTED_STATUS": "75",
                         "PYTHONPATH": str(platform.folder / "a" / "lmjax")}
  # A second run beside one that goes on would take its TPU, and its code away.
  (platform.folder / "a" / "lmjax.pid").write_text(str(os.getpid()))
  done = platform.run("launch/tpu.sh", *FLAGS, "--retries=0", *TRAIN)
  assert done.returncode == 1 and "lmjax: error: a run still goes on here." in done.stderr
  assert (platform.folder / "a" / "lmjax").is_dir()
  installed = [call[1] for call in platform.calls if call[0] == "python3"][-1]
  assert installed[-3:] == ["-c", "constraints.txt", ".[tpu]"]
  assert (platform.folder / "a/lmjax/experiments/debug.py").read_text() == (root / "experiments/debug.py").read_text()
