"""What every test shares: the CPU as eight devices, a cache folder of its own, and `--all` for the slow ones."""

import os
import shutil
import tempfile

from absl import logging
from hypothesis import HealthCheck, settings
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# How fast an example is depends on what else the machine does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser):
  parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
  # Workers inherit the folder of the process that started them, which alone removes it.
  if not hasattr(config, "workerinput"):
    config.lmjax_cache_dir = tempfile.mkdtemp(prefix="lmjax-test-cache-")
    os.environ["LMJAX_CACHE_DIR"] = config.lmjax_cache_dir


def pytest_unconfigure(config):
  if hasattr(config, "lmjax_cache_dir"):
    shutil.rmtree(config.lmjax_cache_dir, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
  if config.getoption("--all"):
    return
  for item in items:
    if "slow" in item.keywords:
      item.add_marker(pytest.mark.skip(reason="slow; runs with --all"))


@pytest.fixture(autouse=True)
def what_is_logged():
  """A command run within a test says how much is logged; the next test is to find what it was."""
  before = logging.get_verbosity(), logging.get_absl_logger().level
  yield
  logging.set_verbosity(before[0])
  logging.get_absl_logger().setLevel(before[1])
