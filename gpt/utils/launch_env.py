"""The launch environment: which launcher started this process, and what this project's own processes pass on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PADDLE, SLURM, MPI = "paddle.distributed.launch", "srun", "mpirun"
VARIABLE = "GPT_WORKER"


@dataclass(frozen=True)
class WorkerEnv:
    """Settings that a process of this project gets from the one that started it, in one environment variable.

    Attributes:
        parent: process with which to end; None: the one that started this process.
        live: the driver draws the progress, so step lines are not needed.
        terminal: standard input and output are the user's, for text as it is generated.
        cores: CPU cores to stay on.
        run_lock: descriptor of the run's lock, which the parent has taken.
        slot_locks: descriptors of the locks of the job's slots.
        peers: descriptors of the connections to the other ranks if an external launcher has started them, as
            ``gpt.utils.peers`` uses them: on rank 0 one per other rank, elsewhere one to rank 0.
        log_sizes: bytes of all ranks' logs before this start; empty if a driver watches the ranks.
        hang_seconds: ``cluster.hang_seconds``, likewise.
        concludes: the worker shows the results of the job, as there is no driver any more.
        tuned: threads and allocator are set, which must be done before a process starts.
    """

    parent: int | None = None
    live: bool = False
    terminal: bool = False
    cores: tuple[int, ...] = ()
    run_lock: int | None = None
    slot_locks: tuple[int, ...] = ()
    peers: tuple[int, ...] = ()
    log_sizes: tuple[int, ...] = ()
    hang_seconds: int = 0
    concludes: bool = False
    tuned: bool = False

    def to_env(self) -> dict[str, str]:
        """Return the variable.

        Example:
            >>> WorkerEnv.from_env(WorkerEnv(live=True, cores=(0, 3)).to_env()).cores
            (0, 3)
        """
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> WorkerEnv:
        """Read what ``to_env`` made; the defaults if there is nothing."""
        values = json.loads(env.get(VARIABLE, "{}"))
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**settings)


@dataclass(frozen=True)
class LaunchEnvironment:
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


def detect(env: Mapping[str, str]) -> LaunchEnvironment:
    """Return the launcher and this process's rank, read from the environment.

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
        return LaunchEnvironment(PADDLE, number("PADDLE_TRAINER_ID"), world, local, number("PADDLE_LOCAL_SIZE", 1))
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    if step.isdigit() and env.get("SLURM_PROCID", "").isdigit() and number("SLURM_STEP_NUM_TASKS") > 1:
        sizes = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        size = sizes[min(number("SLURM_NODEID"), len(sizes) - 1)]
        world, local = number("SLURM_STEP_NUM_TASKS"), number("SLURM_LOCALID")
        return LaunchEnvironment(SLURM, number("SLURM_PROCID"), world, local, size, spread=set(sizes) == {1})
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        local, size = number("OMPI_COMM_WORLD_LOCAL_RANK"), number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)
        return LaunchEnvironment(MPI, number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE"), local, size)
    return LaunchEnvironment()


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
