#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine: bash launch/gpu.sh [flags of lmjax train]
# Set PYTHON to an interpreter that has lmjax and JAX with CUDA (pip install -e . "jax[cuda13]"); python3 by default.
# Without --config.mesh.*, several GPUs hold a copy of the model each; --config.mesh.data=1 --config.mesh.fsdp=-1 splits it.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
# shellcheck source=launch/gpu_flags.sh
source "$repository/launch/gpu_flags.sh"

if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then
  echo "lmjax: error: JAX of $python finds no NVIDIA GPU; install jax[cuda13] there, or name another interpreter in PYTHON." >&2
  exit 1
fi
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m lmjax train "$@"
