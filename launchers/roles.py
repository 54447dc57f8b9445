"""Who started this process: the user, who gets workers spawned, or a launcher that has started every rank itself."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.config import UserError
from launchers.places import LOCALHOST, Place

PADDLE, SLURM, MPI = "paddle.distributed.launch", "srun", "mpirun"
# Below the ports that Linux gives out by itself. A job listens on its first two; the others only tell its ranks apart.
FIRST_PORT, PORTS, PORTS_PER_JOB = 20000, 12000, 64


@dataclass(frozen=True)
class Role:
    """This process among those that were started together; ``starter`` is empty if it was started alone.

    A process looks after one rank, but for ``spread``: one process on every host, each with its share of the ranks.
    """

    starter: str = ""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_size: int = 1
    spread: bool = False

    def share(self, ranks: int) -> int:
        """How many of the job's ranks each process looks after."""
        return max(1, ranks // self.world) if self.spread else 1

    def here(self, ranks: int) -> int:
        """How many of the job's ranks run on this host."""
        return self.local_size * self.share(ranks) if self.starter else ranks

    def problems(self, ranks: int, product: str) -> list[str]:
        """What does not fit between the processes that were started and the configured degrees.

        Args:
            ranks: the product of the degrees.
            product: the same in words, ``4 = dp 2 x mp 2``.
        """
        if not self.starter or self.world * self.share(ranks) == ranks:
            return []
        option = " (srun -n, or --ntasks-per-node times the nodes)" if self.starter == SLURM else ""
        return [
            f"{self.starter} started {self.world:,} rank(s), but the degrees of parallel need {product}: "
            f"start {ranks:,}{option}, or choose another parallel=..."
        ]


def detect(env: Mapping[str, str]) -> Role:
    """Read from the environment who we are.

    Slurm counts only as a step with several tasks (``srun``): a batch script has SLURM_PROCID and SLURM_NTASKS too,
    and a command in it runs once.

    Example:
        >>> detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).starter
        ''
        >>> detect({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}).starter
        'srun'
    """

    def number(key: str, default: int = 0) -> int:
        text = env.get(key, "")
        return int(text) if text.isdigit() else default

    if env.get("PADDLE_TRAINER_ID", "").isdigit() and env.get("PADDLE_CURRENT_ENDPOINT"):
        local = number("PADDLE_LOCAL_RANK", number("PADDLE_RANK_IN_NODE"))
        world = number("PADDLE_TRAINERS_NUM", 1)
        return Role(PADDLE, number("PADDLE_TRAINER_ID"), world, local, number("PADDLE_LOCAL_SIZE", 1))
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    if step.isdigit() and env.get("SLURM_PROCID", "").isdigit() and number("SLURM_STEP_NUM_TASKS") > 1:
        sizes = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        size = sizes[min(number("SLURM_NODEID"), len(sizes) - 1)]
        world, local = number("SLURM_STEP_NUM_TASKS"), number("SLURM_LOCALID")
        return Role(SLURM, number("SLURM_PROCID"), world, local, size, spread=set(sizes) == {1})
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        local, size = number("OMPI_COMM_WORLD_LOCAL_RANK"), number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)
        return Role(MPI, number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE"), local, size)
    return Role()


def tasks_per_node(words: str) -> list[int]:
    """Slurm's shorthand, written out.

    Example:
        >>> tasks_per_node("2(x3),1")
        [2, 2, 2, 1]
    """
    counts = []
    for word in words.split(","):
        count, _, times = word.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _slurm_hosts(nodes: str) -> list[str]:
    """Addresses behind Slurm's list of nodes: a node's name need not be one that the network knows."""
    names = _scontrol("hostnames", nodes).split()
    with contextlib.suppress(UserError):  # the controller is busy: names will do in most places
        told = _scontrol("node", nodes, "--oneliner")
        addresses = dict(re.findall(r"^NodeName=(\S+).*? NodeAddr=(\S+)", told, re.MULTILINE))
        return [addresses.get(name, name) for name in names]
    return names


def _scontrol(*words: str) -> str:
    command = ["scontrol", "show", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "").strip() or error
        raise UserError(f"`{' '.join(command)}`, which tells the ranks where rank 0 is, failed: {said}") from None


def place(
    role: Role, env: Mapping[str, str], *, gpu: bool = False, hosts: Callable[[str], list[str]] = _slurm_hosts
) -> Place:
    """This process's place, in Paddle's terms, whoever started it; that of its rank, if it looks after one.

    Args:
        role: as detected.
        env: of this process.
        gpu: whether the ranks compute on GPUs.
        hosts: the addresses behind Slurm's list of nodes.

    Raises:
        UserError: the launcher does not say where rank 0 is.
    """
    device = str(role.local_rank) if gpu else None
    if role.starter == PADDLE:
        endpoints = tuple(env.get("PADDLE_TRAINER_ENDPOINTS", env["PADDLE_CURRENT_ENDPOINT"]).split(","))
        if len(endpoints) != role.world:
            raise UserError(
                f"PADDLE_TRAINER_ENDPOINTS names {len(endpoints)} endpoints, but PADDLE_TRAINERS_NUM={role.world}"
            )
        master, nodes = env.get("PADDLE_MASTER", endpoints[0]), int(env.get("PADDLE_NNODES") or 1)
        device = env.get("FLAGS_selected_gpus", device) if gpu else None
    elif role.starter == SLURM:
        names = hosts(env["SLURM_STEP_NODELIST"])
        sizes = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        names = [LOCALHOST] if len(names) == 1 else names
        job = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
        endpoints, master = _addresses(list(zip(names, sizes, strict=True)), env, job)
        nodes = len(names)
    else:
        nodes = -(-role.world // role.local_size)
        address = env.get("PADDLE_MASTER", "").partition(":")[0]
        if nodes > 1 and not address:
            raise UserError(
                f"mpirun started {role.world} ranks on {nodes} hosts and does not say where rank 0 is: "
                "add -x PADDLE_MASTER=HOST_OF_RANK_0:29500 to mpirun"
            )
        job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
        # Only rank 0's address is ever used; the others need to be there and to differ.
        endpoints, master = _addresses([(address or LOCALHOST, role.world)], env, job)
    return Place(role.rank, role.local_rank, role.local_size, nodes, endpoints, master, device)


def _addresses(hosts: list[tuple[str, int]], env: Mapping[str, str], job: str) -> tuple[tuple[str, ...], str]:
    """An endpoint per process, and where they meet: ports that every rank of a job derives alike, jobs apart.

    They are numbered over the whole job, since two of Slurm's nodes may be one host.
    """
    first = FIRST_PORT + zlib.crc32(job.encode()) % (PORTS // PORTS_PER_JOB) * PORTS_PER_JOB
    owners = [host for host, size in hosts for _ in range(size)]
    return _numbered(owners, first + 1), env.get("PADDLE_MASTER") or f"{hosts[0][0]}:{first}"


def _numbered(hosts: list[str], first: int) -> tuple[str, ...]:
    return tuple(f"{host}:{port}" for port, host in enumerate(hosts, first))


def places(role: Role, env: Mapping[str, str], ranks: int, *, gpu: bool) -> list[Place]:
    """Places of the ranks that this process looks after.

    Args:
        role: as detected.
        env: of this process.
        ranks: of the whole job.
        gpu: whether the ranks compute on GPUs.
    """
    own, share = place(role, env, gpu=gpu), role.share(ranks)
    if share == 1:
        return [own]
    owners = [endpoint.rpartition(":")[0] for endpoint in own.endpoints for _ in range(share)]
    endpoints = _numbered(owners, int(own.endpoints[0].rpartition(":")[2]))
    return [
        replace(
            own,
            rank=own.rank * share + local,
            local_rank=local,
            local_size=share,
            endpoints=endpoints,
            gpu=str(local) if gpu else None,
        )
        for local in range(share)
    ]


def restore_proxies(env: MutableMapping[str, str]) -> None:
    """Undo what paddle.distributed.launch does for its own sake: without them W&B does not get through."""
    for key in ("http_proxy", "https_proxy"):
        kept = env.get(f"{key}_original")
        if kept:
            env.setdefault(key, kept)


def close_to_others(env: Mapping[str, str]) -> None:
    """Take the right to read them away from others: paddle.distributed.launch writes the environment, keys and all,
    into several files of its log folder.
    """
    folder = env.get("PADDLE_LOG_DIR")
    for path in Path(folder).glob("*") if folder else ():
        with contextlib.suppress(OSError):
            path.chmod(0o600)
