"""How a family of Hugging Face models is described: which tensor and which setting there is which one here.

A family is data that is read in both directions. The layout of a tensor is written with one letter for each of our
axes: D width, E embedding width, N query heads, K key-value heads, H head width, F MLP width, V vocabulary, P rows of
the position table, U token types, B buckets of relative positions, L labels, O the width again where a layer leads from
it to itself, X experts, M the width of an expert, S that of the shared one, 1 and 2 what they say, and C for the parts
that one Hugging Face tensor fuses (such as query, key and value). "NH,D" is a matrix whose rows are pairs (head,
position in the head) and whose columns are the model's width; a group without letters is an axis of one.
"""

import dataclasses
import math
from typing import Any, Callable, Mapping

import numpy as np

from lmjax.config import ModelConfig


class Required:
  """Stands for "no default" in a `Field`."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One setting of config.json and the ModelConfig setting that means the same.

  Attributes:
    theirs: its name in config.json, with dots into nested objects. Where there are several, each is read and the first
      is written.
    ours: its name in ModelConfig.
    default: what Hugging Face takes where config.json lacks it.
    values: (theirs, ours) pairs where the values differ in name; () where they are the same. Of several pairs with one
      value of ours, the first is written.
    read: (value, all of config.json with nested names flat) -> ours, where it takes more than another name.
    write: (ours, ModelConfig) -> theirs, its inverse.
    optional: whether it is left out of a written config.json where it would say the default.
    nonzero: whether 0 is refused, since it means another kind of model.
  """
  theirs: str | tuple[str, ...]
  ours: str
  default: Any = Required
  values: tuple[tuple[Any, Any], ...] = ()
  read: Callable[[Any, Mapping[str, Any]], Any] | None = None
  write: Callable[[Any, ModelConfig], Any] | None = None
  optional: bool = False
  nonzero: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    """All names in config.json."""
    return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclasses.dataclass(frozen=True)
class Key:
  """One Hugging Face tensor, or one for each layer or each expert of each layer, and the parameters it holds.

  Attributes:
    theirs: its name; with "{layer}", one tensor a layer, and with "{expert}" one an expert; here they are stacked.
    layout: its axes, in groups, as this module's docstring explains.
    ours: path of the parameter, or of each part along C.
    axes: axes of each parameter, without those of layers and experts that are stacked.
    when: a ModelConfig setting and its value without which there is no such tensor, where that does not follow from
      the model having the parameters.
  """
  theirs: str
  layout: str
  ours: str | tuple[str, ...]
  axes: str
  when: tuple[str, Any] | None = None

  @property
  def paths(self) -> tuple[str, ...]:
    """All parameters that the tensor holds."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  def exists(self, cfg: ModelConfig, params: Mapping[str, Any]) -> bool:
    """Does a model with these parameters, by path, have such a tensor?"""
    return self.paths[0] in params and (self.when is None or getattr(cfg, self.when[0]) == self.when[1])

  def names(self, cfg: ModelConfig) -> dict[tuple[int, ...], str]:
    """Returns the name of every tensor by its place on the leading axes of the parameters."""
    layers = cfg.num_decoder_layers if self.paths[0].startswith("decoder/") else cfg.num_layers
    counts = {"layer": layers} if "{layer}" in self.theirs else {}
    if "{expert}" in self.theirs:
      counts["expert"] = cfg.num_experts
    return {place: self.theirs.format(**dict(zip(counts, place))) for place in np.ndindex(*counts.values())}

  def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of the Hugging Face tensor."""
    sizes = self._sizes(cfg)
    return tuple(math.prod(sizes[letter] for letter in group) for group in self.layout.split(","))

  def split(self, tensor: np.ndarray, cfg: ModelConfig) -> tuple[np.ndarray, ...]:
    """Returns the parameters that a tensor holds, as views of it, in the order of `paths`."""
    sizes, letters = self._sizes(cfg), self.layout.replace(",", "")
    wanted = ("C" if "C" in letters else "") + self.axes
    parts = tensor.reshape([sizes[letter] for letter in letters]).transpose([letters.index(x) for x in wanted])
    return tuple(parts) if "C" in letters else (parts,)

  def join(self, params: tuple[np.ndarray, ...], cfg: ModelConfig) -> np.ndarray:
    """Returns the tensor that holds the given parameters; the inverse of `split`."""
    letters = self.layout.replace(",", "")
    have = ("C" if "C" in letters else "") + self.axes
    parts = np.stack(params) if "C" in letters else params[0]
    return np.ascontiguousarray(parts.transpose([have.index(x) for x in letters])).reshape(self.shape(cfg))

  def _sizes(self, cfg: ModelConfig) -> dict[str, int]:
    return {"D": cfg.embed_dim, "N": cfg.num_heads, "K": cfg.num_kv_heads, "H": cfg.head_dim, "F": cfg.mlp_dim,
            "E": cfg.embedding_dim, "V": cfg.vocab_size, "P": (cfg.max_positions or 0) + cfg.position_offset,
            "U": cfg.token_types, "B": cfg.relative_buckets, "L": cfg.num_labels, "O": cfg.embed_dim, "1": 1, "2": 2,
            "X": cfg.num_experts, "M": cfg.expert_dim, "S": cfg.shared_expert_dim, "C": len(self.paths)}


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type` of Hugging Face.

  Attributes:
    model_type: its name in config.json.
    architectures: the ModelConfig settings that each class of it stands for. The first class is meant where config.json
      names none, and the first that fits is written.
    fixed: ModelConfig settings that every model of the family has.
    fields: settings that both sides have.
    required: settings of config.json that change the numbers, with the one value that is done here, which is also what
      Hugging Face takes where they are absent.
    ignored_fields: settings of config.json that change no logits.
    written: settings of config.json that are written besides, where Hugging Face's defaults would surprise.
    unused: ModelConfig settings without effect in this family.
    keys: every tensor; those whose parameters a model lacks (biases, an output projection) its file lacks too.
    prefix: what the names start with in a file of the whole model, and do not in one of the model without its head.
    ignored_keys: regular expressions for tensors that hold no parameters.
    tied: pairs of tensors that are one here: one that a file may hold or not, and the one that it must then equal.
  """
  model_type: str
  architectures: Mapping[str, Mapping[str, Any]]
  fixed: Mapping[str, Any]
  fields: tuple[Field, ...]
  required: Mapping[str, Any]
  ignored_fields: tuple[str, ...]
  written: Mapping[str, Any]
  unused: tuple[str, ...]
  keys: tuple[Key, ...]
  prefix: str
  ignored_keys: tuple[str, ...]
  tied: tuple[tuple[str, str], ...]
