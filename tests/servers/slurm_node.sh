#!/usr/bin/env bash
# A real Slurm of one node on this machine, for trying `hydra/launcher=slurm` without a cluster.
#
#   tests/servers/slurm_node.sh start      installs Slurm and munge where they are missing, starts them, waits for the node
#   tests/servers/slurm_node.sh stop       cancels what runs and ends the daemons
#   tests/servers/slurm_node.sh status     exit status 0 when the node takes jobs
#
# Needs root on Debian or a relative of it, 100 MB of packages, half a minute. The daemons listen on 127.0.0.1 alone.
# A machine that has a Slurm of its own is left as it is. Without an accounting database `sacct` says nothing here, so
# submitit learns of a job only from the files it leaves, never from Slurm.
set -euo pipefail

CONF=/etc/slurm/slurm.conf
STATE=/var/lib/needle-slurm
MARK="# Written by Needle's slurm_node.sh"
WAIT_S=30

refuse() {
    echo "slurm_node: $*" >&2
    exit 2
}

check_machine() {
    [ "$(id -u)" = 0 ] || refuse "user $(id -un) is not root, which the daemons need: run it with sudo, or in a container"
    command -v apt-get >/dev/null || refuse "there is no apt-get here: this script knows Debian and its relatives only"
    if [ -e "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
        refuse "$CONF belongs to another Slurm, which is left alone: use that one, or move the file away"
    fi
}

install_packages() {
    if command -v slurmctld slurmd munged sinfo >/dev/null; then
        return
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || refuse "apt-get update failed: is there a network, or a mirror in /etc/apt?"
    apt-get install -qq --no-install-recommends slurm-wlm munge >/dev/null ||
        refuse "apt-get could not install slurm-wlm and munge"
}

# Memory is not shared out: a laboratory's jobs are bounded by their processors, and a small machine would queue them.
write_conf() {
    local host
    host=$(hostname -s)
    mkdir -p "$(dirname "$CONF")" "$STATE/ctld" "$STATE/slurmd"
    cat >"$CONF" <<END
$MARK
ClusterName=needle
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/slurmd
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

running() { # PIDFILE COMMAND
    [ -s "$1" ] && [ "$(ps -o comm= -p "$(cat "$1")" 2>/dev/null)" = "$2" ]
}

start_munge() {
    if munge -n >/dev/null 2>&1; then
        return
    fi
    [ -s /etc/munge/munge.key ] || mungekey --create
    chown munge: /etc/munge/munge.key
    install -d -o munge -g munge /run/munge /var/log/munge /var/lib/munge
    runuser -u munge -- munged
}

takes_jobs() {
    grep -qsF "$MARK" "$CONF" && timeout 5 sinfo --noheader --format=%T 2>/dev/null | grep -qE '^(idle|mixed|allocated|completing)'
}

start() {
    check_machine
    if takes_jobs; then
        echo "slurm_node: already up: $(sinfo --noheader --format='%D node, %c processors, %T')"
        return
    fi
    install_packages
    write_conf
    start_munge
    running "$STATE/slurmctld.pid" slurmctld || slurmctld
    running "$STATE/slurmd.pid" slurmd || slurmd
    for _ in $(seq "$WAIT_S"); do
        if takes_jobs; then
            echo "slurm_node: up: $(sinfo --noheader --format='%D node, %c processors, %T')"
            return
        fi
        # A node that was down keeps its state until somebody resumes it.
        scontrol update "NodeName=$(hostname -s)" State=RESUME 2>/dev/null || true
        sleep 1
    done
    tail -n 20 "$STATE/slurmctld.log" "$STATE/slurmd.log" >&2
    refuse "the node takes no jobs after $WAIT_S s; the ends of its logs are above"
}

stop() {
    check_machine
    [ -e "$CONF" ] || refuse "nothing to stop: $CONF is not there"
    timeout 10 scancel --user=root 2>/dev/null || true
    local name pid
    for name in slurmd slurmctld; do
        running "$STATE/$name.pid" "$name" || continue
        pid=$(cat "$STATE/$name.pid")
        kill "$pid"
        for _ in $(seq "$WAIT_S"); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 1
        done
        refuse "$name (process $pid) does not end"
    done
    # munge stays: others may use it, and it listens on no network.
    echo "slurm_node: stopped"
}

case "${1-}" in
    start) start ;;
    stop) stop ;;
    status) takes_jobs && sinfo ;;
    *) refuse "'${1-}' is not start, stop or status" ;;
esac
