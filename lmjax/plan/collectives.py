"""The collectives of a compiled program: how often each kind runs, over which mesh axes, and what it sends.

They are read from the program's text (HLO). What stands in the body of a loop runs as often as the loop goes round: the
number that the compiler writes beside it, or that its condition compares with. A collective that goes on while others
compute stands in several fusions under the number of one channel, and counts once. Bytes are what one device
sends, in the ring algorithms that reach the lower bound (Chan et al. 2007, Collective communication: theory, practice,
and experience): of an array of n bytes, shared by g devices, n (g - 1) / g for an all-gather, a reduce-scatter and an
all-to-all, twice that for an all-reduce, and n for a permutation.
"""

import collections
import math
import re
from typing import Iterator, NamedTuple, Sequence

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
# Between slices of TPUs it is the hosts that send.
_BETWEEN_SLICES = re.compile(r" = \((.*?)\) send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
# How the compiler for TPUs calls fusions of an all-reduce and the part of it that a device keeps.
_SCATTERING = "all-reduce-scatter"
_CALLED = re.compile(r"(body|condition|calls|to_apply)=%?([\w.\-]+)")
_LIMIT = re.compile(r" = [su](?:32|64)\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
  """Collectives of one kind over the same axes.

  Attributes:
    kind: such as "all-gather".
    axes: mesh axes whose devices take part; () where they are no whole axes.
    count: how often it runs in a step.
    sent: bytes that a device sends in all of them.
    crosses: whether any of its devices lie in another slice or host.
  """
  kind: str
  axes: tuple[str, ...]
  count: int
  sent: float
  crosses: bool


def collectives(text: str, shape: dict[str, int], near: int) -> list[Collective]:
  """Returns the collectives of a program, the largest first.

  Args:
    text: of the compiled program.
    shape: the mesh's axes and their sizes, in order.
    near: devices that fast links join, in the order of the mesh.
  """
  bodies, channels = _bodies(text), {}
  fusions = {called for line in text.splitlines() if " fusion(" in line for _, called in _CALLED.findall(line)}
  for name, times in _times(bodies).items():
    for number, line in enumerate(bodies[name]):
      if between := _BETWEEN_SLICES.search(line):
        kind, slices = between[2].lower().replace("_", "-"), math.prod(shape.values()) // near
        sent = _sent(kind, _array_bytes(between[1].partition("}")[0], False), slices)
        channels[name, number] = Collective(kind, ("replica",), times, sent, True)
        continue
      match = _COLLECTIVE.search(line)
      groups = _groups(line, shape) if match else np.zeros((1, 1))
      if groups.shape[1] < 2:
        continue
      channel = re.search(r"channel_id=(\d+)", line)
      # Elsewhere than in fusions channels do not tell: those of shard_map all have the same.
      key = channel[1] if channel and name in fusions else (name, number)
      kind, size, members = match[2], _array_bytes(match[1], bool(match[3])), groups.shape[1]
      if kind == "all-reduce" and name.startswith(_SCATTERING):
        kind, size = "reduce-scatter", size / members
      crosses = bool(np.any(groups // near != groups[:, :1] // near))
      one = Collective(kind, _axes(groups, shape), times, _sent(kind, size, members), crosses)
      channels[key] = max(one, channels.get(key, one), key=lambda one: (one.count, one.sent))
  totals: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  for one in channels.values():
    total = totals[one.kind, one.axes, one.crosses]
    total[0] += one.count
    total[1] += one.count * one.sent
  made = [Collective(kind, axes, int(count), sent, crosses) for (kind, axes, crosses), (count, sent) in totals.items()]
  return sorted(made, key=lambda one: -one.sent)


def _bodies(text: str) -> dict[str, list[str]]:
  """Returns the lines of each computation."""
  bodies, current = {}, []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = bodies[match[1]] = []
      if line.startswith("ENTRY"):
        bodies[""] = current
    elif line.startswith(" "):
      current.append(line)
  return bodies


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
  """Returns how often each computation runs; the entry, which is called "", runs once."""
  times: dict[str, int] = collections.Counter()
  waiting = [("", 1)]
  while waiting:
    name, count = waiting.pop()
    times[name] += count
    waiting += [(callee, count * trips) for callee, trips in _calls(bodies[name], bodies) if callee in bodies]
  return times


def _calls(lines: Sequence[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
  """Yields the computations that some lines call, and how often each line does."""
  for line in lines:
    called = dict(_CALLED.findall(line))
    if not called:
      continue
    known, trips = _TRIPS.search(line), 1
    if " while(" in line:
      limits = [int(limit) for part in bodies.get(called.get("condition"), ()) for limit in _LIMIT.findall(part)]
      trips = int(known[1]) if known else max(limits, default=1)
    for name in called.values():
      yield name, trips


def _array_bytes(shapes: str, is_start: bool) -> float:
  """Returns the bytes of an instruction's result; of one that starts a collective, the last of its arrays'."""
  found = [_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
           for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
  if is_start and len(found) > 1:
    return max(found)  # Beside the result stand the operand and counters.
  return sum(found)


def _sent(kind: str, size: float, group: int) -> float:
  if kind == "collective-permute":
    return size
  if kind == "reduce-scatter":
    return size * (group - 1)  # Its result is a part.
  return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _groups(line: str, shape: dict[str, int]) -> np.ndarray:
  """Returns the devices that take part together, [groups, size]; of a permutation the pairs."""
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
    return np.array([[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")])
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
    return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    groups, dims, order = ([int(i) for i in (part or "").split(",") if i] for part in iota.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(order) if order else ids).reshape(groups)
  if grid := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", grid[1])}
    mine = [axis for axis, name in enumerate(sizes) if name in re.findall(r"'(\w+)'", grid[2])]
    others = [axis for axis in range(len(sizes)) if axis not in mine]
    ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values()).transpose(*others, *mine)
    return ids.reshape(-1, math.prod(list(sizes.values())[axis] for axis in mine))
  return np.arange(math.prod(shape.values()))[None]


def _axes(groups: np.ndarray, shape: dict[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ."""
  places = np.array(np.unravel_index(groups, tuple(shape.values())))
  return tuple(axis for axis, place in zip(shape, places) if np.any(place != place[:, :1]))
