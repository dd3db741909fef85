"""The commands: one file a verb, which turns flags into one library call.

A command's file holds
  its docstring, which is its help: the first line is the summary, an indented block the example;
  `REQUIRED`, the flags it cannot do without;
  `POSITIONAL`, the flag that an argument without a name sets, or None;
  `define_flags(flag_values)` and `main(flag_values)`.
`cli.py` finds the command, parses, explains and reports mistakes; `experiment.py` reads `--config`.
"""
