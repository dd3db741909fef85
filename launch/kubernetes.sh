#!/usr/bin/env bash
# Trains on Kubernetes with JobSet (https://jobset.sigs.k8s.io): fills kubernetes/tpu.yaml or gpu.yaml and applies it.
#   bash launch/kubernetes.sh --name=a --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 --slices=2 \
#     train --config=/lmjax/experiments/gpt2.py --workdir=gs://...
#   bash launch/kubernetes.sh --name=a --image=IMAGE --accelerator=nvidia-h100-80gb --hosts=2 --chips=8 train ...
# Or starts workers of a sweep, a pod each, which Kubernetes itself can: fills kubernetes/sweep.yaml and applies it.
#   bash launch/kubernetes.sh --name=a --image=IMAGE --accelerator=nvidia-l4 --chips=1 --workers=8 --volume=CLAIM \
#     sweep --config=/lmjax/experiments/sweeps/depth.py --workdir=/shared/depth
# Flags: --name --image (kubernetes/Dockerfile makes it) --accelerator --topology (TPU alone) --slices=1 (TPU alone)
# --hosts (of a slice; of a TPU it follows from --topology) --chips (of a host; 4 TPUs, 8 GPUs) --retries=10 --dry_run
# --workers=1 (of a sweep) --volume (of a sweep: a claim on a file system with locks, ReadWriteMany; is /shared in pods)
# It shows with kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME (a sweep: job-name=NAME), and ends with kubectl
# delete jobset NAME (a sweep: job NAME).
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/kubernetes
fail() { echo "lmjax: error: $1" >&2; exit 2; }
name='' image='' accelerator='' topology='' slices=1 hosts='' chips='' retries=10 workers='' volume=''
dry_run=''
while [[ "${1:-}" == --* ]]; do
  case $1 in
    --name=* | --image=* | --accelerator=* | --topology=* | --slices=* | --hosts=* | --chips=* | --retries=* | \
      --workers=* | --volume=*)
      declare "${1:2}" ;;
    --dry_run) dry_run=1 ;;
    *) fail "launch/kubernetes.sh has no flag $1; give flags of lmjax after its command, and values as in --name=a." ;;
  esac
  shift
done
[[ -n "$image" && -n "$accelerator" && -n "${1:-}" ]] ||
  fail "launch/kubernetes.sh needs --name, --image, --accelerator and a command of lmjax."
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name=$name must be of small letters, digits and -, as a host is named."
if [[ "$accelerator" == tpu* ]]; then
  platform=tpu chips="${chips:-4}"
  [[ "$topology" =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology=$topology must say the TPU's shape, as 4x4 does."
  hosts=${hosts:-$(((${topology//x/*} + chips - 1) / chips))}
  resource=google.com/tpu
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $topology"
else
  platform=gpu chips="${chips:-8}" hosts="${hosts:-1}" resource=nvidia.com/gpu
  selector="cloud.google.com/gke-accelerator: $accelerator"
fi
[[ "$slices $hosts $chips $retries ${workers:-1}" =~ ^[0-9]+(' '[0-9]+){4}$ ]] ||
  fail "--slices, --hosts, --chips, --retries and --workers of launch/kubernetes.sh are numbers."
template=$platform
if [[ "$1" == sweep ]]; then
  template=sweep
  [[ -n "$volume" ]] || fail "A sweep needs --volume, the claim on the file system that its workers share as /shared."
  if [[ -n "$workers" ]]; then set -- sweep "--machines=$workers" "${@:2}"; fi
  [[ "$hosts $slices" == "1 1" ]] || fail "A trial of a sweep is one process; give its workers one host and one slice."
  [[ " $*" =~ ' '--?workdir[=' ']/shared/ ]] ||
    fail "--workdir of a sweep must be a folder in /shared, for whatever else a pod writes its workers do not share."
elif [[ -n "$workers$volume" ]]; then
  fail "--workers and --volume are of a sweep, but the command is $1."
fi

args=''
for argument in "$@"; do  # As YAML quotes it; $$ is a $ that Kubernetes leaves alone.
  # shellcheck disable=SC2016
  argument=${argument//'$('/'$$('}
  args+="${args:+, }'${argument//"'"/"''"}'"
done
manifest=$(<"$folder/$template.yaml")
fill() {
  manifest=${manifest//"{{$1}}"/"$2"}
}
fill NAME "$name"
fill IMAGE "$image"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill RETRIES "$retries"
fill WORKERS "${workers:-1}"
fill VOLUME "$volume"
fill PLATFORM "$platform"
fill RESOURCE "$resource"
fill SELECTOR "$selector"
fill ARGS "$args"

if [[ -n "$dry_run" ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
