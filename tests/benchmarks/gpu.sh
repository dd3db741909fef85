#!/usr/bin/env bash
# What makes sense on one NVIDIA GPU, in at most nine minutes: bash tests/benchmarks/gpu.sh [--tiny]
#
# Needs jax, flax, optax, orbax, ml-collections, torch and transformers, and nothing else; PYTHON picks the interpreter
# (python3 by default). Each part writes its table and log, and its figures as JSON, to ${OUT:-/tmp/lmjax-bench}. A part
# that fails or runs out of time is said so at the end, and stops no other; the exit status is then 1. --tiny shrinks
# every shape, so that the parts can be tried where there is no GPU.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
out=${OUT:-/tmp/lmjax-bench}
deadline=$((SECONDS + 525))
mkdir -p "$out"
# shellcheck source=launch/gpu_flags.sh
source "$here/../../launch/gpu_flags.sh"
# JAX and torch share the card, so neither may take it whole; what a training run takes beforehand, a benchmark does not.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# No part may download anything.
export HF_HUB_OFFLINE=1

large=() small=() quick=() torch=torch_compile
case ${1:-} in
  "") ;;
  --tiny)
    small=(--num_layers=2 --embed_dim=64 --num_heads=2 --mlp_dim=128 --vocab_size=512 --seq_len=64 --batch_size=2
           --dtype=float32 --rounds=2)
    large=("${small[@]}" --num_kv_heads=1)
    small+=(--num_kv_heads=2)
    quick=(--quick) torch=torch  # Compiling for a CPU takes longer than all the rest.
    ;;
  *)
    echo "gpu.sh: error: unknown flag $1; the only one is --tiny." >&2
    exit 2
    ;;
esac

failed=()

# part NAME SECONDS COMMAND...: runs a benchmark for at most that long.
part() {
  local name=$1
  local limit=$2
  local began=$SECONDS
  local status=0
  shift 2
  if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 10)); then
    failed+=("$name (no time left)")
    return
  fi
  echo "== $name"
  rm -f "$out/$name.json"
  timeout --kill-after=5 "$limit" "$python" "$@" --json="$out/$name.json" >"$out/$name.log" 2>&1 || status=$?
  if ((status == 0)); then
    cat "$out/$name.log"
  elif ((status == 124 || status == 137)); then
    failed+=("$name (stopped after $limit s)")
  else
    tail -n 15 "$out/$name.log"
    failed+=("$name (exit $status)")
  fi
  echo "== $name: $((SECONDS - began)) s"
}

train() {
  local name=$1
  local limit=$2
  shift 2
  part "$name" "$limit" "$here/train_step.py" --steps_per_call=4 "$@"
}

if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.csv" || true
fi

# The two shapes of the README's figures first. A second torch model of the larger one does not fit beside the others.
train llama_1b 200 --shapes=llama_1b --peers="$torch" --rounds=5 "${large[@]}"
train gpt2_124m 150 --shapes=gpt2_124m --peers="$torch,plain_jax" --rounds=5 "${small[@]}"
part decode 80 "$here/decode.py" --rounds=3 "${quick[@]}"
part checkpoint 90 "$here/checkpoint.py" --rounds=3 "${quick[@]}"

if ((${#failed[@]})); then
  printf "gpu.sh: failed: %s\n" "${failed[@]}" >&2
  exit 1
fi
echo "gpu.sh: all parts ran; JSON in $out"
