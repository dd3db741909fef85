# Sourced by launch/worker.sh on TPU hosts: sets how XLA works on TPUs; README.md says why.
# shellcheck shell=bash

# Without this, a TPU that cannot be had leaves a run on the CPU, where it goes on for days.
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
