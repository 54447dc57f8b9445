"""The rules of ``cluster``; called by ``gpt.config.rules``. What depends on this machine is in ``launchers.slurm``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpt.config.cluster import Cluster, ClusterKind, Device
from gpt.config.derived import replicas, world_size
from gpt.config.schema import Config, Ranks
from gpt.config.task_schemas import Section

_S, _N = ClusterKind.slurm, ClusterKind.nodes
# Which kinds read a key; the first four and dry_run are for all.
READ_BY = {
    "per_node": (_S, _N), "hosts": (_N,), "port": (_N,),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "time", "gpu_type", "sbatch", "setup"), (_S,)),
    **dict.fromkeys(("environment", "signal_seconds", "requeue", "wait", "max_parallel"), (_S,)),
    **dict.fromkeys(("python", "cpus", "mem"), (_S,)),
}  # fmt: skip
_TIME = re.compile(r"\d+-\d+(:\d\d){0,2}|\d+:\d\d:\d\d")
_NAME = re.compile(r"[A-Za-z_]\w*")
_MEMORY = re.compile(r"\d+[KMGT]?")


def is_away(config: Config) -> bool:
    """Whether the command is for other machines than this one."""
    return config.cluster.kind is not ClusterKind.local and config.task.facts.ranks is not Ranks.none


def nodes(config: Config) -> int:
    """Return the number of hosts or nodes that a job takes."""
    return max(1, world_size(config) // ranks_per_node(config))


def ranks_per_node(config: Config) -> int:
    """Return the number of ranks on each node."""
    cluster, ranks = config.cluster, world_size(config)
    if cluster.kind is ClusterKind.nodes:
        return cluster.per_node or ranks // len(cluster.hosts)
    return min(ranks, cluster.per_node or ranks)


def cluster_problems(config: Config) -> Iterator[str]:
    """What is wrong with the machines that are asked for."""
    cluster, kind = config.cluster, config.cluster.kind
    untouched = Cluster(kind, cluster.device)
    for key, kinds in READ_BY.items():
        if kind not in kinds and getattr(cluster, key) not in (getattr(untouched, key), None, []):
            names = " or ".join(f"cluster={each.value}" for each in kinds)
            yield f"cluster.{key}={getattr(cluster, key)} goes with {names}, not with cluster={kind.value}"
    if config.dry_run and kind is ClusterKind.local:
        yield "dry_run=true shows what a cluster would be told: add cluster=slurm; for this host there is task=plan"
    for key in ("per_node", "cpus", "max_parallel", "port"):
        value = getattr(cluster, key)
        if value is not None and value < 1:
            yield f"cluster.{key}={value}: must be at least 1"
    if kind is not ClusterKind.local and min(replicas(config), cluster.per_node or 1) >= 1:
        yield from _shared_out(config)
    if kind is ClusterKind.slurm:
        yield from _slurm(cluster)
        if is_away(config):
            if isinstance(section := getattr(config, config.task.name, None), Section):
                yield from section.unattended_problems("cluster=slurm")
            if cluster.device is Device.auto:
                yield "cluster=slurm must know whether to ask for GPUs: cluster.device=gpu or cluster.device=cpu"


def _shared_out(config: Config) -> Iterator[str]:
    """Every node gets equally many ranks."""
    cluster, ranks = config.cluster, world_size(config)
    if cluster.kind is ClusterKind.nodes and not cluster.hosts:
        yield "cluster=nodes needs the hosts: cluster.hosts=[a,b], the first is where the ranks meet"
    elif cluster.kind is ClusterKind.nodes:
        count = len(cluster.hosts)
        each = cluster.per_node or ranks / count
        if each * count != ranks or ranks % count:
            yield (
                f"{count} hosts{f' x cluster.per_node={cluster.per_node}' if cluster.per_node else ''} do not make the "
                f"{ranks:,} ranks that the degrees of parallel need: name other hosts, or choose another parallel=..."
            )
    elif cluster.per_node and ranks > cluster.per_node and ranks % cluster.per_node:
        fitting = max(d for d in range(1, cluster.per_node + 1) if ranks % d == 0)
        yield (
            f"{ranks:,} ranks do not share out evenly over nodes of cluster.per_node={cluster.per_node}: "
            f"cluster.per_node={fitting} makes {ranks // fitting:,} nodes, or choose another parallel=..."
        )


def _slurm(cluster: Cluster) -> Iterator[str]:
    if cluster.mem is not None and not _MEMORY.fullmatch(cluster.mem):
        yield f"cluster.mem={cluster.mem}: memory of a node, written like 64G"
    if cluster.time is not None and not _TIME.fullmatch(cluster.time):
        yield (
            f"cluster.time={cluster.time}: write hours:minutes:seconds, or days in front: 12:00:00, 2-00:00:00 "
            "(in a file in quotes, or YAML reads a number of seconds)"
        )
    if not 0 < cluster.signal_seconds <= 65535:
        yield f"cluster.signal_seconds={cluster.signal_seconds}: from 1 to 65535 seconds before the limit"
    if stray := [name for name in cluster.environment if not _NAME.fullmatch(name)]:
        yield (
            f"cluster.environment={','.join(stray)}: names of variables only, no values: what stands in a command "
            "can be read by others"
        )
    for line in cluster.sbatch:
        if not line.startswith("-") or "\n" in line:
            yield f"cluster.sbatch: {line!r} is no option of sbatch, which begins with -"
