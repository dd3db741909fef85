"""`lmjax COMMAND ...`, which is also `python -m lmjax COMMAND ...`."""

import sys


def main() -> int:
  """Runs the command of `sys.argv` and returns its exit status."""
  from lmjax.commands import cli
  return cli.run(sys.argv[1:])


if __name__ == "__main__":
  sys.exit(main())
