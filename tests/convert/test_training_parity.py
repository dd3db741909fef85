"""Fifty steps from the same weights on the same batches: the compiled step and transformers on torch, loss by loss."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import lmjax
from lmjax import config as config_lib
from lmjax import partitioning, train
from lmjax.config import MeshConfig

NUM_STEPS, BATCH, LENGTH, VOCAB = 50, 4, 48, 98
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
SIZES = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=None, eos_token_id=None)
BERT = transformers.BertConfig(
    **SIZES, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
T5 = transformers.T5Config(**SIZES, d_model=48, num_layers=2, num_heads=4, d_kv=12, d_ff=96, dropout_rate=0.0)
GPT2 = transformers.GPT2Config(
    **SIZES, n_layer=2, n_embd=48, n_head=4, n_positions=64, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
LLAMA = transformers.LlamaConfig(
    **SIZES, num_hidden_layers=2, hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2)
CASES = {
    "gpt2": (transformers.GPT2LMHeadModel, GPT2),
    "llama": (transformers.LlamaForCausalLM, LLAMA),
    "bert": (transformers.BertForMaskedLM, BERT),
    "t5": (transformers.T5ForConditionalGeneration, T5),
}


def batches(name):
  """Yields batches with texts of different lengths, in which there is something to learn: most tokens never occur."""
  rng = np.random.default_rng(0)
  for _ in range(NUM_STEPS):
    start, stride = rng.integers(1, VOCAB, (BATCH, 1)), rng.integers(1, 4, (BATCH, 1))
    text = 1 + (start + stride * np.arange(LENGTH + 1)) % 12
    real = np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    batch = {"segment_ids": real.astype(np.int32), "weights": real.astype(np.float32)}
    if name == "bert":
      masked = real & (rng.random(real.shape) < 0.3)
      batch |= {"inputs": np.where(masked, VOCAB - 1, text[:, 1:]), "targets": text[:, 1:],
                "weights": masked.astype(np.float32)}
    elif name == "t5":
      batch |= {"encoder_inputs": text[:, ::-1][:, :LENGTH], "encoder_segment_ids": np.ones((BATCH, LENGTH), np.int32),
                "inputs": np.pad(text[:, 1:-1], ((0, 0), (1, 0))), "targets": text[:, 1:]}
    else:
      batch |= {"inputs": text[:, :-1], "targets": text[:, 1:]}
    yield {key: np.ascontiguousarray(value, value.dtype if value.dtype == np.float32 else np.int32)
           for key, value in batch.items()}


def loss_of_logits(model, params, batch, cfg, rngs=None):
  """An objective for models whose own is not asked about here: the summed cross-entropy of logits."""
  if "encoder_inputs" in batch:
    args = batch["encoder_inputs"], batch["inputs"], None, batch["encoder_segment_ids"]
  else:
    args = batch["inputs"], None, batch["segment_ids"]
  log_probs = jax.nn.log_softmax(model.apply({"params": params}, *args))
  nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
  total = jnp.sum(nll * batch["weights"])
  return total, {"loss": total, "weight": jnp.sum(batch["weights"])}


def losses_of_torch(name, model):
  undecayed = [p for key, p in model.named_parameters() if p.ndim == 1 or "relative_attention_bias" in key]
  decayed = [p for key, p in model.named_parameters() if not (p.ndim == 1 or "relative_attention_bias" in key)]
  optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=undecayed,
                                weight_decay=0.0)], lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
  losses = []
  for batch in batches(name):
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    inputs = dict(input_ids=batch["inputs"], attention_mask=batch["segment_ids"])
    if name == "t5":
      inputs = dict(input_ids=batch["encoder_inputs"], attention_mask=batch["encoder_segment_ids"],
                    decoder_input_ids=batch["inputs"])
    logits = model(**{key: value.long() for key, value in inputs.items()}).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["targets"].long(), reduction="none")
    loss = (nll * batch["weights"]).sum() / batch["weights"].sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
  return losses


def losses_of_lmjax(name, folder):
  model, params = lmjax.load(folder)
  config = config_lib.base_config()
  config.model.update({field: getattr(model.cfg, field) for field in config.model})
  config.data.seq_len = LENGTH
  config.optim.update(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
  config.train.update(num_steps=NUM_STEPS, batch_size=BATCH)
  mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
  setup = train.build(config_lib.resolve_model(config_lib.from_config_dict(config), VOCAB), mesh)
  if name in ("bert", "t5"):
    setup = setup._replace(objective=types.SimpleNamespace(loss=loss_of_logits))
  hparams = {"learning_rate": np.float32(LEARNING_RATE), "weight_decay": np.float32(WEIGHT_DECAY),
             "seed": np.uint32(0)}
  losses = []
  with partitioning.use_mesh(mesh):
    state, step = setup.start(jax.tree.map(jnp.array, params), jax.random.key(0)), train.make_train_step(setup)
    for batch in batches(name):
      state, out = step(state, batch, hparams)
      losses.append(float(out["loss"]))
  return losses


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_have_the_losses_of_torch(name, tmp_path):
  kind, config = CASES[name]
  torch.manual_seed(0)
  model = kind(config).train()
  with torch.no_grad():
    for parameter in model.parameters():  # Far from where little is learned in fifty steps, and no bias is zero.
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path)
  expected = losses_of_torch(name, model)
  assert expected[-1] < 0.8 * expected[0]  # Something is learned, so that the losses depend on all that is updated.
  np.testing.assert_allclose(losses_of_lmjax(name, tmp_path), expected, rtol=0, atol=1e-3)
