"""transformers' models trained in PyTorch as its users do: sdpa attention, AdamW, clipping, autocast in bfloat16."""

from typing import Any, Callable

from shapes import Shape
import torch
import transformers


def make_step(shape: Shape, *, compiled: bool) -> Callable[[], torch.Tensor]:
  """Returns a function that runs one step on one batch and returns the loss; on a GPU where there is one."""
  transformers.logging.set_verbosity_error()
  torch.manual_seed(0)
  on_gpu = torch.cuda.is_available()
  if on_gpu:
    torch.set_float32_matmul_precision("high")
  device = "cuda" if on_gpu else "cpu"
  model = make_model(shape).to(device).train()
  # On a GPU one fused kernel updates all parameters; on a CPU this is the default, a loop over them.
  optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1,
                                fused=on_gpu or None)
  forward = torch.compile(model) if compiled else model
  tokens = torch.from_numpy(shape.tokens()).long().to(device)
  inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
  cast = torch.autocast(device, torch.bfloat16, enabled=shape.dtype == "bfloat16")

  def run() -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    with cast:
      logits = forward(input_ids=inputs, use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()

  return run


def make_model(s: Shape) -> Any:
  common = dict(vocab_size=s.vocab_size, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0)
  if s.family == "llama":
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **common, hidden_size=s.embed_dim, intermediate_size=s.mlp_dim, num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads, num_key_value_heads=s.num_kv_heads, max_position_embeddings=s.seq_len,
        tie_word_embeddings=True))
  return transformers.GPT2LMHeadModel(transformers.GPT2Config(
      **common, n_embd=s.embed_dim, n_inner=s.mlp_dim, n_layer=s.num_layers, n_head=s.num_heads, n_positions=s.seq_len,
      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
