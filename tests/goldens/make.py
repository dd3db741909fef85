"""Writes the golden losses anew, for a change that is meant to change them, or for new versions in constraints.txt.

    python tests/goldens/make.py

runs losses.py twice, refuses where the two differ or an optimizer does not learn, and replaces debug_losses.json. No
test calls this. Say in the commit why the numbers changed.
"""

import json
import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent
PATH = FOLDER / "debug_losses.json"


def main() -> None:
  first, second = (subprocess.run([sys.executable, FOLDER / "losses.py"], check=True, stdout=subprocess.PIPE,
                                  text=True).stdout for _ in range(2))
  if first != second:
    sys.exit("Two runs on this machine gave different losses; nothing was written.")
  for optimizer, losses in json.loads(first)["losses"].items():
    begin, end = (float.fromhex(losses[i]) for i in (0, -1))
    print(f"{optimizer}: {begin:.4f} -> {end:.4f}")
    if not end < begin - 1:
      sys.exit(f"{optimizer} does not learn; nothing was written.")
  temporary = PATH.with_suffix(".tmp")
  temporary.write_text(first + "\n")
  os.replace(temporary, PATH)


if __name__ == "__main__":
  main()
