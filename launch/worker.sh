#!/usr/bin/env bash
# What every host of a run runs: bash launch/worker.sh tpu|gpu|cpu [command and flags of lmjax]
# Sets the platform's flags, then becomes lmjax, by .venv or the interpreter that PYTHON names. A run that a SIGTERM has
# stopped before its end ends with status 75 here, so that whoever started it can tell, and starts it again.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ "$1" != cpu ]]; then
  # shellcheck source=/dev/null
  source "$repository/launch/$1_flags.sh"
fi
if [[ -z "${PYTHON:-}" && -x "$repository/.venv/bin/python" ]]; then PYTHON="$repository/.venv/bin/python"; fi
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
export LMJAX_INTERRUPTED_STATUS=${LMJAX_INTERRUPTED_STATUS:-75}
exec "${PYTHON:-python3}" -m lmjax "${@:2}"
