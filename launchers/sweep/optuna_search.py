"""Run a search by Optuna on this host: as slots come free the study proposes the next trials."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gpt.config.cluster import ClusterKind
from gpt.runs import run_dir
from gpt.runs.grid import Cell, Folder, State
from gpt.tasks import pretrain
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed, UserError
from gpt.utils.signals import FAILED
from launchers.sweep import compose, display, launch, optuna_study
from launchers.sweep.compose import Composer
from launchers.sweep.local_runner import Live, Runner
from launchers.sweep.optuna_study import Proposal, Study
from launchers.sweep.pool import ELSEWHERE_SECONDS, PoolJob, Running

OF_THE_SEARCH = ("hparams=", "optuna.", "grid.", "yes=")  # what a trial alone does not need


def search(loader: Any, master: DictConfig, arguments: list[str]) -> None:
    """Run ``optuna.trials`` cells, as many side by side as the slots hold.

    Args:
        loader: Hydra's config loader.
        master: the configuration of the whole search.
        arguments: of the command; sweeps among them are what is searched.

    Raises:
        UserError: bad input; nothing was started.
        JobFailed: the search was stopped, or no trial came to its end.
    """
    console, outputs = Console(), Path(str(master.hydra.sweep.dir))
    space, fixed = optuna_study.split(arguments, dict(master.optuna.space), loader)
    composer = Composer(loader, master)
    base = compose.cell(composer, fixed, [], outputs)
    if problems := _problems(base):
        raise UserError.of(problems)
    pretrain.prepare_data(base.config, console)
    folder = Folder(outputs / "grids" / (master.grid.name or launch.name(arguments)))
    kept = [override for override in fixed if not override.startswith(OF_THE_SEARCH)]
    trials = Study(folder.path, space, base.config.optuna)
    command = ["python", "-m", "gpt.main", *sys.argv[1:]]

    @functools.cache
    def made(proposal: Proposal) -> Cell:
        cell = compose.cell(composer, [*kept, *proposal.overrides], list(proposal.overrides), outputs)
        cell = launch.label_for_wandb(cell, folder)
        folder.add([cell], command)
        return cell

    searcher = Searcher(base, folder, console, trials, made)
    _begin(console, folder, trials, base, space, searcher.count)
    try:
        searcher.search()
    finally:
        display.closing(console, list(searcher.cells.values()), searcher.outcomes, time.monotonic() - searcher.began)
        launch.close(folder, console)
        best = _end(console, trials)
    if searcher.pool.stopped_by:
        raise JobFailed("stopped; the same command goes on", 128 + searcher.pool.stopped_by)
    if best is None:
        raise JobFailed("no trial came to its end", FAILED)


def _problems(base: Cell) -> list[str]:
    reasons = []
    if not base.trains:
        reasons.append(f"hparams=optuna searches for a low validation loss; task={base.config.task.value} has none")
    if base.config.cluster.kind is not ClusterKind.local:
        kind = base.config.cluster.kind.value
        reasons.append(
            f"hparams=optuna runs its trials on this host: leave out cluster={kind}, or run it in a job there"
        )
    if not base.config.data.split[1]:
        reasons.append("hparams=optuna compares validation losses, and data.split leaves no documents for validation")
    return reasons


def _begin(console: Console, folder: Folder, trials: Study, base: Cell, space: optuna_study.Space, slots: int) -> None:
    settings, counts = base.config.optuna, trials.counts()
    before = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
    rows = [("trials", f"{settings.trials}" + (f", of which {before} before" if before else ""))]
    rows += [(key, str(distribution)) for key, distribution in space.items()]
    halving = f"halving, the best 1/{settings.reduction_factor} go on from each rung"
    rows.append(("pruning", halving if settings.prune else "off (optuna.prune=true)"))
    rows += [("slots", f"{slots}"), ("folder", str(folder.path))]
    console.table(f"search {folder.path.name}", rows)


def _end(console: Console, trials: Study) -> float | None:
    rows = [(word, str(number)) for word, number in trials.counts().items()]
    best = trials.best()
    if best is None:
        console.table("search", rows)
        return None
    console.table("search", [*rows, ("best val/loss", f"{best[0]:.4f}"), ("with", " ".join(best[1]))])
    return best[0]


class Searcher(Runner):
    """A runner whose cells are trials: it requests more while slots are free, and reports their results.

    Args:
        base: the cell of what is fixed, for the settings.
        folder, console: as of every grid.
        trials: the study.
        made: the cell of a proposal, written down.
    """

    def __init__(
        self, base: Cell, folder: Folder, console: Console, trials: Study, made: Callable[[Proposal], Cell]
    ) -> None:
        super().__init__([base], folder, console, self._watch)
        self.cells, self.outcomes = {}, {}
        self.base, self.trials, self.made = base, trials, made
        self.numbers: dict[str, list[int]] = {}  # of the trials of a running cell
        self._read: dict[str, int] = {}  # last step reported to the study, by cell
        self._last_request = 0.0

    def search(self) -> None:
        """Run the search to its end."""
        if entries := self._more():
            self.run(entries)

    def poll(self, running: list[Running], waiting: list[PoolJob]) -> None:
        """Poll, and request more trials."""
        super().poll(running, waiting)
        if not self.stopping and not waiting and time.monotonic() - self._last_request > ELSEWHERE_SECONDS:
            self.pool.add(self._more())

    def ended(self, job: Running, code: int) -> bool:
        """Report the end to the study. A stopped trial is unfinished: the same command resumes it."""
        again = super().ended(job, code)
        outcome = self.outcomes[job.entry.name]
        if not again and outcome.state != "stopped":
            self._tell(job.entry.name, pruned=outcome.state == "pruned")
        return again

    def wanted(self, entry: PoolJob) -> bool:
        """Report to the study a cell that another driver has run since."""
        if super().wanted(entry):
            return True
        self._tell(entry.name)
        return False

    def _more(self) -> list[PoolJob]:
        """Return trials for the free slots; those whose run is done already are reported at once."""
        entries: list[PoolJob] = []
        self._last_request = time.monotonic()
        room = (self.base.config.optuna.parallel or max(1, self.count // self.base.ranks)) - len(self.numbers)
        while len(entries) < room and (proposals := optuna_study.feed(self.trials, 1, self._free)):
            if entry := self._admit(proposals[0]):
                entries.append(entry)
        return entries

    def _free(self, proposal: Proposal) -> bool:
        try:
            return not run_dir.is_locked(self.made(proposal).run_dir)
        except UserError:
            return True

    def _admit(self, proposal: Proposal) -> PoolJob | None:
        try:
            cell = self.made(proposal)
            if cell.ranks > self.count:
                raise UserError.of([f"needs {cell.ranks} slots of {self.count}"])
        except UserError as error:  # of this combination; others may do
            self.console.warn(f"trial {proposal.number}, {' '.join(proposal.overrides)}: {error}")
            self.trials.finish(proposal.number, None)
            return None
        waits = cell.name in self.numbers
        self.numbers.setdefault(cell.name, []).append(proposal.number)
        if waits:  # the same values once more: one run answers both
            return None
        self.cells[cell.name], self.outcomes[cell.name] = cell, display.CellOutcome(before=cell.state())
        if cell.last_state() is State.done:
            self.outcomes[cell.name].state = "done before"
            self._tell(cell.name)
            return None
        return self.entry(cell)

    def _watch(self, live: list[Live]) -> None:
        for each in live:
            name, step, every = each.cell.name, int(each.record.get("step", 0)), each.cell.config.trainer.eval_every
            if step // max(1, every) <= self._read.get(name, 0) // max(1, every):
                continue  # not evaluated since
            self._read[name] = step
            if self.trials.report(self.numbers[name][0], run_dir.read_metrics(each.cell.run_dir)):
                each.prune()

    def _tell(self, name: str, *, pruned: bool = False) -> None:
        cell, self._last_request = self.cells[name], 0.0  # there is room again
        value = cell.value() if cell.last_state() is State.done else None
        for number in self.numbers.pop(name):
            self.trials.finish(number, value, pruned=pruned)
