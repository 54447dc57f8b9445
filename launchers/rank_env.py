"""Place of a rank in a job, as the environment variables that Paddle reads."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.utils.errors import UserError
from gpt.utils.launch_env import PADDLE, SLURM, LaunchEnvironment, tasks_per_node

LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class RankEnv:
    """Place of a rank among all ranks and on its host.

    ``endpoints`` has an address per rank, ``master`` is the rendezvous address; ``gpu`` is None on a CPU.
    """

    rank: int
    local_rank: int
    local_size: int
    nodes: int
    endpoints: tuple[str, ...]
    master: str
    gpu: str | None = None

    def variables(self) -> dict[str, str]:
        """Return the environment variables that Paddle reads, under its older and its newer names."""
        rank, world, local = str(self.rank), str(len(self.endpoints)), str(self.local_rank)
        device = {"PADDLE_DISTRI_BACKEND": "gloo"} if self.gpu is None else {"FLAGS_selected_gpus": self.gpu}
        return {
            "PADDLE_TRAINER_ID": rank,
            "PADDLE_GLOBAL_RANK": rank,
            "PADDLE_TRAINERS_NUM": world,
            "PADDLE_GLOBAL_SIZE": world,
            "PADDLE_RANK_IN_NODE": local,
            "PADDLE_LOCAL_RANK": local,
            "PADDLE_LOCAL_SIZE": str(self.local_size),
            "PADDLE_NNODES": str(self.nodes),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(self.endpoints),
            "PADDLE_CURRENT_ENDPOINT": self.endpoints[self.rank],
            "PADDLE_MASTER": self.master,
            **device,
        }


def free_ports(count: int) -> list[int]:
    """Return ports that are free; they are held open together, so they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOCALHOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def here(ranks: int, *, gpu: bool) -> list[RankEnv]:
    """Return the places of a job that runs on this host alone."""
    *ports, master = free_ports(ranks + 1)
    endpoints = tuple(f"{LOCALHOST}:{port}" for port in ports)
    return [
        RankEnv(rank, rank, ranks, 1, endpoints, f"{LOCALHOST}:{master}", str(rank) if gpu else None)
        for rank in range(ranks)
    ]


# Who started this process: the user, who gets workers spawned, or a launcher that has started every rank itself.
# Below the ports that Linux gives out by itself. A job listens on its first two; the others only tell its ranks apart.
FIRST_PORT, PORTS, PORTS_PER_JOB = 20000, 12000, 64


def _slurm_hosts(nodes: str) -> list[str]:
    """Return the addresses behind Slurm's list of nodes, whose names need not resolve."""
    names = _scontrol("hostnames", nodes).split()
    with contextlib.suppress(UserError):  # the controller is busy: names will do in most places
        records = _scontrol("node", nodes, "--oneliner")
        addresses = dict(re.findall(r"^NodeName=(\S+).*? NodeAddr=(\S+)", records, re.MULTILINE))
        return [addresses.get(name, name) for name in names]
    return names


def _scontrol(*words: str) -> str:
    command = ["scontrol", "show", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "").strip() or error
        raise UserError(f"`{' '.join(command)}`, which tells the ranks where rank 0 is, failed: {reason}") from None


def place(
    role: LaunchEnvironment,
    env: Mapping[str, str],
    *,
    gpu: bool = False,
    hosts: Callable[[str], list[str]] = _slurm_hosts,
) -> RankEnv:
    """Return this process's place in Paddle's terms, under any launcher; that of its rank, if it has one.

    Args:
        role: as detected.
        env: of this process.
        gpu: whether the ranks compute on GPUs.
        hosts: the addresses behind Slurm's list of nodes.

    Raises:
        UserError: the launcher does not give the address of rank 0.
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
    return RankEnv(role.rank, role.local_rank, role.local_size, nodes, endpoints, master, device)


def _addresses(hosts: list[tuple[str, int]], env: Mapping[str, str], job: str) -> tuple[tuple[str, ...], str]:
    """Return an endpoint per process and the master's, with ports that all ranks of a job derive from its name.

    They are numbered over the whole job, since two of Slurm's nodes may be one host.
    """
    first = FIRST_PORT + zlib.crc32(job.encode()) % (PORTS // PORTS_PER_JOB) * PORTS_PER_JOB
    owners = [host for host, size in hosts for _ in range(size)]
    return _numbered(owners, first + 1), env.get("PADDLE_MASTER") or f"{hosts[0][0]}:{first}"


def _numbered(hosts: list[str], first: int) -> tuple[str, ...]:
    return tuple(f"{host}:{port}" for port, host in enumerate(hosts, first))


def places(role: LaunchEnvironment, env: Mapping[str, str], ranks: int, *, gpu: bool) -> list[RankEnv]:
    """Return the places of the ranks that this process supervises."""
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
    """Restore the proxies that paddle.distributed.launch removed: W&B may need them."""
    for key in ("http_proxy", "https_proxy"):
        kept = env.get(f"{key}_original")
        if kept:
            env.setdefault(key, kept)


def close_to_others(env: Mapping[str, str]) -> None:
    """Make the launcher's logs private: paddle.distributed.launch writes the environment, keys and all,
    into several files of its log folder.
    """
    folder = env.get("PADDLE_LOG_DIR")
    for path in Path(folder).glob("*") if folder else ():
        with contextlib.suppress(OSError):
            path.chmod(0o600)
