"""Run cells on a Slurm cluster: submit those that are neither done nor queued, and wait for them if configured.

Queued runs are read from the queue itself: it shows the path of a job's script, which identifies its runs. A
command that was interrupted between submitting and noting so, a grid that shares a run with another one, or a second
terminal cannot make a run start twice.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.config import cluster_rules
from gpt.config.cluster import Cluster, ClusterKind
from gpt.config.schema import Resume
from gpt.runs.grid import STOPPED, Cell, Folder, State
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed, UserError
from gpt.utils.files import Lock, short
from gpt.utils.outcome import SHOWN_LINES
from gpt.utils.signals import FAILED
from launchers import slurm
from launchers.slurm import Batch
from launchers.sweep.display import CellOutcome

FIRST_POLL, LAST_POLL = 1.0, 15.0  # seconds between two looks at the queue, longer as time goes by
STOPPED_BY_USER = 130


@dataclass(frozen=True)
class Submitted:
    """The job of a cell, submitted now or queued before."""

    cell: Cell
    number: str
    folder: Folder


def batches(cells: Sequence[Cell], folder: Folder, *, array: bool) -> list[Batch]:
    """Group cells with equal resource requests, in order."""
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        cluster = cell.config.cluster
        alike.setdefault((*slurm.options(cell.config), *cluster.setup, cluster.python or ""), []).append(cell)
    title = f"gpt-{folder.path.name if array else cells[0].name}" if cells else ""
    path = folder.path.resolve()
    return [Batch(same[0].config, tuple(each.name for each in same), path, title, array) for same in alike.values()]


def scripts(cells: Sequence[Cell], folder: Folder, *, array: bool) -> list[tuple[Batch, Path, str]]:
    """Return the batches of a submission, their files and their scripts."""
    jobs = folder.path.resolve() / "jobs"
    first = 1 + max((int(path.stem) for path in jobs.glob("*.sh") if path.stem.isdigit()), default=0)
    planned = []
    for number, batch in enumerate(batches(cells, folder, array=array), first):
        where = jobs / f"{number:04d}.sh"
        planned.append((batch, where, slurm.script(batch, where, Path.cwd())))
    return planned


def run(
    cells: Sequence[Cell],
    folder: Folder,
    command: list[str],
    console: Console,
    *,
    wanted: Callable[[Cell], bool] = lambda cell: True,
    array: bool = True,
) -> dict[str, CellOutcome]:
    """Submit the cells that are left; return the outcome of each cell, by name.

    Args:
        cells: as the command composed them.
        folder: of the grid, or of a single run's submissions.
        command: for the record.
        console: to print on.
        wanted: called for each cell that is to be submitted; may move its old run aside.
        array: one job per shape of cells, also if there is one cell.

    Raises:
        UserError: Slurm refuses; nothing was submitted.
        JobFailed: the wait was interrupted; the jobs continue.
    """
    outcomes = {cell.name: CellOutcome() for cell in cells}
    lock = Lock(Path(tempfile.gettempdir(), f"gpt-submit-{os.getuid()}.lock"))
    if not lock.acquire(patience=slurm.SECONDS):
        raise UserError("another command of yours has been submitting for a minute; try again when it is done")
    try:
        queued_jobs = {(each.run_dir, each.name): each for each in slurm.queue()}
        last, left, watched = folder.last_events(), [], []
        for cell in cells:
            queued, outcome = queued_jobs.get((cell.run_dir.resolve(), cell.name)), outcomes[cell.name]
            outcome.before = State.running if queued else folder.state(cell, last.get(cell.name, {}))
            if queued:
                watched.append(Submitted(cell, queued.number, Folder(queued.folder)))
                console.note(f"in the queue already: {_label(cell)}: job {queued.number}, {queued.state}")
                outcome.state = "elsewhere"
            elif outcome.before is State.done and array:  # a single command shows how to continue
                console.note(f"done before: {_label(cell)}")
                outcome.state = "done before"
            elif outcome.before is State.running:
                console.note(f"running elsewhere: {_label(cell)}")
                outcome.state = "elsewhere"
            elif wanted(cell):
                left.append(cell)
            else:
                outcome.state = "done before"
        for each in _submit(left, folder, command, console, array=array):
            watched.append(each)
            outcomes[each.cell.name].state = "submitted"
    finally:
        lock.release()
    if watched and cells[0].config.cluster.wait:
        _wait(watched, outcomes, console)
    elif watched:
        _say_where(watched, folder, console, array=array)
    return outcomes


def _submit(
    cells: Sequence[Cell], folder: Folder, command: list[str], console: Console, *, array: bool
) -> list[Submitted]:
    planned = scripts(cells, folder, array=array)
    for _, _, text in planned:
        slurm.test(text)
    if planned:
        folder.add([on_a_node(cell) for cell in cells], command)
    by_name, submitted = {cell.name: cell for cell in cells}, []
    for batch, where, text in planned:
        number = slurm.submit(batch, text, where, {name: by_name[name].run_dir.resolve() for name in batch.names})
        nodes, ranks = cluster_rules.nodes(batch.config), cluster_rules.ranks_per_node(batch.config)
        label = f"{len(batch.names)} cells" if array else batch.names[0]
        console.note(f"submitted: job {number}: {label}, each {nodes} node(s) x {ranks} rank(s)")
        for index, name in enumerate(batch.names):
            job = f"{number}_{index}" if array else number
            folder.note(name, "submitted", job=job, script=where.name)
            submitted.append(Submitted(by_name[name], job, folder))
    return submitted


def on_a_node(cell: Cell) -> Cell:
    """Return the cell to freeze: on the node it is a local command."""
    cluster = cell.config.cluster
    here = Cluster(ClusterKind.local, cluster.device, cluster.threads, cluster.hang_seconds)
    trainer = cell.config.trainer
    if trainer.resume is Resume.never:  # the old run is aside by now; a requeued job resumes
        trainer = dataclasses.replace(trainer, resume=Resume.auto)
    config = dataclasses.replace(cell.config, cluster=here, trainer=trainer, dry_run=False)
    return dataclasses.replace(cell, config=config)


def _label(cell: Cell) -> str:
    return f"{cell.label}  ({cell.name})" if cell.differs else cell.name


def _numbers(watched: Sequence[Submitted]) -> list[str]:
    return sorted({each.number.partition("_")[0] for each in watched}, key=int)


def _say_where(watched: Sequence[Submitted], folder: Folder, console: Console, *, array: bool) -> None:
    numbers, log = _numbers(watched), watched[0].folder.log(watched[0].cell.name)
    page = (
        f"python -m gpt.main task=report report.path={short(folder.path.resolve())}",
        "the page about it, at any time",
    )
    console.next_commands(
        [
            (f"squeue --jobs={','.join(numbers)}", "what waits, what runs"),
            (f"tail -F {short(log.resolve())}", "output of " + ("a cell" if array else "the run")),
            (f"scancel {' '.join(numbers)}", "end it; ranks save first"),
            *([page] if array else []),
        ]
    )
    console.note("the same command submits what failed or was ended, and leaves alone what is queued or done")


def _wait(watched: Sequence[Submitted], outcomes: dict[str, CellOutcome], console: Console) -> None:
    """Wait until none of them is in the queue; show a line per change of state."""
    left, states = list(watched), {each.number: "" for each in watched}
    try:
        for pause in _pauses():
            now = {each.number: each for each in slurm.queue()}
            for each in list(left):
                state = now[each.number].state if each.number in now else ""
                if state and state != states[each.number]:
                    console.note(f"{state}: {each.number}  {_label(each.cell)}")
                states[each.number] = state
                if not state:
                    left.remove(each)
                    _ended(each, outcomes[each.cell.name], console)
            if not left:
                return
            time.sleep(pause)
    except KeyboardInterrupt:
        ids = " ".join(_numbers(watched))
        message = f"no longer waiting; the jobs go on. The same command waits again; scancel {ids} ends them"
        raise JobFailed(message, STOPPED_BY_USER) from None


def _pauses() -> Iterator[float]:
    pause = FIRST_POLL
    while True:
        yield pause
        pause = min(LAST_POLL, 1.2 * pause)


def _ended(each: Submitted, outcome: CellOutcome, console: Console) -> None:
    """Set and show the outcome of a job that has left the queue, from its script's events."""
    ours = [e for e in each.folder.events() if e["cell"] == each.cell.name and e.get("job") == each.number]
    begins = [event["time"] for event in ours if event["event"] == "started"]
    ends = [event for event in ours if event["event"] == "ended"]
    label = f"{each.number}  {_label(each.cell)}"
    if not begins:
        outcome.state, outcome.code = "stopped", 128 + signal.SIGTERM
        console.note(f"stopped before it began (scancel): {label}")
        return
    outcome.code = int(ends[-1]["code"]) if len(ends) == len(begins) else FAILED
    outcome.seconds = sum(end["time"] - begin for begin, end in zip(begins, ends, strict=False))
    outcome.state = "done" if outcome.code == 0 else "stopped" if outcome.code in STOPPED else "failed"
    if len(ends) < len(begins):
        console.note(f"failed without an exit code (its node, or the shell of its script, was ended): {label}")
        return
    console.note(f"{outcome.state} with {outcome.code}: {label}")
    log = each.folder.log(each.cell.name)
    if outcome.state == "failed" and log.exists():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]:
            console.note(f"  | {line}")
