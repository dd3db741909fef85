"""tell whether an experiment fits a machine, and how fast it can be there, without the machine

Compiles the training step with the machine's own compiler. TPUs need libtpu (pip install 'lmjax[plan]'), GPUs JAX's
CUDA plugin (pip install 'jax[cuda13]'); neither needs a chip.

  lmjax plan --config=experiments/llama.py:3-8B --topology=v5p-128,v6e-64
  lmjax plan --config=experiments/gpt2.py:1.5B --topology=v5e-16 --search
"""

import itertools
import json
import os
from typing import Any

from absl import flags

from lmjax.commands import experiment
from lmjax.config import UserError

REQUIRED = ("config", "topology")
POSITIONAL = None

_TRIES_TO_FIT = 12  # Programs compiled at most to find one that fits.


def define_flags(flag_values: flags.FlagValues) -> None:
  experiment.define_config_flags(flag_values)
  flags.DEFINE_list("topology", None, "Machines, with commas between: v5p-128, v5e:4x4, 2xv5e-256 (two slices), "
                    "h100-8.", flag_values=flag_values)
  flags.DEFINE_boolean("search", False, "Try meshes, microbatches and remat policies, and propose the fastest.",
                       flag_values=flag_values)
  flags.DEFINE_integer("tries", 4, "Programs that --search compiles at most for each machine.", flag_values=flag_values)
  flags.DEFINE_string("json", None, "File that the plans are written to as JSON.", flag_values=flag_values)
  flags.DEFINE_string("save", None, "File that the compiled step is written to, of one machine.",
                      flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  if flag_values.tries < 1:
    raise UserError(f"--tries is {flag_values.tries}, but it must be at least 1.")
  os.environ["JAX_PLATFORMS"] = "cpu"  # The machines are described; nothing runs on what is here.
  config = experiment.read_config(flag_values)
  from lmjax import finetune, plan
  from lmjax.config_checks import Refused
  from lmjax.plan import search
  from lmjax.plan.topologies import parse_topology
  topologies = [parse_topology(name) for name in flag_values.topology or [""]]
  if flag_values.save and len(topologies) > 1:
    raise UserError("--save writes the program of one machine, but --topology names several; name one.")
  config = finetune.take_model(config)
  made, refused = [], []
  for topology in topologies:
    one = plan.make_plan(config, topology, flag_values.save)
    made.append(one)
    print("\n".join(lines(one)), flush=True)
    if not flag_values.search and one.fits:
      continue
    # Without --search the first that fits will do: each one takes the compiler as long as this did.
    wanted, tries = (None, flag_values.tries) if flag_values.search else (1, _TRIES_TO_FIT)
    found = list(itertools.islice(search.search(config, topology, tries), wanted))
    if found:
      proposal, best = min(found, key=lambda pair: pair[1].step_seconds)
      made.append(best)
      print("\n".join(["", f"The fastest of those tried that fits: {proposal.flags()}", *lines(best)]), flush=True)
    if not one.fits:
      refused.append((one, found))
  if flag_values.json:
    with open(flag_values.json, "w") as file:
      json.dump([one.to_json() for one in made], file, indent=2)
  for one, found in refused:
    needs = f"{one.peak_bytes / 2**30:.1f} GiB" if one.peak_bytes else "more"
    raise Refused(f"The experiment needs {needs} on a device of {one.topology}, which has "
                  f"{one.memory_bytes / 2**30:.1f} GiB ({one.message or 'the compiler'}); "
                  + ("it fits with the settings above." if found else "use more devices, or a smaller batch."))


def lines(plan: Any) -> list[str]:
  """Returns the table of a plan."""
  ways = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
  peak = _bytes(plan.peak_bytes) if plan.peak_bytes else "unknown"
  rows = [
      ("mesh", ways), ("fits", f"{'yes' if plan.fits else 'NO'}: {peak} of {_bytes(plan.memory_bytes)} a device"),
      *((f"  {kind}", _bytes(size)) for kind, size in plan.bytes_by_kind.items()),
      ("parameters", f"{plan.num_params:,}"),
      ("model FLOPs a step", f"{plan.model_flops:.3g}"),
      *((f"  {one.kind} over {' '.join(one.axes) or 'some'}{' (network)' if one.crosses else ''}",
         f"{one.count:,} times, {_bytes(one.sent)} sent a device") for one in plan.collectives[:8]),
      ("step at least", f"{plan.step_seconds * 1e3:,.4g} ms (" + ", ".join(
          f"{name} {seconds * 1e3:,.3g}" for name, seconds in plan.seconds.items()) + ")"),
      ("tokens a second at most", f"{plan.tokens_per_second:,.0f}"),
      ("MFU at most", f"{plan.mfu:.1%}"),
      ("days at least", "unknown: the run is in epochs" if plan.days is None else f"{plan.days:,.2f}"),
      ("compiled in", f"{plan.compile_seconds:.0f} s")]
  width = max(len(name) for name, _ in rows)
  return [f"{plan.topology}: {plan.num_chips:,} chips", *(f"  {name:<{width}}  {value}" for name, value in rows)]


def _bytes(value: float) -> str:
  for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
    if value >= 2 ** exponent:
      return f"{value / 2 ** exponent:,.2f} {unit}"
  return f"{value:,.0f} bytes"
