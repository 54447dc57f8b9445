"""Slurm with two nodes on this host, without accounting, cgroups, and keys."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_signals import wait_for

from launchers import rank_env

CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
FirstJobId={first}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def running(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, yield the environment in which its commands find it, end it."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "srun"))):
        pytest.skip("needs Slurm's daemons (slurmctld, slurmd)")
    (folder / "state").mkdir()
    conf = CONF.format(
        host=socket.gethostname().partition(".")[0],
        ports=rank_env.free_ports(3),
        user=getpass.getuser(),
        folder=folder,
        first=1000
        * (1 + os.getpid() % 60000),  # ranks take ports by their job's number: apart from another such cluster
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    commands = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for command in commands]

    def idle() -> bool:
        done = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True, check=False)
        return done.stdout.strip() == b"2"

    try:
        wait_for(idle)
        yield env
        wait_for(idle)  # a step's last process waits for the controller
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
            daemon.wait()
