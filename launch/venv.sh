# Sourced by launch/local.sh and tests/run.sh: makes .venv in the current folder once and keeps it up to date.
#
# ensure_venv ""     installs lmjax;  ensure_venv test  installs it with the test extra.
# A marker file records what was installed, so that the next call returns at once. PYTHON picks the interpreter.
# shellcheck shell=bash

_is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    if ! _is_new_enough "$PYTHON"; then
      echo "lmjax: error: PYTHON=$PYTHON is not a Python of version 3.11 or newer." >&2
      return 1
    fi
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python python3.12 python3.11 python3.13 python3.14; do
    if _is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "lmjax: error: no Python of version 3.11 or newer is on PATH; install one, or name it in PYTHON." >&2
  return 1
}

_make_venv() {
  local python=$1
  echo "lmjax: making .venv with $("$python" --version)" >&2
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear .venv
  else  # Debian leaves ensurepip out; the pip of the interpreter can install into the environment instead.
    "$python" -m venv --clear --without-pip .venv
    "$python" -m pip --python .venv/bin/python install --quiet pip
  fi
}

# A digest of all that decides what is installed.
_wanted() {
  .venv/bin/python - setup.py constraints.txt <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in sys.argv[1:]:
  digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

_has() {
  [[ -f ".venv/lmjax-installed-$1" && "$(<".venv/lmjax-installed-$1")" == "$2" ]]
}

ensure_venv() {
  local extra=$1 python wanted
  python=$(_find_python)
  if ! _is_new_enough .venv/bin/python; then
    _make_venv "$python"
  elif [[ -n "${PYTHON:-}" && "$(.venv/bin/python --version)" != "$("$PYTHON" --version)" ]]; then
    echo "lmjax: error: .venv has $(.venv/bin/python --version), but PYTHON is $("$PYTHON" --version); remove .venv." >&2
    return 1
  fi
  wanted=$(_wanted)
  # The test extra includes what training needs.
  if _has test "$wanted" || { [[ -z "$extra" ]] && _has run "$wanted"; }; then
    return
  fi
  echo "lmjax: installing into .venv (once; some minutes)" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  echo "$wanted" > ".venv/lmjax-installed-${extra:-run}"
}
