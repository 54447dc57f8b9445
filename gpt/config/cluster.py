"""Schema of the machines: where the ranks compute, and what starts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Device(Enum):
    """Where the ranks compute."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class ClusterKind(Enum):
    """What starts a job's processes."""

    local = "local"  # this host, now
    slurm = "slurm"  # sbatch
    nodes = "nodes"  # the user, on every host, by commands that are printed


@dataclass(frozen=True)
class Cluster:
    """The machines. Keys of other kinds than the chosen one are refused: ``gpt.config.cluster_rules.READ_BY``."""

    kind: ClusterKind = MISSING
    device: Device = MISSING
    threads: int | None = None
    hang_seconds: int = 0  # without progress of any rank until the job counts as stuck; 0: never
    per_node: int | None = None  # ranks of a node: its GPUs, or on a CPU as many as it is to simulate
    python: str | None = None  # the interpreter on the nodes; None: this one's path
    cpus: int | None = None  # cores of a node; None: one per rank
    mem: str | None = None  # memory of a node, as Slurm writes it: 64G
    # Slurm
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # limit; hours:minutes:seconds, or with days in front
    gpu_type: str | None = None  # as in --gres=gpu:TYPE:8
    sbatch: list[str] = field(default_factory=list)  # further options, as they are: --exclusive
    setup: list[str] = field(default_factory=list)  # lines of shell before the ranks start: module load cuda
    environment: list[str] = field(default_factory=list)  # names of variables that the job gets from here
    signal_seconds: int = 120  # before the limit: ranks save, and the job goes back into the queue
    requeue: bool = True
    wait: bool = False  # stay until all has ended, and end as it did
    max_parallel: int | None = None  # cells of a grid that run at a time
    # by hand
    hosts: list[str] = field(default_factory=list)
    port: int = 29500  # on the first host
