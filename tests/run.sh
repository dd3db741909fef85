#!/usr/bin/env bash
# Checks lmjax on this machine: bash tests/run.sh [arguments of pytest, paths relative to the repository]
# Needs Python 3.11 or newer. Makes .venv and installs lmjax with its test extra the first time.
# Runs the linter, then the tests, and fails where either does. --all also runs the tests marked slow.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
ensure_venv test

export JAX_PLATFORMS=cpu
lint=0
.venv/bin/python -m ruff check --quiet --output-format=concise . || lint=$?
.venv/bin/python -m pytest -n 2 "$@"
exit "$lint"
