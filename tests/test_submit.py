"""Jobs on a cluster: what is submitted, once, what its script does however it ends, and what is only shown."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm_host
from conftest import Ran, metrics
from slurm_stand_in import SLURM, stand_ins
from test_signals import wait_for

from gpt import cli
from gpt.config import cluster_rules
from gpt.config.cluster import ClusterKind
from gpt.runs.grid import Cell, Folder
from gpt.utils.console import Console
from gpt.utils.errors import UserError
from gpt.utils.launch_env import LaunchEnvironment
from launchers import slurm
from launchers.sweep import slurm_runner


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_ins(tmp_path, monkeypatch)


def cells(small: list[str], *seeds: int, more: tuple[str, ...] = ()) -> list[Cell]:
    found = []
    for seed in seeds:
        overrides = [*small, *SLURM, f"seed={seed}", *more]
        found.append(Cell(overrides, cli.compose_job(overrides), Path("outputs", f"run{seed}"), [f"seed={seed}"]))
    return found


def submitted(folder: Path) -> list[str]:
    return (folder / "queue").read_text().splitlines()


def result(cell: Cell, status: str) -> None:
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    step = cell.config.trainer.max_steps
    (cell.run_dir / "result.json").write_text(json.dumps({"status": status, "step": step}))


def run(grid: list[Cell], **more: Any) -> dict[str, str]:
    folder = Folder(Path("outputs/grids/g"))
    outcomes = slurm_runner.run(grid, folder, ["the command"], Console(), **more)
    return {name: outcome.state for name, outcome in outcomes.items()}


# --- once ---


def test_the_same_command_submits_only_what_is_neither_queued_nor_done(folder: Path, small: list[str]) -> None:
    grid = cells(small, 1, 2, 3)
    assert set(run(grid).values()) == {"submitted"}
    assert len(submitted(folder)) == 3
    assert set(run(grid).values()) == {"elsewhere"}
    assert len(submitted(folder)) == 3

    result(grid[0], "done")
    result(grid[1], "failed")
    (folder / "queue").write_text("\n".join(submitted(folder)[2:]) + "\n")  # the first two have left it
    grown = cells(small, 1, 2, 3, 4)
    assert run(grown) == {"run1": "done before", "run2": "submitted", "run3": "elsewhere", "run4": "submitted"}
    last = json.loads((folder / "outputs/grids/g/jobs/0002.json").read_text())
    assert [each["name"] for each in last] == ["run2", "run4"]
    assert set(Folder(Path("outputs/grids/g")).read()["cells"]) == {f"run{i}" for i in (1, 2, 3, 4)}


def test_a_run_that_another_grid_or_a_single_command_has_in_the_queue_is_left_to_it(
    folder: Path, small: list[str]
) -> None:
    (cell,) = cells(small, 1)
    slurm_runner.run([cell], Folder(cell.run_dir / "slurm"), [], Console(), array=False)
    assert submitted(folder)[0].startswith("11|N/A|")
    assert run(cells(small, 1, 2)) == {"run1": "elsewhere", "run2": "submitted"}


def test_nothing_is_submitted_while_slurm_does_not_answer_or_refuses(folder: Path, small: list[str]) -> None:
    (folder / "broken").write_text("")
    with pytest.raises(UserError, match=r"`squeue .*` failed: Unable to contact slurm controller"):
        run(cells(small, 1))
    (folder / "broken").unlink()
    with pytest.raises(UserError, match="`sbatch --test-only` failed: sbatch: error: invalid partition"):
        run([*cells(small, 1), *cells(small, 2, more=("cluster.partition=nope",))])
    assert submitted(folder) == []
    assert not (folder / "outputs").exists()


def test_cells_of_another_shape_are_another_array(folder: Path, small: list[str]) -> None:
    grid = [*cells(small, 1, 2), *cells(small, 3, more=("parallel=dp2",)), *cells(small, 4)]
    found = slurm_runner.batches(grid, Folder(Path("g")), array=True)
    assert [batch.names for batch in found] == [("run1", "run2", "run4"), ("run3",)]
    assert "--nodes=2" in slurm.options(found[1].config)


def test_what_is_frozen_is_a_command_for_the_node(folder: Path, small: list[str]) -> None:
    (cell,) = cells(small, 1, more=("trainer.resume=never", "cluster.threads=3"))
    run([cell])
    there = Cell.load(folder / "outputs/grids/g/cells/run1.json").config
    assert there.cluster.kind is ClusterKind.local
    assert (there.cluster.device, there.cluster.threads, there.trainer.resume.value) == (
        cell.config.cluster.device, 3, "auto",
    )  # fmt: skip  # a job that is requeued must not start afresh


def test_no_values_of_variables_are_in_what_is_submitted(
    folder: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    run(cells(small, 1, more=("cluster.environment=[PATH,WANDB_API_KEY]",)))
    for path in (folder / "outputs").rglob("*"):
        assert path.is_dir() or "secret-key" not in path.read_text()
    assert "#SBATCH --export=PATH,WANDB_API_KEY\n" in (folder / "outputs/grids/g/jobs/0001.sh").read_text()


# --- bad input ---


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cluster=slurm", "cluster.time=30"], r"cluster.time=30: write hours:minutes:seconds"),
        (
            ["cluster=slurm", "parallel=dp8", "cluster.per_node=3"],
            r"8 ranks do not .* cluster.per_node=2 makes 4 nodes",
        ),
        (["cluster=slurm", "cluster.device=auto"], r"must know whether to ask for GPUs"),
        (["cluster=slurm", "cluster.mem=64GB"], r"cluster.mem=64GB: .* written like 64G"),
        (["cluster=slurm", "cluster.environment=['KEY=1']"], r"names of variables only"),
        (["cluster=slurm", "cluster.sbatch=[exclusive]"], r"'exclusive' is no option of sbatch"),
        (["cluster=slurm", "task=serve"], r"task=serve does not go with cluster=slurm"),
        (["cluster=slurm", "task=generate", "generate.interactive=true"], r"which has no terminal"),
        (["cluster.partition=x"], r"goes with cluster=slurm, not with cluster=local"),
        (["cluster=slurm", "cluster.port=1"], r"goes with cluster=nodes"),
        (["dry_run=true"], r"add cluster=slurm; for this host there is task=plan"),
        (["cluster=nodes"], r"needs the hosts: cluster.hosts=\[a,b\]"),
        (["cluster=nodes", "cluster.hosts=[a,b,c]", "parallel=dp2"], r"3 hosts do not make the 2 ranks"),
    ],
)
def test_what_cannot_be_asked_of_a_cluster_is_said_before(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        cli.compose_job(overrides)


def test_a_machine_that_cannot_submit_says_so(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cli.compose_job([*small, *SLURM])
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = slurm.problems(config, LaunchEnvironment(), {})
    assert "needs sbatch, which is not on this machine" in problem
    assert slurm.problems(replace(config, dry_run=True), LaunchEnvironment(), {}) == []
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert slurm.problems(config, LaunchEnvironment(), {}) == []
    assert "inside Slurm's job 12 already" in slurm.problems(config, LaunchEnvironment(), {"SLURM_JOB_ID": "12"})[0]
    assert "once per task" in slurm.problems(config, LaunchEnvironment("srun", 0, 2), {})[0]


@pytest.mark.parametrize("task", ["plan", "prepare", "report"])
def test_what_does_not_compute_on_devices_stays_here(task: str) -> None:
    overrides = [f"task={task}", "prepare.input=x", "prepare.output=y", "cluster=slurm"]
    assert not cluster_rules.is_away(cli.compose_job(overrides))


def test_a_cluster_gives_parallel_auto_the_devices_of_a_node(small: list[str]) -> None:
    config = cli.compose_job([*small, "parallel=auto", "cluster=slurm", "cluster.device=cpu", "cluster.per_node=4"])
    assert (cluster_rules.nodes(config), cluster_rules.ranks_per_node(config)) == (1, 4)


# --- the real one ---


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Slurm, running; the environment in which ``sbatch`` finds it."""
    yield from slurm_host.running(tmp_path_factory.mktemp("slurm"))


@pytest.mark.slow
def test_a_grid_on_slurm_goes_on_after_a_time_limit_and_no_step_is_computed_twice(
    cluster: dict[str, str], gpt: Callable[..., Ran], small: list[str], tmp_path: Path
) -> None:
    steps, env = 100, {"SLURM_CONF": cluster["SLURM_CONF"]}
    grid = ["-m", *small, *SLURM, "seed=1,2", "parallel=dp2", f"trainer.max_steps={steps}"]
    grid += ["trainer.eval_every=0", "trainer.save_every=0", "grid.name=g"]
    folder = Folder(tmp_path / "outputs" / "grids" / "g")

    def told(*words: str) -> str:
        return subprocess.run(words, env=cluster, capture_output=True, text=True, check=True).stdout

    first = gpt(*grid, env=env)
    assert first.code == 0, first.all
    assert "2 cells, each 2 node(s) x 1 rank(s)" in first.out
    job, name = folder.events()[0]["job"], folder.events()[0]["cell"]
    run_dir = tmp_path / "outputs" / name
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) > 3, 200)
    told("scancel", "--batch", "--signal=USR1", job)  # what Slurm does cluster.signal_seconds before the limit
    wait_for(lambda: any(event["event"] == "requeued" for event in folder.events()), 100)
    reached = metrics(run_dir)[-1]["step"]
    assert reached < steps
    wait_for(lambda: f"{job} PENDING" in told("squeue", "-h", "-r", "-o", "%i %T"))
    # Else two minutes after it left; within the same second nodes still refuse it ("Job credential revoked").
    told("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    end = gpt(*grid, "cluster.wait=true", env=env, timeout=300)
    assert end.code == 0, end.all
    assert f"in the queue already: seed=1  ({name}): job {job}" in end.out
    assert "submitted" not in end.out
    for cell in folder.read()["cells"]:
        assert [record["step"] for record in metrics(tmp_path / "outputs" / cell)] == list(range(1, steps + 1))
    assert f"from step {reached} to {steps}" in folder.log(name).read_text()
