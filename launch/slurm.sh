#!/usr/bin/env bash
#SBATCH --job-name=lmjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Trains under Slurm; from lmjax's folder: sbatch [options] launch/slurm.sh [--dry_run] [command and flags of lmjax]
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=1-0 launch/slurm.sh train --config=... --workdir=...
#   sbatch --array=1-8 --gpus-per-node=1 launch/slurm.sh sweep --config=... --workdir=/SHARED/...   eight workers of a sweep
# Options of sbatch win over the lines above. JAX gives each task of a node one of its GPUs, by number: ask for as many
# tasks as GPUs, and not by --gpus-per-task, which hides the others. LMJAX_PLATFORM=cpu trains without GPUs.
#
# Two minutes before the time limit, and when it is preempted, Slurm sends SIGTERM to the tasks; they save and end, and
# the job is queued again under the same number. It goes on from its last checkpoint, as it does when a node fails.
#
# Each job of an array works on the same sweep, with the GPUs that it has, and ends when the sweep does. With --workers=N
# of lmjax a job has several workers, which share its GPUs out among themselves; so do tasks with --gpus-per-task=1.
set -euo pipefail

dry_run=
if [[ "${1:-}" == --dry_run ]]; then
  dry_run=1
  shift
fi
# Slurm runs a copy of this script; where it was submitted is where the code is.
repository=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f "$repository/launch/worker.sh" ]]; then
  echo "lmjax: error: $repository is not the folder of lmjax; submit launch/slurm.sh from there." >&2
  exit 2
fi
run=(srun --kill-on-bad-exit=1) shown=()
if [[ "${1:-}" == sweep ]]; then  # Its workers know of each other by the folder alone, and go on without one of them.
  run=(srun --kill-on-bad-exit=0)
  machines=$((${SLURM_ARRAY_TASK_COUNT:-1} * ${SLURM_NTASKS:-1}))
  if ((machines > 1)); then set -- sweep "--machines=$machines" "${@:2}"; fi
elif [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
  echo "lmjax: error: the jobs of an array share a sweep, but ${1:-} is a run that each would make; leave --array out." >&2
  exit 2
else
  export LMJAX_DISTRIBUTED=auto
  shown=(LMJAX_DISTRIBUTED=auto)
fi
# Slurm 22.05 and newer do not pass it on.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

run+=(bash "$repository/launch/worker.sh" "${LMJAX_PLATFORM:-gpu}" "$@")
if [[ -n "$dry_run" ]]; then
  printf '%q ' ${shown[@]+"${shown[@]}"} "${run[@]}"
  echo
  exit
fi
status=0
"${run[@]}" || status=$?
if [[ "$status" == 75 ]]; then  # Stopped before its end.
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
