"""Compute-optimal runs from one dial: depth. Everything else of a run follows from it, from a budget, and from rules.

With the experiment's own family, vocabulary and length of text, a depth L gives

  width      aspect * L, rounded to whole heads (at least one). Loss hardly depends on the shape over a wide range
             (Kaplan et al. 2020, arXiv 2001.08361, section 3.1); one aspect for all is the rule of Karpathy's nanochat,
             whose aspect is 64. Here it is the experiment's own embed_dim / num_layers unless it is given.
  heads      width / head_dim, head_dim being the experiment's; key and value heads in its proportion, or the nearest
             below that divides the heads.
  MLP        the experiment's mlp_dim / embed_dim, rounded to multiples of head_dim; experts alike.
  tokens     budget / FLOPs of a token, by `objectives.flops_per_token`, rounded down to whole steps; or, where depths
             are given and no budgets, tokens_per_param a parameter.
  batch, learning rate   by BATCHES and RATES.
  warmup     warmup_fraction of the steps; under wsd a fifth of them decays, the schedule's own default.

The best size for a budget is that of 20 tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556, table 3, all
parameters counted), or the one of which a fitted law foretells the least loss. The others lie evenly in log size,
`span` times smaller and larger, so that a parabola has its minimum inside (their section 3.2).
"""

import dataclasses
import functools
import math
from typing import Any, Callable, Mapping, Sequence

from lmjax import metrics, objectives
from lmjax.config import Config, ModelConfig, fill_sizes
from lmjax.config_checks import UserError, nearest

_DEEPEST = 1024
_FEWEST_SIZES = 3  # For a parabola.


@dataclasses.dataclass(frozen=True)
class Rules:
  """How the settings of a run follow from its depth and its budget.

  Attributes:
    aspect: width over depth; None is the experiment's.
    tokens_per_param: of the best run of a budget, and of every run where only depths are given.
    sizes: how many for each budget.
    span: how much smaller and larger than the best the outermost are.
    batch: a name in BATCHES.
    batch_scale: what that batch is multiplied by.
    batch_multiple: batches are whole multiples of so many sequences, such as the devices that share them.
    rate: a name in RATES; None is transfer where the experiment's parametrization makes rates transfer, else step_law.
    rate_scale: what that rate is multiplied by.
    warmup_fraction: share of the steps.
  """
  aspect: float | None = None
  tokens_per_param: float = 20.0
  sizes: int = 5
  span: float = 3.0
  batch: str = "step_law"
  batch_scale: float = 1.0
  batch_multiple: int = 1
  rate: str | None = None
  rate_scale: float = 1.0
  warmup_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is laid out; FLOPs are those of `objectives.flops_per_token`, tokens and steps whole."""
  budget: float | None
  depth: int
  width: int
  heads: int
  num_params: int
  num_params_non_embedding: int
  num_tokens: int
  num_steps: int
  batch_size: int
  learning_rate: float
  train_flops: float
  settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Size:
  """A model of the family: its settings, parameters and FLOPs of a token, those of logits among them or not."""
  model: ModelConfig
  settings: Mapping[str, int]
  num_params: int
  num_params_non_embedding: int
  flops_per_token: float
  flops_without_logits: float


# Tokens of a batch, from size N and compute C, both without embeddings and logits as in both papers, tokens D, and the
# experiment's own batch in tokens.
BATCHES: Mapping[str, Callable] = {
    # Li et al. 2025 (Step Law), arXiv 2503.04715: the best batch grows with the tokens and hardly with the size.
    "step_law": lambda n, d, c, own: 0.58 * d ** 0.571,
    # Bi et al. 2024 (DeepSeek LLM), arXiv 2401.02954, section 3.1.
    "deepseek": lambda n, d, c, own: 0.2920 * c ** 0.3271,
    "own": lambda n, d, c, own: own,
}

# Peak learning rates, from the same, the width w, the batch b in tokens, and the experiment's rate, width and batch.
RATES: Mapping[str, Callable] = {
    "step_law": lambda n, d, c, w, b, own: 1.79 * n ** -0.713 * d ** 0.307,
    "deepseek": lambda n, d, c, w, b, own: 0.3118 * c ** -0.1250,
    # Adam's rate falls as 1/width (Yang et al. 2022, arXiv 2203.03466, table 8, hidden matrices) and grows as the root
    # of the batch (Malladi et al. 2022, arXiv 2205.10287).
    "width": lambda n, d, c, w, b, own: own.rate * own.width / w * math.sqrt(b / own.batch),
    # The experiment's rate for every size, as muP has it, with the root of the batch.
    "transfer": lambda n, d, c, w, b, own: own.rate * math.sqrt(b / own.batch),
    "own": lambda n, d, c, w, b, own: own.rate,
}


@dataclasses.dataclass(frozen=True)
class _Own:
  """What the rules take from the experiment."""
  rate: float
  width: int
  batch: int


def lay_out(config: Config, vocab_size: int, budgets: Sequence[float] = (), depths: Sequence[int] = (),
            rules: Rules = Rules(), total: float | None = None, law: Mapping[str, Any] | None = None) -> list[Run]:
  """Lays out runs.

  Args:
    config: the experiment; its family, vocabulary, text length, schedule and optimizer are those of every run.
    vocab_size: of its tokenizer.
    budgets: FLOPs, rising; each gets some sizes around the best, or all `depths`.
    depths: rising; without budgets each is trained on tokens_per_param tokens a parameter.
    rules: by which the rest follows.
    total: FLOPs that all runs together may cost; what no longer fits is left out, the largest first.
    law: what `lmjax fit` has printed; None is tokens_per_param.

  Returns:
    The runs, by budget and then depth.

  Raises:
    UserError: where a budget pays for no model of the family, or nothing fits into the total.
  """
  _check(budgets, depths, rules, total)
  family = _Family(config, vocab_size, rules.aspect)
  if budgets:
    groups = [[family.run(depth, rules, budget) for depth in depths or _depths(family, budget, rules, law)]
              for budget in budgets]
  else:
    groups = [[family.run(depth, rules)] for depth in depths]
  return _within(groups, total, "budget" if budgets else "depth")


class _Family:
  """The models of an experiment's family, one for each depth."""

  def __init__(self, config: Config, vocab_size: int, aspect: float | None):
    model = config.model
    if model.architecture == "electra":
      raise UserError("lmjax isoflop cannot lay out ELECTRA, whose generator grows apart from its discriminator; give "
                      "an experiment of another architecture.")
    self.config = config
    self.vocab_size = model.vocab_size or -(-vocab_size // 128) * 128
    self.aspect = aspect or model.embed_dim / model.num_layers
    self.own = _Own(config.optim.learning_rate, model.embed_dim, config.train.batch_size * config.data.seq_len)
    self.size = functools.cache(self._size)

  def _size(self, depth: int) -> _Size:
    base = fill_sizes(self.config.model)
    head = base.head_dim
    width = max(1, round(self.aspect * depth / head)) * head
    heads, scale = width // head, width / base.embed_dim
    shared = max(1, round(heads * base.num_kv_heads / base.num_heads))
    part = lambda size: max(1, round(size * scale / head)) * head
    settings = {"num_layers": depth, "embed_dim": width, "num_heads": heads, "head_dim": head,
                "num_kv_heads": next(k for k in range(shared, 0, -1) if heads % k == 0), "mlp_dim": part(base.mlp_dim)}
    if base.architecture == "encoder_decoder":
      settings["num_decoder_layers"] = max(1, round(depth * base.num_decoder_layers / base.num_layers))
    if base.num_experts:
      settings["expert_dim"] = part(base.expert_dim)
      settings["shared_expert_dim"] = part(base.shared_expert_dim) if base.shared_expert_dim else 0
    model = dataclasses.replace(self.config.model, **settings, vocab_size=self.vocab_size)
    model = dataclasses.replace(fill_sizes(model), max_positions=model.max_positions or self.config.data.seq_len)
    flops = lambda model: objectives.flops_per_token(dataclasses.replace(self.config, model=model))
    return _Size(model, settings, *_count(model), flops(model), flops(dataclasses.replace(model, vocab_size=0)))

  def run(self, depth: int, rules: Rules, budget: float | None = None) -> Run:
    """Returns a depth's run for a budget, or for tokens_per_param tokens a parameter."""
    size, seq_len = self.size(depth), self.config.data.seq_len
    tokens = budget / size.flops_per_token if budget else rules.tokens_per_param * size.num_params
    n, c, width = size.num_params_non_embedding, tokens * size.flops_without_logits, size.model.embed_dim
    batch = rules.batch_scale * BATCHES[rules.batch](n, tokens, c, self.own.batch) / seq_len
    batch = max(1, round(batch / rules.batch_multiple)) * rules.batch_multiple
    steps = int(tokens / (batch * seq_len) * (1 + 1e-12))
    warmup = round(rules.warmup_fraction * steps)
    if steps < 2:
      what = f"The budget {budget:.3g}" if budget else f"{rules.tokens_per_param:g} tokens a parameter"
      raise UserError(f"{what} gives the model of {depth} layers {tokens:,.0f} tokens, fewer than two steps of "
                      f"{batch} sequences of {seq_len}; give more, or a smaller batch (--batch_scale).")
    rule = rules.rate or ("step_law" if size.model.parametrization == "standard" else "transfer")
    rate = rules.rate_scale * RATES[rule](n, tokens, c, width, batch * seq_len, self.own)
    settings = {**{f"model.{name}": value for name, value in size.settings.items()}, "train.num_steps": steps,
                "train.batch_size": batch, "optim.learning_rate": float(f"{rate:.4g}"), "optim.warmup_steps": warmup}
    tokens = steps * batch * seq_len
    return Run(budget, depth, width, size.model.num_heads, size.num_params, n, tokens, steps, batch,
               settings["optim.learning_rate"], tokens * size.flops_per_token, settings)


@functools.cache
def _count(model: ModelConfig) -> tuple[int, int]:
  """Returns the parameters of a model, and those without embeddings."""
  from flax import linen as nn
  import jax

  from lmjax.models.transformer import init_params, make_model
  model = dataclasses.replace(model, scan_layers=True)  # As many, and quicker to trace.
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(make_model(model, "cpu"), jax.random.key(0))))
  return metrics.count_params(shapes), metrics.count_non_embedding(shapes)


def _depths(family: _Family, budget: float, rules: Rules, law: Mapping[str, Any] | None) -> list[int]:
  """Returns depths around the best for a budget."""
  tokens_per_param = lambda depth: budget / family.size(depth).flops_per_token / family.size(depth).num_params
  if law is None:
    best = _first(lambda depth: tokens_per_param(depth) <= rules.tokens_per_param)
    if best > 1 and (tokens_per_param(best - 1) * tokens_per_param(best) < rules.tokens_per_param ** 2):
      best -= 1  # The nearer in logarithm.
    if best == 1 and tokens_per_param(1) < rules.tokens_per_param / rules.span:
      smallest = family.size(1)
      needed = rules.tokens_per_param * smallest.num_params * smallest.flops_per_token
      raise UserError(f"The budget {budget:.3g} is too small for the smallest model of this family, one layer of "
                      f"{smallest.num_params:,} parameters, which wants {needed:.2g} FLOPs; give a larger one, or an "
                      "experiment with a smaller vocabulary or aspect.")
  else:
    foretold = _foretold(law)
    loss = lambda depth: foretold(family.size(depth), budget / family.size(depth).flops_per_token)
    best = _first(lambda depth: loss(depth + 1) >= loss(depth))
  center = family.size(best).num_params
  steps = range(rules.sizes)
  targets = [center * rules.span ** (2 * i / (rules.sizes - 1) - 1) for i in steps] if rules.sizes > 1 else [center]
  found = {_nearest_depth(family, target) for target in targets} | {best}
  while len(found) < min(rules.sizes, _FEWEST_SIZES):  # Where a layer more or less is too coarse for the span.
    found.add(max(found) + 1)
  return sorted(found)


def _nearest_depth(family: _Family, num_params: float) -> int:
  """Returns the depth whose size is nearest in logarithm."""
  above = _first(lambda depth: family.size(depth).num_params >= num_params)
  return min((depth for depth in (above - 1, above) if depth > 0),
             key=lambda depth: abs(math.log(family.size(depth).num_params / num_params)))


def _first(holds: Callable[[int], bool]) -> int:
  """Returns the least depth for which something holds that holds for all greater ones."""
  high = 1
  while not holds(high):
    if high >= _DEEPEST:
      raise UserError(f"The best model for a budget would have more than {_DEEPEST} layers; give a smaller budget, or "
                      "a larger --aspect.")
    high *= 2
  low = high // 2  # It does not hold there, or that is 0.
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if holds(middle) else (middle, high)
  return high


def _foretold(told: Mapping[str, Any]) -> Callable[[_Size, float], float]:
  """Returns what a fitted law makes of a size and tokens: a number that is least where the loss is."""
  from lmjax.scaling.counts import PARAM_COLUMNS
  from lmjax.scaling.laws import LAWS
  form, counted = told.get("form"), str(dict(told.get("conventions") or {}).get("N", "")).removeprefix("column ")
  if form not in LAWS or LAWS[form].optimum is None:
    raise UserError(f"The law of --law has the form {form!r}, which does not tell size from tokens; fit one of "
                    f"{', '.join(name for name, law in LAWS.items() if law.optimum)}.")
  if counted not in (PARAM_COLUMNS["total"], PARAM_COLUMNS["non_embedding"]):
    raise UserError(f"The law of --law counts N by {counted or 'what it does not say'!r}, but lmjax isoflop knows "
                    "num_params and num_params_non_embedding; fit it to a sweep's folder.")
  try:
    alpha, beta, size_term, token_term = map(float, LAWS[form].optimum(told))
  except (KeyError, TypeError, ValueError) as e:
    raise UserError(f"The law of --law has no numbers for all parameters of its form {form}; give a file of what lmjax "
                    "fit has printed of runs that tell them.") from e
  return lambda size, tokens: size_term / getattr(size, counted) ** alpha + token_term / tokens ** beta


def _within(groups: list[list[Run]], total: float | None, what: str) -> list[Run]:
  """Returns the runs of as many groups as cost no more than the total, from the first on."""
  runs, spent = [], 0.0
  for group in groups:
    spent += sum(run.train_flops for run in group)
    if total is not None and spent > total:
      break
    runs += group
  if not runs:
    raise UserError(f"--total is {total:.3g} FLOPs, but the runs of the first {what} alone cost {spent:.3g}; give "
                    f"more, a smaller {what}, or fewer --sizes.")
  return runs


def _check(budgets: Sequence[float], depths: Sequence[int], rules: Rules, total: float | None) -> None:
  if not budgets and not depths:
    raise UserError("lmjax isoflop needs --budgets (1e18,3e18) or --depths (4,6,8).")
  for name, values in (("budgets", budgets), ("depths", depths)):
    for before, after in zip(values, values[1:]):
      if after <= before:
        raise UserError(f"--{name} has {after:g} after {before:g}; give each once, the smaller first.")
    for value in values:
      if not 0 < value < math.inf:
        raise UserError(f"--{name} has {value:g}, but each must be a finite number above 0.")
  for name, known in (("batch", BATCHES), ("rate", RATES)):
    if (value := getattr(rules, name)) is not None and value not in known:
      raise UserError(f"--{name} is {value!r}, which is no rule{nearest(value, known)}")
  numbers = {name: getattr(rules, name) for name in ("aspect", "tokens_per_param", "batch_scale", "rate_scale")}
  for name, value in {**numbers, "total": total}.items():
    if value is not None and not 0 < value < math.inf:
      raise UserError(f"--{name} is {value:g}, but it must be a finite number above 0.")
  if rules.sizes < 1 or rules.batch_multiple < 1:
    raise UserError(f"--sizes is {rules.sizes} and --batch_multiple {rules.batch_multiple}, but each must be at least "
                    "1.")
  if not 1 < rules.span < math.inf:
    raise UserError(f"--span is {rules.span:g}, but the outermost sizes must differ from the best by a factor above 1.")
  if not 0 <= rules.warmup_fraction < 1:
    raise UserError(f"--warmup_fraction is {rules.warmup_fraction:g}, but it is a share of the steps below 1.")
