"""turn a run into a Hugging Face folder, or the other way round

The direction follows from what --source is.

  lmjax convert --source=runs/quickstart --target=quickstart-hf
  lmjax convert --source=gpt2-hf --target=runs/gpt2
  lmjax convert --source=runs/lora --target=adapter --adapter
"""

from absl import flags

REQUIRED = ("source", "target")
POSITIONAL = None


def define_flags(flag_values: flags.FlagValues) -> None:
  flags.DEFINE_string("source", None, "Hugging Face folder, hf:OWNER/NAME on the hub, or the workdir of a run.",
                      flag_values=flag_values)
  flags.DEFINE_boolean("adapter", False, "Write the adapters of a run (config.optim.lora_rank) alone, in PEFT's "
                       "format, in place of the model that they are merged into.", flag_values=flag_values)
  flags.DEFINE_string("target", None, "Folder to write.", flag_values=flag_values)


def main(flag_values: flags.FlagValues) -> None:
  from lmjax import convert
  print(convert.convert(flag_values.source, flag_values.target, adapter=flag_values.adapter))
