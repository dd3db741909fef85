#!/usr/bin/env bash
# What launch/tpu.sh has every host of a TPU do: install, start [command and flags of lmjax], or follow.
# The run outlives the connection; beside lmjax's folder are lmjax.log, lmjax.pid and, at its end, lmjax.status.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case $1 in
  install)  # Ubuntu 22.04, which TPU hosts have, comes with Python 3.10; uv brings a newer one.
    python3 -m pip install --quiet uv
    python3 -m uv venv --quiet --clear --python 3.12 .venv
    python3 -m uv pip install --quiet -c constraints.txt '.[tpu]'
    ;;
  start)
    rm -f ../lmjax.status
    # shellcheck disable=SC2016  # The inner shell expands it.
    LMJAX_DISTRIBUTED=auto nohup bash -c 'bash launch/worker.sh tpu "$@"; echo "$?" > ../lmjax.status' \
      run "${@:2}" > ../lmjax.log 2>&1 < /dev/null &
    echo "$!" > ../lmjax.pid
    ;;
  follow)  # Ends with the status of the run.
    tail -n +1 -f ../lmjax.log &
    while [[ ! -s ../lmjax.status ]]; do sleep 1; done
    sleep 1.5  # For the last lines.
    kill "$!"
    exit "$(<../lmjax.status)"
    ;;
esac
