"""Every setting of an experiment, once: its name, type, default, unit, range and meaning.

The dataclasses below are the only home of defaults. `base_config()` turns them into a locked
`ml_collections.ConfigDict`, which an experiment file edits and command-line flags override; `from_config_dict` turns
the result back into dataclasses, checking every range and combination on the way (config_checks.py). Code below this
file never sees a ConfigDict.

A duration has three fields, `<name>_steps`, `<name>_tokens` and `<name>_epochs`, of which at most one is set;
`Duration` fields are resolved by `resolve_durations`, so that the rest of the library sees steps only.

This file imports no jax, so that `lmjax --help` and the scaling tools stay fast.
"""

import dataclasses
import json
import os
import pathlib
import typing
from typing import Any, Mapping

import ml_collections

from lmjax import config_checks
from lmjax.config_checks import DURATIONS, UNITS, UserError, check_combinations, checked, reject_unknown, split_optional

MAX_STEPS = 2**31 - 1  # The state counts in int32.
_MAX_SIZE = 2**24  # Of anything in the model: beyond any machine, and within what indices and random bits can count.


def setting(default: Any, help: str, *, unit: str = "", choices: tuple = (), low: float | None = None,
            above: float | None = None, high: float | None = None) -> Any:
  """Declares one config field.

  Args:
    default: the value when nothing else is said.
    help: what it means, one sentence.
    unit: what a number counts.
    choices: the values allowed, where they can be listed.
    low: the smallest value allowed.
    above: a bound that the value must exceed.
    high: the largest value allowed.
  """
  meta = dict(help=help, unit=unit, choices=choices, low=low, above=above, high=high)
  return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture. Presets for the published families are in `lmjax/models/families.py`."""
  architecture: str = setting(
      "decoder", "Which tokens a token sees: those before it (decoder), all (encoder), or those before it and an "
      "encoder's (encoder_decoder); xlnet has its own kind of attention, and electra is two encoders, of which one is "
      "to tell what the other has put in.", choices=("decoder", "encoder", "encoder_decoder", "xlnet", "electra"))
  num_layers: int = setting(4, "Transformer blocks, or those of the encoder.", low=1, high=_MAX_SIZE)
  num_decoder_layers: int | None = setting(
      None, "Blocks of the decoder of an encoder-decoder; None means num_layers.", low=1, high=_MAX_SIZE)
  num_future: int = setting(1, "Tokens ahead that a decoder predicts at each place, each beyond the first with a block "
                            "of its own (see objectives/multi_token.py).", low=1, high=64)
  generator_fraction: float = setting(
      0.25, "Share of the heads, and with them of the width and the MLP, that ELECTRA's generator has.", above=0,
      high=1)
  share_layers: bool = setting(False, "Whether all blocks have the same parameters (ALBERT).")
  embed_dim: int = setting(128, "Width of the residual stream (D).", low=1, high=_MAX_SIZE)
  num_heads: int = setting(4, "Query heads (N).", low=1, high=_MAX_SIZE)
  num_kv_heads: int | None = setting(None, "Key and value heads (K); None means num_heads.", low=1,
                                     high=_MAX_SIZE)
  head_dim: int | None = setting(None, "Width of a head (H); None means embed_dim // num_heads.", low=1,
                                 high=_MAX_SIZE)
  mlp_dim: int | None = setting(None, "Hidden width of the MLP (F); None means 4 * embed_dim.", low=1, high=_MAX_SIZE)
  vocab_size: int | None = setting(
      None, "Rows of the embedding (V); None means the tokenizer's size rounded up to a multiple of 128.", low=2,
      high=_MAX_SIZE)
  embedding_dim: int | None = setting(
      None, "Width of the embeddings; another than embed_dim, which None means, is projected to it (ALBERT, ELECTRA).",
      low=1, high=_MAX_SIZE)
  embedding_norm: bool = setting(False, "Whether the sum of the embeddings is normalised (BERT).")
  share_embeddings: bool = setting(True, "Whether encoder and decoder have the same token embeddings.")
  token_types: int = setting(0, "Rows of the token type embedding (BERT's segments A and B); 0 has none.", low=0,
                             high=_MAX_SIZE)
  max_positions: int | None = setting(
      None, "Positions a learned table holds; None means data.seq_len.", unit="tokens", low=1,
      high=_MAX_SIZE)
  position_offset: int = setting(0, "Rows at the start of a learned position table that no position uses (RoBERTa).",
                                 low=0, high=_MAX_SIZE)
  block: str = setting(
      "pre", "Where the norms of a block stand: pre is x + f(norm(x)), post norm(x + f(x)), inner x + norm(f(x)), "
      "sandwich x + norm(f(norm(x))), parallel x + f(norm(x)) + g(norm(x)), parallel_two the same with two norms.",
      choices=("pre", "post", "inner", "sandwich", "parallel", "parallel_two"))
  norm: str = setting("layernorm", "Normalisation.", choices=("layernorm", "rmsnorm"))
  norm_eps: float = setting(1e-5, "Added to the variance before its root.", above=0)
  norm_bias: bool = setting(True, "Whether LayerNorm has a bias.")
  norm_offset: bool = setting(False, "Whether a norm multiplies by 1 + its scale (Gemma).")
  position: str = setting("learned", "Position information.",
                          choices=("learned", "rotary", "sinusoidal", "alibi", "relative", "none"))
  rope_theta: float = setting(10_000.0, "Base of the rotary wavelengths.", above=0)
  local_rope_theta: float | None = setting(
      None, "The same in local layers, which are then not stretched (Gemma 3); None means rope_theta.", above=0)
  rotary_fraction: float = setting(
      1.0, "Share of a head's width that rotary positions turn (GPT-NeoX).", above=0, high=1)
  rope_scaling: str = setting("none", "How rotary wavelengths are stretched for longer texts.",
                              choices=("none", "linear", "dynamic", "yarn", "llama3"))
  rope_factor: float = setting(1.0, "Factor of that stretch.", low=1)
  rope_original_positions: int | None = setting(
      None, "Positions before the stretch, which all but linear need.", unit="tokens", low=1, high=_MAX_SIZE)
  rope_low_frequency: float = setting(
      1.0, "Turns over the original positions up to which llama3 and yarn stretch in full.", above=0)
  rope_high_frequency: float = setting(
      4.0, "Turns over the original positions from which on they do not stretch; yarn's paper has 32.", above=0)
  rope_attention_factor: float | None = setting(
      None, "What yarn multiplies sines and cosines by; None means 0.1 ln(rope_factor) + 1.", above=0)
  relative_buckets: int = setting(32, "Buckets of distances of relative positions (T5).", low=4, high=_MAX_SIZE)
  relative_max_distance: int = setting(128, "Distance from which on all share a bucket.", unit="tokens", low=2,
                                       high=_MAX_SIZE)
  distance_clamp: int | None = setting(
      None, "Distance from which on XLNet's relative positions are the same; None has no bound.", unit="tokens", low=1,
      high=_MAX_SIZE)
  memory_len: int | None = setting(
      None, "Tokens of the text before that XLNet remembers; None means all.", unit="tokens", low=1, high=_MAX_SIZE)
  memory_reuse_len: int | None = setting(
      None, "Tokens at the start of a segment that go into that memory; None means all.", unit="tokens", low=1,
      high=_MAX_SIZE)
  memory_same_len: bool = setting(
      False, "Whether a token sees as many tokens before it as the memory holds, wherever it stands (Transformer-XL).")
  unidirectional: bool = setting(False, "Whether in XLNet a token sees none after it (Transformer-XL).")
  reverse_half: bool = setting(
      False, "Whether the second half of a batch holds texts that are written from end to start (XLNet's bi_data).")
  activation: str = setting("gelu_tanh", "Activation of the MLP.", choices=("gelu", "gelu_tanh", "relu", "silu"))
  gated_mlp: bool = setting(False, "Whether the MLP is gated (GLU variants).")
  use_bias: bool = setting(True, "Whether the linear maps have biases.")
  qkv_bias: bool | None = setting(None, "Whether those to queries, keys and values do; None means use_bias.")
  out_bias: bool | None = setting(None, "Whether attention's output map does; None means use_bias.")
  mlp_bias: bool | None = setting(None, "Whether those of the MLP do; None means use_bias.")
  num_experts: int = setting(0, "Experts in place of the MLP, of which a router picks some for each token (E); 0 has "
                             "none.", low=0, high=_MAX_SIZE)
  experts_per_token: int = setting(2, "Experts that the router picks.", low=1, high=_MAX_SIZE)
  expert_dim: int | None = setting(None, "Hidden width of an expert; None means mlp_dim.", low=1, high=_MAX_SIZE)
  shared_expert_dim: int = setting(
      0, "Hidden width of an expert that every token has besides, through a gate of its own (Qwen-MoE); 0 has none.",
      low=0, high=_MAX_SIZE)
  normalize_expert_weights: bool = setting(True, "Whether the weights of the experts picked are made to add up to 1.")
  expert_capacity_factor: float | None = setting(
      None, "Tokens of a sequence that an expert takes at most, over its even share; None drops none.", above=0)
  qk_norm: str = setting("none", "Whether queries and keys are RMS-normalised: each head (Qwen3) or all heads as one "
                         "vector (OLMo 2).", choices=("none", "head", "all"))
  attention_scale: float | None = setting(
      None, "What scores are multiplied by; None means 1 / sqrt(head_dim).", above=0)
  attention_window: int | None = setting(
      None, "Keys a query may see, itself included, in local layers; None means all before it.", unit="tokens", low=1)
  attention_pattern: tuple = setting(
      (), "Kinds of the layers, local or global, repeated over them; () means all are local where there is a window.")
  attention_softcap: float | None = setting(None, "Attention scores are squashed to +-this by tanh.", above=0)
  logit_softcap: float | None = setting(None, "Output logits are squashed to +-this by tanh.", above=0)
  head: str = setting(
      "lm", "What the model ends in: logits over the vocabulary (lm), of a pair of sentences (sentence), or both "
      "(pretraining), whether each token was replaced (replaced), labels of the sequence, of each token or of each "
      "choice, the bounds of a span, one vector (pooled), a head for each of several tasks, or none.",
      choices=("lm", "pretraining", "sentence", "replaced", "sequence", "token", "choice", "span", "pooled", "tasks",
               "none"))
  task_heads: tuple = setting((), "The heads of several tasks, (task, head, labels) each; they follow from data.tasks.")
  pooler: str = setting(
      "none", "Activation of the dense layer between the first token of an encoder, or the last of a decoder, and the "
      "labels of a sequence, sentence or choice; none has no such layer.", choices=("none", "tanh", "gelu", "relu"))
  num_labels: int | None = setting(
      None, "Labels of a sequence or token head, 1 being a regression; None means those of the task, or 2.", low=1,
      high=_MAX_SIZE)
  head_transform: bool = setting(False, "Whether a dense layer and a norm stand before the output projection (BERT).")
  head_bias: bool = setting(False, "Whether the output projection, or that to labels, has a bias.")
  tie_embeddings: bool = setting(True, "Whether the output projection is the embedding's transpose.")
  scale_embeddings: bool = setting(False, "Whether embeddings are multiplied by sqrt(embed_dim).")
  scale_logits: bool = setting(False, "Whether logits are divided by sqrt(embed_dim) (T5).")
  dropout: float = setting(0.0, "Dropout rate of embeddings, attention output and MLP output.", low=0, high=0.99)
  init_std: float = setting(0.02, "Standard deviation of the initial weights.", above=0)
  init: str = setting("normal", "Whether that of a linear map is init_std itself (normal), or init_std over the root "
                      "of its inputs (fan_in, T5).", choices=("normal", "fan_in"))
  scale_residual_init: bool = setting(
      True, "Whether projections into the residual stream start smaller by sqrt(2 * num_layers), as in GPT-2.")
  parametrization: str = setting(
      "standard", "How initial weights, multipliers and learning rates follow the size: not, by width (mup), or by "
      "width and depth (completep), relative to a base size; see lmjax/parametrization.py.",
      choices=("standard", "mup", "completep"))
  base_embed_dim: int | None = setting(
      None, "embed_dim at the base size, with which mlp_dim, the heads times head_dim and embedding_dim grow.", low=1,
      high=_MAX_SIZE)
  base_head_dim: int | None = setting(None, "head_dim at the base size; None means that it is the same.", low=1,
                                      high=_MAX_SIZE)
  base_num_layers: int | None = setting(None, "num_layers at the base size, for completep.", low=1, high=_MAX_SIZE)
  attention_impl: str = setting("auto", "Attention kernel: all scores at once (xla), a block at a time in plain JAX "
                                "(chunked), fused for NVIDIA (cudnn) or TPUs (splash); auto chooses by platform.",
                                choices=("auto", "xla", "chunked", "cudnn", "splash"))
  context_attention: str = setting(
      "ring", "How keys and values reach all queries where mesh.context splits the length: passed round the devices "
      "(least memory), or gathered by each.", choices=("ring", "gather"))
  dtype: str = setting("auto", "Compute type; auto is bfloat16 on accelerators and float32 on CPU.",
                       choices=("auto", "float32", "bfloat16"))
  quantization: str = setting(
      "none", "Type of the matrix products of the blocks' linear maps, forward and backward: none is dtype; TPU v5e, "
      "v5p and v6e multiply int8 faster than that, GPUs from Hopper on both int8 and fp8. Parameters, and all else "
      "that is computed, stay as they are.", choices=("none", "int8", "fp8"))
  param_dtype: str = setting("float32", "Type the parameters are kept in.", choices=("float32", "bfloat16"))
  remat_policy: str = setting(
      "products", "What the backward pass makes again: none of it (most memory), all but the results of matrix "
      "products (cheap), the same with these in the host's memory (offload), all but what attention makes, the full "
      "block (least memory, a third more work), or all but the results in remat_save and remat_offload (names).",
      choices=("none", "products", "offload", "attention", "full", "names"))
  remat_save: tuple = setting(
      (), f"Under remat_policy names, results of a block that are saved, of {', '.join(config_checks.REMAT_NAMES)}.")
  remat_offload: tuple = setting((), "The same, of results that are kept in the host's memory meanwhile.")
  stage_microbatches: int | None = setting(
      None, "Parts of a microbatch that pass through the stages of mesh.stage one after another, a multiple of their "
      "number; None means up to eight a stage.", low=1, high=_MAX_SIZE)
  stage_repeats: int = setting(1, "How often each of them goes through all stages: with more than once (the circular "
                               "schedule) less time is idle, and more is sent.", low=1, high=_MAX_SIZE)
  scan_layers: bool = setting(True, "Loop over the layers (compile time does not grow) or unroll them.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes examples."""
  source: str = setting(
      "stdlib", "Where text comes from: stdlib, a path or glob of .txt, .py, .md, .jsonl or .parquet files, "
      "tfds:NAME, or the folder of a prepared TFDS data set. Several are joined by commas.")
  tasks: tuple = setting(
      (), "Labelled tasks, which are then read in place of source: names of lmjax/data/task_specs.py, or in an "
      "experiment file mappings of the settings in lmjax/data/task.py.")
  weights: tuple = setting((), "Share of each source or task in the mixture; () follows from their sizes.")
  mixing_temperature: float = setting(
      1.0, "Sources or tasks are mixed in proportion to the number of their examples to the power of one over this; "
      "large values mix them evenly.", low=1)
  mixing_limit: int | None = setting(
      None, "Number of examples from which on a source or task counts no more in that.", unit="examples", low=1)
  augment_replace: float = setting(
      0.0, "Share of the words of a training text that are replaced by a word drawn from another text.", low=0, high=1)
  augment_delete: float = setting(0.0, "Share of them that are left out.", low=0, high=1)
  augment_insert: float = setting(0.0, "Share of them after which a word drawn from another text is put in.", low=0,
                                  high=1)
  augment_swap: float = setting(0.0, "Share of them that change places with another word.", low=0, high=1)
  text_field: str = setting("text", "Field of a jsonl, parquet or TFDS record that holds the text.")
  data_dir: str | None = setting(None, "Where TFDS data sets lie; None means TFDS's own default.")
  validation_fraction: float = setting(
      0.05, "Share of the text held out, for a source that has no validation split.", low=0, high=0.5)
  tokenizer: str = setting("bpe", "bytes, bpe (trained on the training text), or the path of a tokenizer.json.")
  tokenizer_vocab_size: int = setting(4096, "Vocabulary of a trained tokenizer.", unit="tokens", low=257)
  seq_len: int = setting(256, "Length of an example.", unit="tokens", low=2, high=_MAX_SIZE)
  packing: str = setting("concat", "How documents fill examples: concat (joined, then split) or best_fit "
                         "(few are cut, the rest padded, attention kept within a document).",
                         choices=("concat", "best_fit"))
  document_mask: bool = setting(False, "Whether concat packing, too, keeps attention within a document.")
  shuffle: bool = setting(True, "Whether training examples are shuffled, anew each epoch.")
  cache_dir: str | None = setting(None, "Where tokenised text is kept; None means ~/.cache/lmjax.")
  num_workers: int = setting(0, "Grain worker processes; 0 reads in threads.", low=0)
  prefetch: int = setting(4, "Batches read ahead.", unit="batches", low=1)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is minimised."""
  name: str = setting(
      "causal_lm", "Objective.", choices=(
          "causal_lm", "multi_token", "prefix_lm", "fill_in_the_middle", "masked_lm", "replaced_tokens",
          "permutation_lm", "span_corruption", "mixture_of_denoisers", "classification", "regression",
          "token_classification", "extractive_qa", "multiple_choice", "text_to_text", "chat", "multi_task"))
  task_weights: tuple = setting(
      (), "What the mean loss of each of several tasks counts in a step; () counts each by its share of the batch.")
  mask_rate: float = setting(0.15, "Share of the tokens that masked_lm and replaced_tokens hide.", above=0, high=1)
  mask_unit: str = setting("token", "What is hidden at a time: tokens, words, or spans of words.",
                           choices=("token", "word", "span"))
  mask_random: float = setting(0.1, "Share of the hidden tokens that become a random one and not [MASK].", low=0,
                               high=1)
  mask_same: float = setting(0.1, "Share of the hidden tokens that stay what they are.", low=0, high=1)
  sentence_pairs: str = setting(
      "none", "What is told of pairs of texts: nothing, whether the second is the next one (BERT), or whether the two "
      "are in order (ALBERT).", choices=("none", "next", "order"))
  future_weight: float = setting(1.0, "What the tokens beyond the next count together in multi_token.", low=0)
  sentence_weight: float = setting(1.0, "What the loss of the pairs counts.", low=0)
  noise_density: float = setting(0.15, "Share of the tokens that span_corruption takes out.", above=0, high=0.99)
  mean_span_length: float = setting(3.0, "Mean length of what it takes out at a time.", unit="tokens", low=1)
  fim_rate: float = setting(0.5, "Share of the examples in which fill_in_the_middle rearranges a document.", low=0,
                            high=1)
  fim_spm_rate: float = setting(0.5, "Share of those in which the suffix comes first, not the prefix.", low=0, high=1)
  replaced_weight: float = setting(
      50.0, "What the loss of ELECTRA's discriminator counts beside that of its generator.", low=0)
  predict_fraction: float = setting(
      1 / 6, "Share of the tokens that permutation_lm predicts: the 1/K of XLNet's section 2.3.", above=0, high=1)
  memory: bool = setting(False, "Whether permutation_lm reads as much text again before a text, for its memory.")
  start_token: int | None = setting(
      None, "Token that the text of a decoder begins with that has an encoder; None means 0 where that is <pad>, else "
      "the one that ends a text.", low=0)
  label_smoothing: float = setting(0.0, "Share of each target spread over the vocabulary or the labels.", low=0,
                                   high=0.99)
  z_loss: float = setting(0.0, "Weight of the squared log-normaliser of the logits (PaLM used 1e-4).", low=0)
  router_balance: float = setting(
      0.0, "Weight of the load-balancing loss of a mixture of experts (Switch used 1e-2).", low=0)
  router_z_loss: float = setting(
      0.0, "Weight of the squared log-normaliser of its routers (ST-MoE used 1e-3).", low=0)
  loss_chunk: int | None = setting(
      None, "Positions projected to logits at a time; None chooses so that they stay small.", unit="tokens", low=1)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and its schedule."""
  name: str = setting("adamw", "Optimizer.",
                      choices=("adamw", "adafactor", "lion", "sgd", "muon", "schedule_free", "sophia"))
  learning_rate: float = setting(1e-3, "Peak learning rate.", low=0)
  schedule: str = setting("cosine", "Shape of the learning rate after warmup.",
                          choices=("constant", "linear", "cosine", "inverse_sqrt", "wsd"))
  warmup_steps: int | None = setting(None, "Linear warmup.", unit="steps", low=0)
  warmup_tokens: float | None = setting(None, "Linear warmup.", unit="tokens", low=0)
  warmup_epochs: float | None = setting(None, "Linear warmup.", unit="epochs", low=0)
  decay_steps: int | None = setting(None, "Final decay of the wsd schedule; unset means a fifth of the run.",
                                    unit="steps", low=0)
  decay_tokens: float | None = setting(None, "Final decay of the wsd schedule.", unit="tokens", low=0)
  decay_epochs: float | None = setting(None, "Final decay of the wsd schedule.", unit="epochs", low=0)
  final_learning_rate_ratio: float = setting(0.1, "Learning rate at the end over its peak.", low=0, high=1)
  beta1: float = setting(0.9, "Decay of the first moment.", low=0, high=1)
  beta2: float = setting(0.95, "Decay of the second moment.", low=0, high=1)
  momentum: float = setting(0.95, "Decay of the momentum of sgd and muon.", low=0, high=1)
  eps: float = setting(1e-8, "Added to the denominator.", above=0)
  weight_decay: float = setting(0.1, "Decoupled weight decay, multiplied by the learning rate.", low=0)
  clip_norm: float | None = setting(1.0, "Gradients of a larger global norm are scaled down to it.", above=0)
  offload: bool = setting(
      False, "Whether the optimizer's moments are kept in the host's memory, and come to the device a parameter at a "
      "time when they are updated.")
  adam_learning_rate_ratio: float = setting(
      1.0, "Under muon: learning rate of what Muon leaves to AdamW (embeddings, norms, biases), over the peak.", low=0)
  learning_rate_policy: tuple = setting(
      (), "Ordered (regex, factor) pairs on parameter paths: the first that matches scales the learning rate.")
  freeze_policy: tuple = setting(
      (), "Ordered (regex, step) pairs on parameter paths, layers/3/... among them: the first that matches says from "
      "which step on a parameter learns; -1 is never.")
  lora_rank: int = setting(
      0, "Rank of low-rank adapters beside kernels; nothing else then learns but heads of labels and what "
      "freeze_policy names. 0 has none.",
      low=0, high=_MAX_SIZE)
  lora_alpha: float = setting(16.0, "Adapters are scaled by this over their rank.", above=0)
  lora_targets: str = setting(r"attention/(query|value)/kernel$", "Regex on the paths of kernels that have adapters.")
  layer_decay: float = setting(
      1.0, "Learning rate of a layer over that of the one above it (embeddings are the lowest).", above=0, high=1)
  weight_decay_policy: tuple = setting(
      ((r"(^|/)(bias|scale)$", 0.0),),
      "Ordered (regex, factor) pairs on parameter paths: the first that matches scales the weight decay.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""
  num_steps: int | None = setting(None, "Length of the run.", unit="steps", low=1, high=MAX_STEPS)
  num_tokens: float | None = setting(None, "Length of the run.", unit="tokens", above=0)
  num_epochs: float | None = setting(None, "Length of the run.", unit="epochs", above=0)
  batch_size: int = setting(16, "Sequences of a step over all devices.", unit="sequences", low=1, high=_MAX_SIZE)
  grad_accum_steps: int = setting(1, "Microbatches a batch is split into.", low=1)
  gradient_noise: bool = setting(
      False, "Whether the sizes of the gradients of microbatches and of whole batches are recorded, from which "
      "lmjax fit tells the critical batch size; needs grad_accum_steps of 2 or more.")
  ema_decay: float = setting(0.0, "Decay of the moving average of the weights; 0 keeps none.", low=0, high=0.99999999)
  on_nonfinite: str = setting("stop", "What a loss or gradient that is not finite does; its update is never applied.",
                              choices=("stop", "skip"))
  on_spike: str = setting("ignore", "What a loss far above its running mean does; stop and skip drop its update.",
                          choices=("ignore", "stop", "skip"))
  spike_threshold: float = setting(
      6.0, "A spike is a loss more than this many running standard deviations above its running mean.", above=0)
  log_every_steps: int = setting(10, "Metrics are written this often.", unit="steps", low=1)
  sample_prompt: str = setting("def ", "Prompt of the sample printed at the end of training.")
  sample_length: int = setting(160, "Length of that sample; 0 prints none.", unit="tokens", low=0)
  compilation_cache: bool = setting(True, "Whether compiled programs are kept on disk between runs.")
  watchdog_seconds: float = setting(
      1800.0, "After so long without a step, evaluation or save under way, the stacks of all threads are shown, and "
      "a run of several processes ends, to be started again; 0 never does.", unit="seconds", low=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation during and after training."""
  sets: tuple = setting(
      ("validation",), "What to evaluate on: validation, train, or NAME=SOURCE with a source as in data.source.")
  every_steps: int | None = setting(None, "How often in the loop; unset means at the end only.", unit="steps", low=1)
  every_tokens: float | None = setting(None, "How often in the loop.", unit="tokens", above=0)
  every_epochs: float | None = setting(None, "How often in the loop.", unit="epochs", above=0)
  batch_size: int | None = setting(
      None, "Sequences at a time; None means those of a microbatch of training.", unit="sequences", low=1)
  num_batches: int | None = setting(16, "Batches of each evaluation in the loop; None means all.", low=1)
  final_num_batches: int | None = setting(None, "Batches of the evaluation after training; None means all.", low=1)
  best_metric: str | None = setting(
      None, "Metric of the evaluations in the loop, such as validation/loss, by which the best checkpoint is kept and "
      "is the one that is read; None keeps the newest only.")
  best_mode: str | None = setting(
      None, "Whether the best is the smallest or the largest; None follows from the metric.", choices=("min", "max"))
  best_min_change: float = setting(0.0, "What is better by no more than this does not count as better.", low=0)
  patience: int | None = setting(
      None, "Evaluations without a better best_metric after which training stops; None never stops it.", low=1)
  use_ema: bool = setting(True, "Whether to evaluate the averaged weights where train.ema_decay keeps them.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What is saved, and what a run starts from: its own workdir, then restore_from, then import_from, then scratch."""
  every_steps: int | None = setting(None, "How often; unset means at the end only.", unit="steps", low=1)
  every_tokens: float | None = setting(None, "How often.", unit="tokens", above=0)
  every_epochs: float | None = setting(None, "How often.", unit="epochs", above=0)
  keep_last: int = setting(2, "Newest checkpoints kept.", low=1)
  keep_every_steps: int | None = setting(None, "Checkpoints at multiples of this are kept for good.",
                                         unit="steps", low=1)
  async_save: bool = setting(True, "Whether training goes on while a checkpoint is written.")
  restore_from: str | None = setting(None, "Workdir whose parameters a fresh run starts from.")
  import_from: str | None = setting(
      None, "Hugging Face folder, or hf:OWNER/NAME on the hub, whose parameters a fresh run starts from.")
  finetune_from: str | None = setting(
      None, "Workdir or Hugging Face folder whose model, but for its head, tokenizer and parameters a fresh run takes; "
      "what the head lacks is made anew.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Size of each mesh axis; one may be -1 and takes the devices that are left."""
  replica: int = setting(1, "Copies of the model across slices.", low=-1)
  data: int = setting(-1, "Copies of the model, each with its part of the batch.", low=-1)
  fsdp: int = setting(1, "Splits parameters and the batch.", low=-1)
  stage: int = setting(1, "Pipeline stages.", low=-1)
  expert: int = setting(1, "Splits experts, and the batch.", low=-1)
  context: int = setting(1, "Splits the sequence.", low=-1)
  tensor: int = setting(1, "Splits heads, MLP and vocabulary.", low=-1)


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """Where metrics go besides metrics.jsonl, which is always written."""
  tensorboard: bool = setting(True, "Whether TensorBoard events are written.")
  wandb_project: str | None = setting(None, "Weights & Biases project to log to.")
  trackio_project: str | None = setting(None, "trackio project to log to.")


@dataclasses.dataclass(frozen=True)
class Config:
  """An experiment."""
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
  seed: int = setting(0, "Seed of initial parameters, data order and dropout.", low=0, high=2**32 - 1)


def base_config() -> ml_collections.ConfigDict:
  """Returns all settings at their defaults as a locked ConfigDict, for an experiment file to edit."""
  config = ml_collections.ConfigDict(convert_dict=False)
  for name, kind in _fields(Config):
    if dataclasses.is_dataclass(kind):
      group = ml_collections.ConfigDict(convert_dict=False)
      for key, (key_type, field) in _settings(kind).items():
        group[key] = _config_dict_default(field.default, key_type)
      config[name] = group
    else:
      config[name] = getattr(Config, name)
  return config.lock()


def from_config_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
  """Returns the checked dataclasses of a ConfigDict or of the dict read from config.json.

  Raises:
    UserError: for an unknown name, a value out of range or of the wrong type, or a combination that cannot work.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  groups = {}
  top = dict(_fields(Config))
  reject_unknown("config", config, top)
  for name, kind in top.items():
    if name not in config:
      continue
    if not dataclasses.is_dataclass(kind):
      groups[name] = checked("config", name, config[name], kind, Config.__dataclass_fields__[name])
      continue
    if not isinstance(config[name], Mapping):
      raise UserError(f"config.{name} is {config[name]!r}, but it is a group of settings.")
    settings = _settings(kind)
    reject_unknown(f"config.{name}", config[name], settings)
    groups[name] = kind(**{key: checked(f"config.{name}", key, value, *settings[key])
                           for key, value in config[name].items()})
  result = Config(**groups)
  check_combinations(result)
  return result


def to_json(config: Config) -> str:
  """Returns the config as JSON, the text of a run's config.json."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
  """Inverse of `to_json`."""
  return from_config_dict(json.loads(text))


def is_on(value: Any) -> bool:
  """Returns whether a number is another than 0; one that is only known when the program runs (see stack.py) is."""
  return not (isinstance(value, (int, float)) and value == 0)


def settings_help() -> typing.Iterator[tuple[str, Any, str]]:
  """Yields (dotted name, default, sentence) for every setting, in order."""
  for name, kind in _fields(Config):
    if not dataclasses.is_dataclass(kind):
      field = Config.__dataclass_fields__[name]
      yield name, field.default, field.metadata["help"]
      continue
    for key, (_, field) in _settings(kind).items():
      meta = field.metadata
      extra = [f"in {meta['unit']}"] if meta["unit"] else []
      extra += ["one of " + ", ".join(map(str, meta["choices"]))] if meta["choices"] else []
      yield f"{name}.{key}", field.default, meta["help"] + (f" ({'; '.join(extra)})" if extra else "")


def resolve_model(config: Config, vocab_size: int) -> Config:
  """Fills the model's derived sizes in, given the tokenizer's `vocab_size`.

  Raises:
    UserError: where the tokenizer has more tokens than the model has rows.
  """
  model = config.model
  if model.vocab_size is not None and model.vocab_size < vocab_size:
    raise UserError(f"The tokenizer has {vocab_size} tokens but config.model.vocab_size is {model.vocab_size}; "
                    f"set it to {vocab_size} or more, or leave it None.")
  model = dataclasses.replace(
      fill_sizes(model),
      vocab_size=model.vocab_size or -(-vocab_size // 128) * 128,
      max_positions=model.max_positions or config.data.seq_len,
      # Sophia differentiates forwards through the gradient, which the fused kernels cannot.
      attention_impl="chunked" if config.optim.name == "sophia" else model.attention_impl)
  return dataclasses.replace(config, model=model)


def fill_sizes(model: ModelConfig) -> ModelConfig:
  """Fills in what follows from the model's other settings: sizes of parts, and which maps have biases.

  What can be said in several ways is said in one, so that equal models have equal settings.
  """
  default = lambda name, value: value if getattr(model, name) is None else getattr(model, name)
  pattern, head_dim = _shortest(model), default("head_dim", model.embed_dim // model.num_heads)
  return dataclasses.replace(
      model,
      attention_pattern=() if pattern in (("local",), ("global",)) else pattern,
      attention_window=None if pattern == ("global",) else model.attention_window,
      attention_scale=None if model.attention_scale == head_dim ** -0.5 else model.attention_scale,
      num_decoder_layers=(default("num_decoder_layers", model.num_layers)
                          if model.architecture == "encoder_decoder" else model.num_decoder_layers),
      num_kv_heads=default("num_kv_heads", model.num_heads),
      head_dim=head_dim,
      mlp_dim=default("mlp_dim", 4 * model.embed_dim),
      expert_dim=(default("expert_dim", model.mlp_dim or 4 * model.embed_dim) if model.num_experts
                  else model.expert_dim),
      embedding_dim=default("embedding_dim", model.embed_dim),
      num_labels=default("num_labels", 2),
      **{name: default(name, model.use_bias) for name in ("qkv_bias", "out_bias", "mlp_bias")})


def electra_parts(model: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
  """Returns the generator and the discriminator of an ELECTRA, whose sizes are resolved.

  The generator has `generator_fraction` of the heads, rounded and at least one, which keep their width, and the same
  share of the width and of the MLP; its embeddings are as wide as the other's (arXiv 2003.10555, table 6).
  """
  heads = max(1, round(model.generator_fraction * model.num_heads))
  share = lambda size: max(1, size * heads // model.num_heads)
  discriminator = dataclasses.replace(model, architecture="encoder", generator_fraction=0.25)
  base = model.base_embed_dim and share(model.base_embed_dim)
  generator = dataclasses.replace(
      discriminator, head="lm", pooler="none", num_heads=heads, num_kv_heads=share(model.num_kv_heads),
      embed_dim=share(model.embed_dim), mlp_dim=share(model.mlp_dim), base_embed_dim=base)
  return generator, discriminator


def _shortest(model: ModelConfig) -> tuple:
  """Returns the shortest attention_pattern that means the same."""
  pattern = model.attention_pattern
  kinds = [pattern[i % len(pattern)] for i in range(model.num_layers)] if pattern else []
  fits = lambda n: all(kind == kinds[i % n] for i, kind in enumerate(kinds))
  return tuple(kinds[:next((n for n in range(1, len(kinds) + 1) if fits(n)), 0)])


def eval_batch_size(config: Config) -> int:
  """Returns the sequences that an evaluation takes at a time: as many as a microbatch of training unless it is set."""
  return config.eval.batch_size or config.train.batch_size // config.train.grad_accum_steps


def resolve_durations(config: Config, tokens_per_epoch: int) -> Config:
  """Returns the config with every duration in steps.

  A step is `train.batch_size * data.seq_len` tokens. Tokens and epochs are rounded to the nearest step, at least 1.

  Args:
    config: the config as the user gave it.
    tokens_per_epoch: tokens of one pass over the training data.
  """
  tokens_per_step = config.train.batch_size * config.data.seq_len
  groups = {}
  for group, stem in DURATIONS:
    settings = groups.get(group, getattr(config, group))
    steps, tokens, epochs = (getattr(settings, f"{stem}_{unit}") for unit in UNITS)
    if epochs is not None:
      tokens = epochs * tokens_per_epoch
    if tokens is not None:
      steps = max(1, round(tokens / tokens_per_step)) if tokens > 0 else 0
    groups[group] = dataclasses.replace(
        settings, **{f"{stem}_steps": steps, f"{stem}_tokens": None, f"{stem}_epochs": None})
  result = dataclasses.replace(config, **groups)
  num_steps, warmup, decay = result.train.num_steps, result.optim.warmup_steps or 0, result.optim.decay_steps or 0
  if num_steps > MAX_STEPS:
    raise UserError(f"The run would have {num_steps:.3g} steps, but at most {MAX_STEPS} can be counted; shorten "
                    "config.train.num_tokens or num_epochs, or enlarge config.train.batch_size.")
  every, kept = result.checkpoint.every_steps, result.checkpoint.keep_every_steps
  if kept and (not every or kept % every):
    raise UserError(f"config.checkpoint.keep_every_steps is {kept}, but checkpoints are made every {every} steps "
                    "(config.checkpoint.every_steps), so that none would be kept; make it a multiple of that.")
  if warmup + decay > num_steps:
    decays = f" and decays for {decay}" if decay else ""
    raise UserError(f"config.optim warms up for {warmup} steps{decays}, but the run has only {num_steps} "
                    "(config.train.num_steps); set a shorter config.optim.warmup_steps or a longer run.")
  return result


def _fields(kind: type) -> list[tuple[str, type]]:
  hints = typing.get_type_hints(kind)
  return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def _settings(kind: type) -> dict[str, tuple[type, dataclasses.Field]]:
  fields = kind.__dataclass_fields__
  return {name: (key_type, fields[name]) for name, key_type in _fields(kind)}


def _config_dict_default(default: Any, kind: type) -> Any:
  base, optional = split_optional(kind)
  if not optional:
    return default
  return ml_collections.config_dict.FieldReference(default, field_type=base)


def cache_dir() -> pathlib.Path:
  """Returns where what can be made again is kept: $LMJAX_CACHE_DIR, $XDG_CACHE_HOME/lmjax or ~/.cache/lmjax."""
  if "LMJAX_CACHE_DIR" in os.environ:
    return pathlib.Path(os.environ["LMJAX_CACHE_DIR"])
  if "XDG_CACHE_HOME" in os.environ:
    return pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "lmjax"
  return pathlib.Path.home() / ".cache" / "lmjax"
