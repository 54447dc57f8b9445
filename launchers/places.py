"""A rank's place in a job, in the variables by which Paddle learns of it."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass

LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where a rank is among all ranks and on its host.

    ``endpoints`` has an address per rank, ``master`` is where the ranks meet; ``gpu`` is None on a CPU.
    """

    rank: int
    local_rank: int
    local_size: int
    nodes: int
    endpoints: tuple[str, ...]
    master: str
    gpu: str | None = None

    def variables(self) -> dict[str, str]:
        """What Paddle reads from the environment, under its older and its newer names."""
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
    """Ports nobody listens on; they are held open together, so they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOCALHOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def here(ranks: int, *, gpu: bool) -> list[Place]:
    """Places of a job that is all here."""
    *ports, master = free_ports(ranks + 1)
    endpoints = tuple(f"{LOCALHOST}:{port}" for port in ports)
    return [
        Place(rank, rank, ranks, 1, endpoints, f"{LOCALHOST}:{master}", str(rank) if gpu else None)
        for rank in range(ranks)
    ]
