"""Build commands for hosts without a scheduler, one per host, for paddle.distributed.launch. Nothing is started."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from gpt.config import cluster_rules
from gpt.config.schema import Config

ELSEWHERE = ("cluster", "dry_run")  # keys that choose where the command runs, not its task
HERE = ("device", "threads", "hang_seconds")  # keys of the section cluster that each host needs


def overrides(given: Iterable[str]) -> list[str]:
    """Return the command's overrides for a host, without those that concern only the printing of the commands.

    Example:
        >>> overrides(["cluster=nodes", "cluster.hosts=[a,b]", "+cluster.device=cpu", "seed=1"])
        ['cluster.device=cpu', 'seed=1']
    """
    kept = []
    for override in given:
        key = override.lstrip("+~").partition("=")[0]
        section, _, leaf = key.partition(".")
        if section not in ELSEWHERE:
            kept.append(override)
        elif leaf in HERE:
            kept.append(override.lstrip("+"))
    return kept


def commands(config: Config, given: Iterable[str], cwd: Path) -> list[tuple[str, str]]:
    """Return each host and its command.

    Args:
        config: checked.
        given: overrides of the command.
        cwd: the folder in which it is typed, on a file system that the hosts share.
    """
    cluster = config.cluster
    main = Path(__file__).resolve().parent.parent / "gpt" / "main.py"
    script = str(main.relative_to(cwd) if main.is_relative_to(cwd) else main)
    ranks, words = cluster_rules.ranks_per_node(config), overrides(given)
    meet = ["--master", f"{cluster.hosts[0]}:{cluster.port}", "--nnodes", str(len(cluster.hosts))]
    host_commands = []
    for number, host in enumerate(cluster.hosts):
        logs = f"outputs/launch/node{number}"  # it writes the environment there: one folder per host
        launch = [*meet, "--rank", str(number), "--nproc_per_node", str(ranks), "--log_dir", logs]
        host_commands.append((host, shlex.join(["python", "-m", "paddle.distributed.launch", *launch, script, *words])))
    return host_commands
