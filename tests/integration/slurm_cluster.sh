#!/usr/bin/env bash
# A Slurm cluster of one node on this machine: bash tests/integration/slurm_cluster.sh start|stop FOLDER
# Needs root, and Debian's slurm-wlm and munge; all its files are in FOLDER, of which FOLDER/slurm.conf is SLURM_CONF.
set -euo pipefail

action=$1
folder=$2
export SLURM_CONF=$folder/slurm.conf
if [[ "$action" == stop ]]; then
  scontrol shutdown || true
  for name in slurmd slurmctld munged; do
    if [[ -f "$folder/$name.pid" ]]; then kill "$(<"$folder/$name.pid")" 2>/dev/null || true; fi
  done
  exit
fi

mkdir -p "$folder/state" "$folder/spool"
host=$(hostname -s)
cat > "$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=20
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
slurmctld
slurmd -N "$host"
for _ in {1..60}; do
  if [[ "$(sinfo --noheader --format=%t 2>/dev/null)" == idle ]]; then exit 0; fi
  sleep 0.5
done
echo "slurm_cluster.sh: the node did not come up; see the logs in $folder." >&2
exit 1
