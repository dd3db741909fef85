"""Models from and to Hugging Face folders.

One engine reads and writes; what it knows of a family is data, in the module of that family (gpt2, llama), which serves
both directions. Supporting another family means adding its module to `hf_config.FAMILIES`.
"""

from lmjax.convert.folders import (
  convert,
  decoder_start_token_id,
  import_params,
  load,
  load_tokenizer,
  read_model,
  read_whole,
  save_hf,
  save_peft,
  sees_both_sides,
  tokenizer_file,
)

__all__ = ["convert", "decoder_start_token_id", "import_params", "load", "load_tokenizer", "read_model", "read_whole",
           "save_hf", "save_peft", "sees_both_sides", "tokenizer_file"]
