"""continue a text, or answer it with an encoder-decoder

PATH is the workdir of a run, a Hugging Face folder, or hf:OWNER/NAME on the hub.

  lmjax generate --workdir=PATH --prompt="def " --max_new_tokens=100
  lmjax generate PATH --prompt="Once upon a time" --temperature=0.8 --top_p=0.95 --num_samples=3
  lmjax generate PATH --chat --prompt="Who wrote this?"
"""

from absl import flags

from lmjax.config import UserError

REQUIRED = ("workdir", "prompt")
POSITIONAL = "workdir"


def define_flags(flag_values: flags.FlagValues) -> None:
  flags.DEFINE_string("workdir", None, "Workdir of a run, a Hugging Face folder, or hf:OWNER/NAME on the hub.",
                      flag_values=flag_values)
  flags.DEFINE_string("prompt", None, "Text to go on from.", flag_values=flag_values)
  flags.DEFINE_integer("max_new_tokens", 128, "Tokens made at most.", flag_values=flag_values)
  flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 always takes the likeliest token.",
                     flag_values=flag_values)
  flags.DEFINE_integer("top_k", 0, "Sample among this many likeliest tokens; 0 among all.", flag_values=flag_values)
  flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens that hold this share of the probability.",
                     flag_values=flag_values)
  flags.DEFINE_integer("seed", 0, "Seed of the sampling.", flag_values=flag_values)
  flags.DEFINE_integer("decoder_start_token_id", None, "What the text of an encoder-decoder begins with; unset means "
                       "what the Hugging Face folder says.", flag_values=flag_values)
  flags.DEFINE_boolean("chat", False, "Whether the prompt is a user's message, to be answered as the chat template of "
                       "the folder has it.", flag_values=flag_values)
  flags.DEFINE_integer("num_samples", 1, "Continuations made.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  if flag_values.num_samples < 1:
    raise UserError(f"--num_samples is {flag_values.num_samples}, but it must be at least 1.")
  if not 0 <= flag_values.seed < 2**32:
    raise UserError(f"--seed is {flag_values.seed}, but it must be at least 0 and below 2**32.")
  import lmjax
  from lmjax import convert
  tokenizer = lmjax.load_tokenizer(flag_values.workdir)
  model, params = lmjax.load(flag_values.workdir)
  reads, start = model.cfg.architecture == "encoder_decoder", flag_values.decoder_start_token_id
  if reads and start is None:
    start = convert.decoder_start_token_id(flag_values.workdir)
  if flag_values.chat:
    from lmjax.data import chat
    prompt, eos_id = chat.prompt(flag_values.prompt, tokenizer, str(convert.tokenizer_file(flag_values.workdir)))
  else:
    # A model knows a text only by the token that ends the one before; an encoder reads it as its tokenizer frames it.
    prompt = tokenizer.encode(flag_values.prompt, add_special_tokens=reads) or [tokenizer.eos_id]
    eos_id = tokenizer.eos_id
  samples = lmjax.generate(
      model, params, [prompt] * flag_values.num_samples, max_new_tokens=flag_values.max_new_tokens,
      temperature=flag_values.temperature, top_k=flag_values.top_k, top_p=flag_values.top_p, seed=flag_values.seed,
      eos_id=eos_id, vocab_size=tokenizer.size, decoder_start_token_id=start,
      both_sides=convert.sees_both_sides(flag_values.workdir))
  for index, tokens in enumerate(samples):
    if flag_values.num_samples > 1:
      print(f"--- {index + 1} ---")
    tokens = tokenizer.without_opening(tokens) if reads else tokens
    print(("" if reads or flag_values.chat else flag_values.prompt) + tokenizer.decode(tokens))
