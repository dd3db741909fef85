"""A workdir belongs to one run at a time, and its files are whole."""

import errno
import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

from lmjax import workdir
from lmjax.config_checks import Refused

HOLD = """\
import sys, time
from lmjax import workdir
with workdir.locked(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Returns a process that holds `tmp_path / "run"`."""
  root = pathlib.Path(workdir.__file__).parent.parent
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=root, stdout=subprocess.PIPE,
                             text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_second_run_is_told_who_has_it(tmp_path, holder):
  before = (tmp_path / "run" / workdir.LOCK).read_bytes()
  with pytest.raises(Refused) as error:
    with workdir.locked(tmp_path / "run"):
      pass
  assert re.fullmatch(rf"The workdir {tmp_path}/run is in use by another run \(process {holder.pid} on \S+, since "
                      r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*\); wait for it, stop it, or give another --workdir\.",
                      str(error.value))
  assert (tmp_path / "run" / workdir.LOCK).read_bytes() == before


def test_a_killed_run_leaves_a_file_that_locks_nothing(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / "run" / workdir.LOCK).exists()
  with workdir.locked(tmp_path / "run"):
    assert f'"pid": {os.getpid()}' in (tmp_path / "run" / workdir.LOCK).read_text()
  assert not (tmp_path / "run" / workdir.LOCK).exists()


def test_what_was_made_and_is_empty_goes_and_all_else_stays(tmp_path):
  with workdir.locked(tmp_path / "a" / "b"):
    assert (tmp_path / "a" / "b" / workdir.LOCK).exists()
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "mine").mkdir()
  with workdir.locked(tmp_path / "mine"):
    pass
  with workdir.locked(tmp_path / "run"):
    (tmp_path / "run" / "metrics.jsonl").write_text("")
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.jsonl", "mine", "run"]


def test_the_lock_is_free_again_after_an_error(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with workdir.locked(tmp_path):
      1 / 0  # noqa: B018
  with workdir.locked(tmp_path):
    pass


def test_never_two_at_once_while_holders_come_and_go(tmp_path):
  """Each thread opens the file anew, as a process would; removing it on the way must let nobody slip in."""
  inside, most = [], []

  def contend():
    taken = 0
    while taken < 50:
      try:
        with workdir.locked(tmp_path / "run"):
          inside.append(1)
          most.append(len(inside))
          inside.pop()
          taken += 1
      except Refused:
        pass
  threads = [threading.Thread(target=contend) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert set(most) == {1} and len(most) == 200


def test_an_object_store_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with workdir.locked("gs://bucket/run"):
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch, number):
  def flock(*_):
    raise OSError(number, os.strerror(number))
  monkeypatch.setattr(fcntl, "flock", flock)
  with workdir.locked(tmp_path / "run"):
    pass
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_path_that_cannot_be_a_folder(tmp_path, path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(Refused, match=f"The workdir {tmp_path}/{path} cannot be written .*; give a --workdir that can"):
    with workdir.locked(tmp_path / path):
      pass
  assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  workdir.write_whole(path, "old")

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError):
    workdir.write_whole(path, "new")
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_the_disk_refuses_is_a_sentence_and_all_else_is_not():
  with pytest.raises(Refused, match=r"w/metrics.jsonl could not be written \(No space left on device\); make room"):
    with workdir.write_errors("w"):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "w/metrics.jsonl")
  with pytest.raises(FileNotFoundError):
    with workdir.write_errors("w"):
      open("/nowhere/at/all")
