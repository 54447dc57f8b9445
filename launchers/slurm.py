"""Slurm batch jobs: write and submit the script, read the queue."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import cluster_rules
from gpt.config.cluster import Device
from gpt.config.schema import Config
from gpt.utils.errors import UserError
from gpt.utils.files import write_atomic, write_json
from gpt.utils.launch_env import LaunchEnvironment

RETRIED = (1, 3)  # failed, or stopped by the guard; bad input stays bad
STOPPED = 143  # after SIGTERM, saved
SECONDS = 60.0  # for an answer of the controller

# One task per node, which supervises its node's ranks (launchers.rank_env). The shell stays to see how they end:
# USR1 comes before the time limit (--signal), TERM with scancel, a requeue or a preemption, also to all ranks.
BODY = """
set -u
name=${{cells[{index}]}}
folder={folder}
job={job}
note() {{ printf '{{"time": %s, "cell": "%s", "event": "%s", "job": "%s"%s}}\\n' "$(date +%s.%N)" "$name" "$1" "$job" "$2" >> "$folder/events.jsonl"; }}
again=
trap : TERM
trap 'again=limit; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{setup}
for attempt in {attempts}; do
  note started ", \\"attempt\\": $attempt, \\"restarts\\": ${{SLURM_RESTART_COUNT:-0}}, \\"nodes\\": \\"$SLURM_JOB_NODELIST\\""
  srun --kill-on-bad-exit=1 --export=ALL{srun} {python} -m launchers.sweep.run_cell "$folder/cells/$name.json" >> "$folder/cells/$name.log" 2>&1 &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"; code=$?
  note ended ", \\"code\\": $code, \\"attempt\\": $attempt"
  [ -z "$again" ] && {{ {retried}; }} || break
done
"""  # noqa: E501
# A job that leaves within the grace time of a preemption counts as failed to Slurm, which then does not requeue it.
REQUEUE = """
if [ "$code" = {stopped} ] && [ -z "$again" ]; then
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]' && again=preempted
fi
if [ "$code" = {stopped} ] && [ -n "$again" ]; then
  note requeued ", \\"why\\": \\"$again\\""
  scontrol requeue "$SLURM_JOB_ID"
fi
"""
FAIL_FAST = """
if [ "$code" != 0 ] && [ "$code" != {stopped} ]; then scancel --user="$(id -un)" --name={name}; fi
"""


@dataclass(frozen=True)
class Batch:
    """Cells with equal resource requests: one job, or one array of jobs.

    Attributes:
        config: of any of them.
        names: of the cells, in the order of the array.
        folder: with ``cells/NAME.json``, the frozen commands.
        title: the job's name in the queue.
        array: whether it is one, also with a single cell.
    """

    config: Config
    names: tuple[str, ...]
    folder: Path
    title: str
    array: bool


def options(config: Config) -> list[str]:
    """Return the sbatch options of a job; jobs with equal ones can be one array."""
    cluster = config.cluster
    ranks = cluster_rules.ranks_per_node(config)
    gpus = ":".join(filter(None, ("gpu", cluster.gpu_type, str(ranks))))
    given = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos,
        "constraint": cluster.constraint, "time": cluster.time, "mem": cluster.mem,
        "gres": gpus if cluster.device is Device.gpu else None,
    }  # fmt: skip
    return [
        f"--nodes={cluster_rules.nodes(config)}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cluster.cpus or ranks}",
        *(f"--{key}={value}" for key, value in given.items() if value),
        f"--signal=B:USR1@{cluster.signal_seconds}",
        "--requeue" if cluster.requeue else "--no-requeue",
        f"--export={','.join(cluster.environment) or 'NIL'}",
        *cluster.sbatch,
    ]


def script(batch: Batch, where: Path, cwd: Path) -> str:
    """Return the text of the batch script.

    Args:
        batch: of cells.
        where: the file that it will be; Slurm's own words about the job go beside it.
        cwd: the folder that relative paths of the configuration mean.
    """
    config, cluster = batch.config, batch.config.cluster
    cpus = cluster.cpus or cluster_rules.ranks_per_node(config)
    at_a_time = f"%{cluster.max_parallel}" if cluster.max_parallel else ""
    directives = [f"--job-name={batch.title}", *options(config), "--open-mode=append", f"--chdir={_quoted(cwd)}"]
    directives.append(f"--output={_quoted(where.with_suffix(''))}.{'%A_%a' if batch.array else '%j'}.txt")
    if batch.array:
        directives.append(f"--array=0-{len(batch.names) - 1}{at_a_time}")
    retries = config.grid.retries
    body = BODY.format(
        index="$SLURM_ARRAY_TASK_ID" if batch.array else "0",
        job='"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if batch.array else '"$SLURM_JOB_ID"',
        folder=shlex.quote(str(batch.folder)),
        setup="\n".join(cluster.setup),
        attempts=" ".join(str(attempt) for attempt in range(1, retries + 2)),
        srun=f" --cpus-per-task={cpus}",
        python=shlex.quote(cluster.python or sys.executable),
        retried=" || ".join(f'[ "$code" = {code} ]' for code in RETRIED),
    )
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in directives)]
    lines += [f"# {where}: {len(batch.names)} of {batch.title}, submitted by cluster=slurm", "cells=("]
    lines += [f"  {shlex.quote(name)}" for name in batch.names]
    text = "\n".join([*lines, ")"]) + body
    if config.grid.fail_fast and batch.array:
        text += FAIL_FAST.format(stopped=STOPPED, name=shlex.quote(batch.title))
    if cluster.requeue:
        text += REQUEUE.format(stopped=STOPPED)
    return text + 'exit "$code"\n'


def _quoted(path: Path) -> str:
    """Quote a path for an #SBATCH line."""
    return f'"{path}"' if " " in str(path) else str(path)


def problems(config: Config, role: LaunchEnvironment, env: Mapping[str, str]) -> list[str]:
    """Return why this machine, or this shell, cannot submit."""
    if role.starter:
        return [f"cluster=slurm inside a job that {role.starter} started would submit once per task: start it without"]
    if config.dry_run:
        return []
    if not shutil.which("sbatch"):
        return [
            "cluster=slurm needs sbatch, which is not on this machine: type the command on a login node of the "
            "cluster; dry_run=true shows the script; without cluster=slurm it runs here"
        ]
    if job := env.get("SLURM_JOB_ID"):
        return [
            f"this shell is inside Slurm's job {job} already, and cluster=slurm would submit another one beside it. "
            "To use these nodes: srun --ntasks-per-node=1 --kill-on-bad-exit=1 with the same command without "
            "cluster=slurm; to submit all the same: unset SLURM_JOB_ID"
        ]
    return []


def test(text: str) -> None:
    """Validate a script by ``sbatch --test-only``; nothing is submitted.

    Raises:
        UserError: with sbatch's message.
    """
    _run(["sbatch", "--test-only"], text)


def submit(batch: Batch, text: str, where: Path, run_dirs: Mapping[str, Path]) -> str:
    """Submit a script that has passed ``test``; return the job's number.

    A JSON file beside the script lists the cells and runs of its jobs: the queue shows the path of a job's script, so
    its runs can be identified from the queue alone, even after an interruption.

    Raises:
        UserError: with sbatch's message.
    """
    where.parent.mkdir(parents=True, exist_ok=True)
    write_json(where.with_suffix(".json"), [{"name": name, "run_dir": str(run_dirs[name])} for name in batch.names])
    write_atomic(where, text)
    return _run(["sbatch", "--parsable", str(where)]).split(";")[0].strip()


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs: one cell.

    Attributes:
        number: as scancel takes it: 12, or 12_3 of an array.
        state: Slurm's word, PENDING or RUNNING or another, with its reason or the nodes.
        name: of the cell.
        run_dir: of its run.
        folder: of the grid, or of a single run's submissions.
    """

    number: str
    state: str
    name: str
    run_dir: Path
    folder: Path


def queue() -> list[Queued]:
    """Return the user's jobs that wait or run, of any grid.

    Raises:
        UserError: Slurm does not answer; nothing may be submitted then, since it may be queued already.
    """
    output = _run(["squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%F|%K|%T|%R|%o"])
    cells: dict[Path, list[dict[str, str]]] = {}
    jobs = []
    for line in output.splitlines():
        job, index, state, why, command = line.split("|", 4)
        path = Path(command)
        if path not in cells:
            cells[path] = _cells(path)
        position = int(index) if index.isdigit() else 0
        if position < len(cells[path]):
            cell = cells[path][position]
            number = f"{job}_{index}" if index.isdigit() else job
            state = f"{state} {why}".strip()
            jobs.append(Queued(number, state, cell["name"], Path(cell["run_dir"]), path.parent.parent))
    return jobs


def _cells(path: Path) -> list[dict[str, str]]:
    """Return the cells of a script's jobs; none if this project did not write it."""
    try:
        entries: Any = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return entries if isinstance(entries, list) and path.parent.name == "jobs" else []


def _run(command: list[str], text: str | None = None) -> str:
    """Run a Slurm command and return its output.

    Raises:
        UserError: it fails.
    """
    env = {key: value for key, value in os.environ.items() if key != "SBATCH_EXPORT"}  # it would win over the script
    try:
        done = subprocess.run(
            command, input=text, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`{' '.join(command)}` failed: {error}") from None
    if done.returncode:
        words = re.sub(r"\s*\n\s*", "; ", done.stderr.strip()) or f"exit code {done.returncode}"
        raise UserError(f"`{' '.join(command)}` failed: {words}")
    return done.stdout
