"""The configuration files of a test cluster, from nodes, ports and folder."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """One node in slurm.conf; `memory` in MB."""

    name: str
    gpus: int = 8
    gpu_type: str = ""
    cpus: int = 16
    memory: int = 20000

    @property
    def gres(self) -> str:
        kind = f"gpu:{self.gpu_type}" if self.gpu_type else "gpu"
        return f"{kind}:{self.gpus}"


FOUR_NODES = tuple(Node(f"node{i}") for i in range(1, 5))


def config_files(
    folder: Path,
    nodes: Sequence[Node],
    ports: Mapping[str, int],
    ctld_port: int,
    dbd_port: int | None,
    grace_time: int,
) -> dict[str, str]:
    """File name -> text of slurm.conf, gres.conf and, with accounting (`dbd_port`), slurmdbd.conf."""
    host = socket.gethostname()
    fields = {"folder": folder, "host": host, "dbd_port": dbd_port, "ctld_port": ctld_port, "grace_time": grace_time}
    fields["names"] = ",".join(ports)
    node_lines = "".join(
        f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node.name]} CPUs={node.cpus} "
        f"RealMemory={node.memory}{f' Gres={node.gres}' if node.gpus else ''}\n"
        for node in nodes
    )
    gres_lines = "".join(
        f"NodeName={node.name} Name=gpu {f'Type={node.gpu_type} ' if node.gpu_type else ''}"
        f"File={folder}/gpu/gpu{'0' if node.gpus == 1 else f'[0-{node.gpus - 1}]'}\n"
        for node in nodes
        if node.gpus
    )
    accounting = ACCOUNTING if dbd_port else "AccountingStorageType=accounting_storage/none\n"
    files = {
        "slurm.conf": (SLURM_CONF + accounting).format(**fields) + node_lines + PARTITIONS.format(**fields),
        "gres.conf": gres_lines,
    }
    return files | ({"slurmdbd.conf": SLURMDBD_CONF.format(**fields)} if dbd_port else {})


SLURM_CONF = """\
ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=20
ReturnToService=2
KillWait=10
MailProg=/bin/true
PropagateResourceLimits=NONE
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
"""
PARTITIONS = """\
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_time}
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo={folder}/munge/socket
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
