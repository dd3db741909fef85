"""What is measured: parameter and FLOP counts, the peak of a device, and sums that become means.

FLOPs are model FLOPs, what the mathematics needs (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): recomputation
does not count, a matrix product of [m, k] and [k, n] is 2 m k n, a backward pass costs two forward passes, and causal
attention counts only the scores that the mask leaves. Norms, activations and lookups are left out.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import platform
import time
from typing import Any, Iterator, Mapping

import jax
from jax.experimental import multihost_utils
import numpy as np

import lmjax
from lmjax.config import ModelConfig, electra_parts

_DIGEST_BYTES = 2 ** 28

# Dense peak of one JAX device in FLOP/s at bfloat16, by `device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # Half a chip, which JAX sees as a device.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def count_params(params: Any) -> int:
  """Returns the number of parameters, of arrays or of their abstract shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def count_non_embedding(params: Mapping[str, Any]) -> int:
  """Returns the parameters outside the token and position embeddings and the output projection (arXiv 2001.08361)."""
  inside = lambda path: not {key.key for key in path} & {"embed", "head"}
  return count_params([x for path, x in jax.tree_util.tree_leaves_with_path(params) if inside(path)])


def count_active(params: Any, cfg: ModelConfig) -> int:
  """Returns the parameters that act on a token: of a mixture's experts those that the router picks, and all others."""
  if not cfg.num_experts:
    return count_params(params)
  # An expert's maps are the MLP's own; those of the router and of the shared expert lie a level deeper or elsewhere.
  inside = lambda path: [key.key for key in path][-3:-1] in (["mlp", "gate"], ["mlp", "up"], ["mlp", "down"])
  experts = count_params([x for path, x in jax.tree_util.tree_leaves_with_path(params) if inside(path)])
  return count_params(params) - experts + experts * cfg.experts_per_token // cfg.num_experts


def flops_per_token(cfg: ModelConfig, seq_len: int, predicted: float | None = None) -> float:
  """Returns the FLOPs of training on one token: forward and backward, averaged over the positions of a sequence.

  With D the width, F the MLP's, V the vocabulary, N and K heads of width H, L layers and S the mean number of keys a
  query sees, over positions and over local and global layers, a forward pass costs 2 L (2 D H (N + K) + m D F) +
  4 L S N H, m being 3 for a gated MLP and else 2, and the head besides, 2 D V where it is a language model's alone.
  Of a mixture of experts, F is the width of all experts of a token together, and the router and the gate of a shared
  expert come besides. Layers that share parameters each count. A token of an encoder-decoder is one of the decoder, and
  with it one of an encoder's text of the same length. Of XLNet it is the content stream without memory, with 6 L S N H
  at the end; the keys of distances, which are made once for a batch, are left out. Of an ELECTRA it is generator and
  discriminator. What is done at chosen places alone counts by their share of the tokens: the head of a language model,
  and XLNet's query stream, which without such places there is not.

  Args:
    cfg: with its sizes resolved.
    seq_len: T.
    predicted: share of the tokens that are predicted at chosen places; None where all tokens are.
  """
  if cfg.architecture == "encoder_decoder":
    return flops_per_example(cfg, seq_len, seq_len) / seq_len
  if cfg.architecture == "electra":
    return sum(flops_per_token(part, seq_len, predicted) for part in electra_parts(cfg))
  D, N, H = cfg.embed_dim, cfg.num_heads, cfg.head_dim
  pattern = cfg.attention_pattern or ("local",)
  windows = [seq_len if pattern[i % len(pattern)] == "global" else min(cfg.attention_window or seq_len, seq_len)
             for i in range(cfg.num_layers)]
  mean_keys = sum(w * (w + 1) / 2 + (seq_len - w) * w for w in windows) / (cfg.num_layers * seq_len)
  if cfg.architecture == "encoder" or cfg.architecture == "xlnet" and not cfg.unidirectional:
    mean_keys = seq_len
  # Of a query and a key, and of their weight and a value; in XLNet of a query and a distance too.
  products = 3 if cfg.architecture == "xlnet" else 2
  per_layer = 2 * (_attention_products(cfg) + _mlp_products(cfg)) + 2 * products * mean_keys * N * H
  if cfg.architecture == "xlnet" and predicted is not None:  # Its keys and values are those of the content stream.
    per_layer += predicted * (2 * (2 * D * N * H + _mlp_products(cfg)) + 2 * products * mean_keys * N * H)
  further = cfg.num_future - 1  # Each has a block, and the output projection once more.
  outer = _outer_products(cfg, seq_len, predicted) + further * D * cfg.vocab_size
  return 3.0 * ((cfg.num_layers + further) * per_layer + 2 * outer)


def linear_flops_per_token(cfg: ModelConfig, written: float = 1.0) -> float:
  """Returns the part of `flops_per_token` that is in the linear maps of the blocks.

  Args:
    cfg: with its sizes resolved.
    written: of an encoder-decoder, tokens of the decoder for each of the encoder.
  """
  if cfg.architecture == "electra":
    return sum(map(linear_flops_per_token, electra_parts(cfg)))
  attention, mlp = _attention_products(cfg), _mlp_products(cfg)
  blocks = (cfg.num_layers + cfg.num_future - 1) * (attention + mlp)
  if cfg.architecture == "encoder_decoder":
    crossed = 2 * cfg.embed_dim * cfg.head_dim * (written * cfg.num_heads + cfg.num_kv_heads)
    blocks += cfg.num_decoder_layers * (written * (attention + mlp) + crossed)
  return 6.0 * blocks


def _attention_products(cfg: ModelConfig) -> int:
  """Returns the multiplications of a token in the four linear maps of a layer's attention."""
  return 2 * cfg.embed_dim * cfg.head_dim * (cfg.num_heads + cfg.num_kv_heads)


def _mlp_products(cfg: ModelConfig) -> int:
  """Returns the multiplications of a token in the MLP of a layer, or in its experts and what chooses them."""
  D, per_unit = cfg.embed_dim, (3 if cfg.gated_mlp else 2) * cfg.embed_dim
  if not cfg.num_experts:
    return per_unit * cfg.mlp_dim
  active = cfg.experts_per_token * cfg.expert_dim + cfg.shared_expert_dim
  return per_unit * active + D * cfg.num_experts + (D if cfg.shared_expert_dim else 0)


def _outer_products(cfg: ModelConfig, seq_len: int, predicted: float | None) -> float:
  """Returns the multiplications of a token outside the blocks; what is done once a sequence is shared by its tokens."""
  D, V, E = cfg.embed_dim, cfg.vocab_size, cfg.embedding_dim or cfg.embed_dim
  transformed = (D * E + E * V if cfg.head_transform else D * V) * (1.0 if predicted is None else predicted)
  pooler, labels = D * D if cfg.pooler != "none" else 0, cfg.num_labels or 0
  heads = {"lm": transformed, "pretraining": transformed + (pooler + 2 * D) / seq_len,
           "sentence": (pooler + 2 * D) / seq_len, "sequence": (pooler + D * labels) / seq_len,
           "choice": (pooler + D) / seq_len, "token": D * labels, "span": 2 * D, "replaced": D * D + D,
           "pooled": 0, "none": pooler / seq_len}
  if cfg.head == "tasks":
    parts = (dataclasses.replace(cfg, head=head, num_labels=count) for _, head, count in cfg.task_heads)
    return sum(_outer_products(part, seq_len, predicted) for part in parts)
  return heads[cfg.head] + (E * D if E != D else 0)


def flops_per_example(cfg: ModelConfig, encoder_len: int, decoder_len: int) -> float:
  """Returns the FLOPs of training an encoder-decoder on one pair of texts, forward and backward.

  With S tokens in the encoder and T in the decoder, and other letters as in `flops_per_token`, a forward pass costs
  per layer of the encoder S (4 D H (N + K) + 2 m D F + 4 S N H), and per layer of the decoder
  T (4 D H (N + K) + 2 m D F + 2 (T + 1) N H) for itself and 4 D H (T N + S K) + 4 T S N H for cross-attention, whose
  keys and values are of the encoder's tokens; and 2 T D V for the logits.

  Args:
    cfg: with its sizes resolved.
    encoder_len: S.
    decoder_len: T.
  """
  S, T = encoder_len, decoder_len
  D, V, N, K, H = cfg.embed_dim, cfg.vocab_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
  maps = 4 * D * H * (N + K) + 2 * _mlp_products(cfg)
  encoder = S * (maps + 4 * S * N * H)
  decoder = T * (maps + 2 * (T + 1) * N * H) + 4 * D * H * (T * N + S * K) + 4 * T * S * N * H
  return 3.0 * (cfg.num_layers * encoder + cfg.num_decoder_layers * decoder + 2 * T * D * V)


def peak_flops(devices: list[jax.Device]) -> float | None:
  """Returns the peak of all devices together in FLOP/s, or None where a device is not in the table."""
  peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
  return None if None in peaks else sum(peaks)


def means(sums: Mapping[str, Any]) -> dict[str, float]:
  """Divides weighted sums by their weights; returns host floats.

  `TERM_NAME` is divided by `TERM_weight` where there is one, and all else by `weight`.
  """
  return {name: float(value) / weight if (weight := float(weight_of(sums, name))) else math.nan
          for name, value in sums.items() if not name.endswith("weight")}


def weight_of(sums: Mapping[str, Any], name: str) -> Any:
  """Returns the weight that a sum is to be divided by."""
  return sums.get(f"{name.rpartition('_')[0]}_weight", sums["weight"])


def evaluation(sums: Mapping[str, Any], tokens_per_byte: float | None) -> dict[str, float]:
  """Returns what an evaluation reports, from the sums over a set.

  Bits per byte is loss / ln 2 times the set's tokens per byte of UTF-8 text: what an ideal coder driven by the model
  would spend on the text, end-of-document tokens included. It does not depend on the tokenizer.

  Args:
    sums: `loss` (nats), `accuracy` and `weight` summed over tokens, and those of other terms.
    tokens_per_byte: of the whole set; None where the loss is not the cost of all of the text.
  """
  mean = means(sums)
  values = {"loss": mean["loss"], "perplexity": float(np.exp(min(mean["loss"], 700.0)))}
  if tokens_per_byte is not None:
    values["bits_per_byte"] = mean["loss"] / math.log(2) * tokens_per_byte
  of_terms = {name: value for name, value in mean.items() if f"{name.rpartition('_')[0]}_weight" in sums}
  return values | ({"accuracy": mean["accuracy"]} if "accuracy" in mean else {}) | of_terms


def digest(params: Any) -> str:
  """Returns the SHA-256 of parameters: of every path, type, shape and value, whatever their sharding."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
    for block in _blocks(leaf):
      sha.update(np.ascontiguousarray(block).tobytes())
  return sha.hexdigest()


def _blocks(leaf: Any) -> Iterator[np.ndarray]:
  """Yields an array piece by piece on the host, so that no device and no host ever holds a large one whole."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or not leaf.shape:
    yield np.asarray(leaf)
    return
  rows = max(1, _DIGEST_BYTES * leaf.shape[0] // leaf.nbytes)
  for start in range(0, leaf.shape[0], rows):
    yield multihost_utils.process_allgather(leaf[start:start + rows], tiled=True)


def versions() -> dict[str, str]:
  """Returns the versions that a run's numbers depend on."""
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {"python": platform.python_version(), "lmjax": lmjax.__version__}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found


class Clock:
  """Where the time of a run goes, and the throughput of its steps.

  Throughput is that of the steps between two moments, without the time taken by evaluation, saving and compiling.
  """

  # What the time is divided into: all until the first step has ended, for it compiles; of the later steps the wait for
  # data, and the rest; evaluation; and saving, where the run waits for it.
  KINDS = ("start", "data", "step", "evaluation", "saving")

  def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None, begun: float = 0.0,
               before: Mapping[str, float] | None = None):
    """Begins to count.

    Args:
      tokens_per_step: tokens of a step over all devices.
      flops_per_token: for the MFU.
      peak: FLOP/s of all devices; None where it is unknown.
      begun: seconds since the run was started, or started again.
      before: `seconds` of what is behind it.
    """
    self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak
    self.seconds = {kind: (before or {}).get(kind, 0.0) for kind in self.KINDS}
    self._recent = self._total = (0, 0.0)
    self._first, self._last, self._paused = time.perf_counter() - begun, None, False
    self._waited = self._recent_waited = self._recent_blocked = 0.0

  def tick(self) -> None:
    """Notes that a step has ended."""
    now = time.perf_counter()
    if self._last is None:
      self.seconds["start"] += now - self._first
    else:
      seconds = now - self._last
      self._recent = (self._recent[0] + 1, self._recent[1] + seconds)
      self._total = (self._total[0] + 1, self._total[1] + seconds)
      self.seconds["data"] += self._waited
      self.seconds["step"] += seconds - self._waited
      self._recent_waited += self._waited
    self._last, self._waited = now, 0.0

  def restart(self) -> None:
    """Begins a new interval for `rates` and `of_step`."""
    self._recent, self._recent_waited, self._recent_blocked = (0, 0.0), 0.0, 0.0

  @contextlib.contextmanager
  def waiting_for_data(self):
    """Counts what happens inside as time that the host waits for a batch."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  @contextlib.contextmanager
  def waiting_for_devices(self):
    """Counts what happens inside as time that the host waits for its devices."""
    start = time.perf_counter()
    yield
    self._recent_blocked += 0.0 if self._last is None else time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self, kind: str):
    """Leaves out of the steps what happens inside, which is of another of `KINDS`."""
    start, self._paused = time.perf_counter(), True
    yield
    seconds = time.perf_counter() - start
    self.seconds[kind] += seconds
    if self._last is not None:
      self._last += seconds
    self._paused = False

  def standing(self) -> float:
    """Returns the seconds for which no step has ended: 0 before the first has, which compiles, and while paused."""
    last = self._last
    return 0.0 if last is None or self._paused else time.perf_counter() - last

  def rates(self) -> dict[str, float]:
    """Returns rates since the last `restart`; {} without a step.

    They are `tokens_per_second`, `mfu` where the peak is known, and `data_wait`, the share of the time that the host
    waited for batches.
    """
    steps, seconds = self._recent
    return self._rates(steps, seconds) | ({"data_wait": min(1.0, self._recent_waited / seconds)} if steps else {})

  def overall(self) -> dict[str, float]:
    """The same since the beginning, without `data_wait`."""
    return self._rates(*self._total)

  def of_step(self) -> dict[str, float]:
    """Returns seconds of a step since the last `restart`; {} without one.

    They are `step_seconds`, all of it; `host_seconds`, of them not spent waiting for the devices; and `data_seconds`.
    """
    steps, seconds = self._recent
    return {"step_seconds": seconds / steps, "host_seconds": max(0.0, seconds - self._recent_blocked) / steps,
            "data_seconds": self._recent_waited / steps} if steps else {}

  def shares(self, since: float) -> tuple[dict[str, float], float]:
    """Returns where the time since a moment went, and goodput, the share that went into steps that were kept.

    Args:
      since: when the run was first started, in seconds since the epoch.

    Returns:
      `seconds_KIND` of each of `KINDS`, and `seconds_other`: the run stood still, or did again what it had done, or
      something that is none of these. All add up to that time.
    """
    kept = sum(self.seconds.values())
    elapsed = max(time.time() - since, kept, 1e-9)
    seconds = {**self.seconds, "other": elapsed - kept}
    return ({f"seconds_{kind}": value for kind, value in seconds.items()},
            (self.seconds["data"] + self.seconds["step"]) / elapsed)

  def _rates(self, steps: int, seconds: float) -> dict[str, float]:
    if not steps:
      return {}
    rate = steps * self._tokens / max(seconds, 1e-9)
    return {"tokens_per_second": rate} | ({"mfu": rate * self._flops / self._peak} if self._peak else {})
