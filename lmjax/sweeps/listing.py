"""The trials of a sweep before they are run: parameters, FLOPs and the time to expect."""

import json
import pathlib
import statistics
import time
from typing import Callable, Collection, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmjax import finetune, metrics, objectives, plan
from lmjax.config import Config
from lmjax.models.transformer import init_params, make_model
from lmjax.optim import lora
from lmjax.plan.topologies import parse_topology
from lmjax.sweeps import stacking
from lmjax.sweeps.space import Settings, as_flags

# Shares that training is taken to reach: of a device's peak, and of what a product of matrices reaches on a CPU.
_OF_PEAK, _OF_PRODUCT = 0.4, 0.3


def listing(trials: Sequence[Settings], make_config: Callable[[Settings], Config], workdir: str,
            topology: str | None = None, searched: Collection[str] = (), most: int | None = None) -> list[str]:
  """Returns the lines of a table of trials, and their sum.

  Args:
    trials: settings.
    make_config: returns the experiment with some settings.
    workdir: of the sweep, whose finished trials, where there are some, say how fast they go.
    topology: machine of a worker; None is this one.
    searched: names of the settings that the sweep varies.
    most: how many trials may train together; None is all that can.
  """
  rate, source = _rate(workdir, topology)
  configs = dict(enumerate(map(make_config, trials)))
  rows, total = [("trial", "parameters", "FLOPs", "time", "settings")], 0.0
  for number, settings in enumerate(trials):
    params, flops = _cost(configs[number])
    total += flops or 0.0
    rows.append((str(number), f"{params:,}", "in epochs" if flops is None else f"{flops:.3g}",
                 "" if flops is None else _duration(flops / rate),
                 " ".join(flag.removeprefix("--config.") for flag in as_flags(settings))))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[4]]) for row in rows]
  programs = _programs(stacking.groups(configs, searched), most)
  return [*lines, programs,
          f"{len(trials)} trials, {total:.3g} FLOPs, about {_duration(total / rate)} of one worker at {rate:.3g} "
          f"FLOP/s ({source}), without starts, evaluations and saving"]


def _programs(groups: list[list[int]], most: int | None) -> str:
  """Returns a line on the programs that are compiled, and the trials of each."""
  how = "one after another" if most == 1 else "together" if most is None else f"together, {most} at a time"
  words = [f"trial{'s' if group[1:] else ''} {_ranges(group)}{f' ({len(group)} {how})' if group[1:] else ''}"
           for group in groups]
  return f"{len(groups)} program{'s' if groups[1:] else ''}: {'; '.join(words)}"


def _ranges(numbers: list[int]) -> str:
  """Returns numbers in words such as "0-3, 6"."""
  starts = [number for number in numbers if number - 1 not in numbers]
  ends = [number for number in numbers if number + 1 not in numbers]
  return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends))


def _cost(config: Config) -> tuple[int, float | None]:
  """Returns the parameters of a run and its FLOPs, which are None where its length is in epochs of unread data."""
  config = finetune.take_model(config)
  epochs = config.train.num_epochs is not None
  config = plan.resolved(config)
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(make_model(config.model), jax.random.key(0))))
  tokens = config.train.num_steps * config.train.batch_size * config.data.seq_len
  flops = tokens * objectives.flops_per_token(config)
  return metrics.count_params(lora.without(shapes)), None if epochs else flops


def _rate(workdir: str, topology: str | None) -> tuple[float, str]:
  """Returns the FLOP/s to expect of a worker, and where that is from."""
  if topology:
    machine = parse_topology(topology)
    peak = machine.chip.peak_flops * machine.num_devices
    return _OF_PEAK * peak, f"{_OF_PEAK:.0%} of the peak of {topology}, a guess"
  seen = []
  for path in pathlib.Path(workdir).glob("trials/*/result.json"):
    result = json.loads(path.read_text())
    if result.get("status") == "finished" and result.get("tokens_per_second"):
      seen.append(result["train_flops"] / result["num_tokens"] * result["tokens_per_second"]
                  * result.get("num_together", 1))
  if seen:
    return statistics.median(seen), "the median of the sweep's finished trials"
  if peak := metrics.peak_flops(jax.devices()):
    return _OF_PEAK * peak, f"{_OF_PEAK:.0%} of the devices' peak, a guess"
  return _OF_PRODUCT * _product_rate(), f"{_OF_PRODUCT:.0%} of what a product of matrices reaches here, a guess"


def _product_rate(size: int = 1024) -> float:
  multiply, a = jax.jit(jnp.matmul), jnp.ones((size, size))
  multiply(a, a).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    multiply(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size ** 3 / statistics.median(seconds)


def _duration(seconds: float) -> str:
  for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:,.1f} {unit}"
  return f"{seconds:,.1f} s"
