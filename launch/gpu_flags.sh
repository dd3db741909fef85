# Sourced by launch/gpu.sh, launch/worker.sh and tests/benchmarks/gpu.sh: sets how XLA works on NVIDIA GPUs; README.md says why.
# shellcheck shell=bash

# What is already in XLA_FLAGS comes last, and so wins.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
# Without this, GPUs that cannot be had leave a run on the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
