#!/usr/bin/env bash
# Trains on Cloud TPU: bash launch/tpu.sh [flags of this script] [command and flags of lmjax]
#   bash launch/tpu.sh --name=a --zone=us-west4-a --type=v5litepod-16 --spot train --config=... --workdir=gs://...
#   bash launch/tpu.sh --name=a --zone=us-west4-a logs    shows what the run says, from its beginning
#   bash launch/tpu.sh --name=a --zone=us-west4-a stop    deletes the TPU, which costs until then
# Flags: --name --zone --type --slices=1 --spot --project --runtime_version (follows from --type) --retries=10 --dry_run
#
# Asks for the TPU unless it is there, waits for it, copies what git knows of this folder to every host, installs it
# there, runs, and shows what the first host says. A TPU that was taken away is asked for again, at most --retries
# times, and the same command goes on from its checkpoint. gcloud has to be logged in.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "lmjax: error: $1" >&2; exit "${2:-2}"; }
name='' zone='' type='' slices=1 spot='' project='' runtime_version='' retries=10 dry_run=''
while [[ "${1:-}" == --* ]]; do
  case $1 in
    --name=* | --zone=* | --type=* | --slices=* | --project=* | --runtime_version=* | --retries=*) declare "${1:2}" ;;
    --spot | --dry_run) declare "${1:2}=1" ;;
    *) fail "launch/tpu.sh has no flag $1; give flags of lmjax after its command, and values as in --name=a." ;;
  esac
  shift
done
case ${1:-} in stop | logs) type="${type:-any}" ;; esac
[[ -n "$name" && -n "$zone" && -n "$type" && -n "${1:-}" ]] ||
  fail "launch/tpu.sh needs --name, --zone, --type and a command."
[[ "$slices" =~ ^[1-9][0-9]*$ && "$retries" =~ ^[0-9]+$ ]] ||
  fail "--slices and --retries of launch/tpu.sh are numbers."
[[ "${1:-}" != train || "$*" == *"workdir=gs://"* || "$*" == *"workdir gs://"* ]] ||
  fail "--workdir must be a gs:// folder on Cloud TPU, for the disks of its hosts go with them."
[[ "${1:-}" != sweep ]] ||
  fail "A sweep needs a folder that locks and that its workers share, which the hosts of a TPU lack; train its trials."
case $type in  # https://cloud.google.com/tpu/docs/runtimes
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
where=("--zone=$zone")
if [[ -n "$project" ]]; then where+=("--project=$project"); fi
nodes=("$name") parts=("--node-id=$name")
if ((slices > 1)); then
  parts=("--node-count=$slices" "--node-prefix=$name") nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
parts+=("--accelerator-type=$type" "--runtime-version=${runtime_version:-$runtime}")
if [[ -n "$spot" ]]; then parts+=(--spot); fi

call() { if [[ -n "$dry_run" ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
queued() { call gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on() { call gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"; }
follow() { on "${nodes[0]}" 0 "bash lmjax/launch/tpu_host.sh follow"; }
state() { if [[ -z "$dry_run" ]]; then queued describe '--format=value(state.state)' 2>/dev/null || true; fi; }

hold() {  # Returns once the TPU is there; fails where it is taken away before.
  local now
  if [[ -z "$(state)" ]]; then
    begun=''
    queued create "${parts[@]}" || exit 1
  fi
  until now=$(state) && [[ "$now" == ACTIVE || -n "$dry_run" ]]; do
    case $now in FAILED | SUSPENDING | SUSPENDED) return 1 ;; esac
    sleep "${LMJAX_POLL_S:-30}"
  done
}
begin() {
  # shellcheck disable=SC2016  # The host expands it.
  local busy='{ kill -0 "$(<lmjax.pid)"; } 2> /dev/null'
  local unpack="if $busy; then echo 'lmjax: error: a run still goes on here.' >&2; exit 1; fi; rm -rf lmjax"
  unpack+=" && mkdir lmjax && tar -xzf lmjax.tar.gz -C lmjax"
  local node words archive="${TMPDIR:-/tmp}/lmjax-$name.tar.gz"
  words=$(printf '%q ' "$@")
  git ls-files > "$archive.list" || fail "launch/tpu.sh copies what git knows of lmjax's folder, and git fails." 1
  call tar --create --gzip "--file=$archive" "--files-from=$archive.list" || return
  for node in "${nodes[@]}"; do
    call gcloud compute tpus tpu-vm scp "$archive" "$node:lmjax.tar.gz" "${where[@]}" --worker=all &&
      on "$node" all "$unpack && bash lmjax/launch/tpu_host.sh install" || return
  done
  for node in "${nodes[@]}"; do on "$node" all "bash lmjax/launch/tpu_host.sh start $words" || return; done
}

case $1 in
  stop) queued delete --quiet --force; exit ;;
  logs) follow; exit ;;
esac
begun=''
for ((attempt = 0; attempt <= retries; attempt++)); do
  status=255
  if hold && { [[ -n "$begun" ]] || begin "$@"; }; then
    begun=1 status=0
    follow || status=$?
    [[ -z "$dry_run" && "$status" != 0 ]] || exit 0
  fi
  sleep "${LMJAX_POLL_S:-30}"  # A preemption shows in the run before it shows in the state.
  now=$(state)
  case $now:$status in
    FAILED:* | SUSPENDING:* | SUSPENDED:*)
      echo "lmjax: the TPU was taken away ($now); asking for it again." >&2
      begun=''
      queued delete --quiet --force || true ;;
    ACTIVE:75) begun='' ;;  # A run that was told to stop, as before a preemption.
    ACTIVE:255 | :* | *:255) ;;  # A connection that broke: the run may still be there.
    ACTIVE:*) fail "the run ended with status $status; the TPU is still held." "$status" ;;
  esac
done
fail "the TPU was lost, or could not be reached, more than --retries=$retries times." 1
