"""Jobs under Slurm: nodes whose names nobody knows, one task for a node's ranks, and, where it is installed, Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_host
from conftest import metrics
from test_roles import SLURM_ENV
from test_signals import wait_for
from test_started import Ranks

from gpt.utils import launch_env
from gpt.utils.errors import UserError
from gpt.utils.launch_env import LaunchEnvironment
from launchers import external, rank_env

SCONTROL = """#!/bin/sh
if [ "$2" = hostnames ]; then printf 'n1\\nn2\\n'; exit; fi
[ -e "$(dirname "$0")/busy" ] && { echo 'slurm_load_node error: Unable to contact slurm controller' >&2; exit 1; }
printf 'NodeName=n2 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=vm Port=2\\n'
printf 'NodeName=n1 Arch=x86_64 NodeAddr=localhost NodeHostName=vm Port=1\\n'
"""
ONE_EACH = {**SLURM_ENV, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's command, of two nodes on this host; its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_node_has_the_address_that_slurm_itself_uses(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = rank_env.place(launch_env.detect(SLURM_ENV), SLURM_ENV)
    hosts, ports = zip(*(endpoint.split(":") for endpoint in (*place.endpoints, place.master)), strict=True)
    assert hosts == ("localhost", "localhost", "127.0.0.1", "localhost")
    assert len(set(ports)) == 4  # two of Slurm's nodes may be one host

    (scontrol / "busy").write_text("")
    names = rank_env.place(launch_env.detect(SLURM_ENV), SLURM_ENV)
    assert [endpoint.split(":")[0] for endpoint in names.endpoints] == ["n1", "n1", "n2"]

    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"`scontrol show hostnames n\[1-2\]`, which tells .* failed: .*No such file"):
        rank_env.place(launch_env.detect(SLURM_ENV), SLURM_ENV)


def test_the_only_task_of_every_node_looks_after_its_nodes_ranks(scontrol: Path) -> None:
    role = launch_env.detect(ONE_EACH)
    assert role == LaunchEnvironment(launch_env.SLURM, 1, 2, 0, 1, spread=True)
    assert role.problems(4, "4 = dp 4") == role.problems(2, "2 = dp 2") == []
    assert (role.here(4), role.share(4), role.here(2), role.share(2)) == (2, 2, 1, 1)
    two = rank_env.places(role, ONE_EACH, 4, gpu=True)
    assert [(p.rank, p.local_rank, p.local_size, p.nodes, p.gpu) for p in two] == [(2, 0, 2, 2, "0"), (3, 1, 2, 2, "1")]
    assert [endpoint.split(":")[0] for endpoint in two[0].endpoints] == ["localhost"] * 2 + ["127.0.0.1"] * 2
    assert len({endpoint.split(":")[1] for endpoint in (*two[0].endpoints, two[0].master)}) == 5
    own = rank_env.place(role, ONE_EACH)
    assert (two[0].endpoints[0], two[0].master) == (own.endpoints[0], own.master)  # where rank 0 is found
    assert rank_env.places(role, ONE_EACH, 2, gpu=False) == [own]


@pytest.mark.parametrize(("tasks", "ranks"), [("2,1", 6), ("1(x2)", 3), ("1(x2)", 1)])
def test_tasks_that_cannot_share_the_ranks_are_refused_with_the_option_to_use(tasks: str, ranks: int) -> None:
    number = sum(launch_env.tasks_per_node(tasks))
    env = {**SLURM_ENV, "SLURM_STEP_NUM_TASKS": f"{number}", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_PROCID": "0"}
    (problem,) = launch_env.detect({**env, "SLURM_NODEID": "0"}).problems(ranks, f"{ranks} = dp {ranks}")
    assert problem.startswith(f"srun started {number} rank(s), but the degrees of parallel need {ranks} = dp {ranks}")
    assert f"start {ranks} (srun -n, or --ntasks-per-node times the nodes)" in problem


def test_why_rank_0_cannot_listen_is_said() -> None:
    with pytest.raises(UserError, match=r"cannot listen on no-such-node\.invalid:1: the name .* is not known here"):
        external._listen_on("no-such-node.invalid:1", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken, perhaps by another job"):
            external._listen_on(f"127.0.0.1:{port}", 1)
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is not an address of this host"):  # kept for documents
        external._listen_on("192.0.2.1:20001", 1)


# --- one task for a node's ranks, as Slurm would start them ---


@pytest.fixture
def nodes(tmp_path: Path, small: list[str], scontrol: Path) -> Iterator[Ranks]:
    group = Ranks(tmp_path, [*small, "parallel=dp2_mp2"])
    group.arguments.remove("parallel=dp2")
    yield group
    group.end()


def tasks() -> list[dict[str, str]]:
    job = {**ONE_EACH, "SLURM_JOB_ID": f"{os.getpid()}{time.monotonic_ns()}"}
    return [{**job, "SLURM_PROCID": f"{node}", "SLURM_NODEID": f"{node}"} for node in range(2)]


@pytest.mark.slow
def test_two_tasks_run_four_ranks(nodes: Ranks) -> None:
    nodes.start("print('rank', rank, 'of', world, flush=True)\nresult()\n", tasks())
    (lead, said), (other, quiet) = nodes.ends()
    assert (lead, other, quiet) == (0, 0, ""), said
    assert "4 = dp 2 x mp 2, started by srun" in said
    logs = [(nodes.run_dir / "logs" / f"worker.{rank}.log").read_text() for rank in range(4)]
    assert logs == [f"rank {rank} of 4\n" for rank in range(4)]


@pytest.mark.slow
def test_of_a_node_elsewhere_the_rank_that_failed_is_named(nodes: Ranks) -> None:
    nodes.start("if rank == 3:\n    print('the cause', flush=True)\n    sys.exit(7)\ntime.sleep(600)\n", tasks())
    (lead, said), (other, quiet) = nodes.ends()
    assert (lead, other) == (7, 7), said + quiet
    assert "worker 3 ended with exit code 7" in said
    assert "the cause" in said
    assert quiet.startswith("rank 3 failed; its log: ")


@pytest.mark.slow
def test_the_ranks_of_a_task_that_vanished_end_and_are_named(nodes: Ranks) -> None:
    nodes.start("time.sleep(600)\n", tasks())
    wait_for(lambda: len(list(nodes.run_dir.glob("rank*.json"))) == 4, 60)
    nodes.processes[1].kill()
    ends = nodes.ends()
    assert ends[0][0] == 1
    assert "the process of rank 2 vanished" in ends[0][1]
    nodes.none_is_left()


# --- the real one ---


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Slurm, running; the environment in which ``srun`` finds it."""
    yield from slurm_host.running(tmp_path_factory.mktemp("slurm"))


def srun(cluster: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A step on both nodes."""
    return subprocess.run(
        ["srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable, *words],
        cwd=folder,
        env=cluster,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_srun_trains_on_two_nodes(cluster: dict[str, str], tmp_path: Path, small: list[str]) -> None:
    job = [*small, "parallel=dp2", "cluster.device=cpu", "hydra.run.dir=run", "trainer.max_steps=2"]
    done = srun(cluster, tmp_path, "-m", "gpt.main", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 = dp 2, started by srun" in done.stdout
    assert "loss curve" in done.stdout
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_a_rank_on_another_node_that_fails_ends_the_step_soon(cluster: dict[str, str], nodes: Ranks) -> None:
    command = nodes.script("if rank == 3:\n    print('the cause', flush=True)\n    sys.exit(7)\ntime.sleep(600)\n")
    begin = time.monotonic()
    done = srun(cluster, nodes.folder, command, *nodes.arguments)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "worker 3 ended with exit code 7" in done.stderr
    assert "the cause" in done.stderr
    assert time.monotonic() - begin < 60
    nodes.none_is_left()
