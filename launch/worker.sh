#!/usr/bin/env bash
# What every host of a run runs: bash launch/worker.sh tpu|gpu|cpu [command and flags of lmjax]
# Sets the platform's flags, then runs lmjax with .venv, or with the interpreter that PYTHON names.
# Ends with lmjax's status, or with 75 where a SIGTERM has stopped the run before its end, so that whoever started it
# can tell that from a finished one and start it again. Its standard error is kept in LMJAX_LOG, where that is set.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
platform=$1
shift
if [[ "$platform" != cpu ]]; then
  # shellcheck source=/dev/null
  source "$repository/launch/${platform}_flags.sh"
fi
if [[ -z "${PYTHON:-}" && -x "$repository/.venv/bin/python" ]]; then PYTHON=$repository/.venv/bin/python; fi
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
log=${LMJAX_LOG:-$(mktemp)}

"${PYTHON:-python3}" -m lmjax "$@" 2> >(tee "$log" >&2) &
child=$!
# A shell waits for its child before it dies of a signal; lmjax has to hear of it now.
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do  # What ended was the waiting, by a signal.
  status=0
  wait "$child" || status=$?
done
sleep 0.5  # For tee to write what lmjax said last.
if [[ "$status" == 0 ]] && grep -q 'Interrupted after step' "$log"; then status=75; fi
exit "$status"
