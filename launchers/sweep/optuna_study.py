"""Hyper-parameter search by Optuna, stored on disk: it proposes trials and prunes them.

Trials are asked for and told one by one, so a search goes on where it was stopped, and several drivers may work on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from gpt.config.task_schemas import Optuna, Sampler
from gpt.utils.errors import UserError

INSTALL = "hparams=optuna needs Optuna: pip install 'gpt-runner[optuna]'"
FILE = "study.journal"
Space = Mapping[str, Any]  # key -> Optuna's distribution


@dataclass(frozen=True)
class Proposal:
    """A trial: its number in the study, and its overrides."""

    number: int
    overrides: tuple[str, ...]


def optuna() -> Any:
    """Import the library with its log silenced.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna as library
    except ImportError:
        raise UserError.of([INSTALL]) from None
    library.logging.set_verbosity(library.logging.WARNING)
    warnings.filterwarnings("ignore", category=library.exceptions.ExperimentalWarning)
    return library


def split(arguments: Iterable[str], space: Mapping[str, str], loader: Any) -> tuple[Space, list[str]]:
    """Split the arguments into searched and fixed ones.

    Args:
        arguments: overrides of the command; sweeps among them are searched, and win over ``space``.
        space: ``optuna.space``.
        loader: Hydra's, for ``glob``.

    Returns:
        Distributions by key, and the fixed overrides.

    Raises:
        UserError: something cannot be searched, or there is nothing to search.
    """
    parser = OverridesParser.create(config_loader=loader)
    typed = parser.parse_overrides(list(arguments))
    named = {override.key_or_group for override in typed}
    typed += parser.parse_overrides([f"{key}={sweep}" for key, sweep in space.items() if key not in named])
    swept = [override for override in typed if override.is_sweep_override()]
    if not swept:
        remedy = "give one, for example optimizer.lr='tag(log,interval(3e-4,1e-2))', or set optuna.space"
        raise UserError.of([f"hparams=optuna has nothing to search: {remedy}"])
    fixed = [override.input_line or "" for override in typed if not override.is_sweep_override()]
    return {override.get_key_element(): _distribution(override) for override in swept}, fixed


def _distribution(override: Override) -> Any:
    known = optuna().distributions
    value: Any = override.value()
    log = "log" in (getattr(value, "tags", None) or ())
    problem = f"{override.input_line}: cannot be searched"
    try:
        if isinstance(value, IntervalSweep):
            ends: Any = (value.start, value.end)  # int after int(...), whatever Hydra declares
            low, high = ends
            if isinstance(low, int) and isinstance(high, int):
                return known.IntDistribution(low, high, log=log)
            return known.FloatDistribution(float(low), float(high), log=log)
        if isinstance(value, RangeSweep | ChoiceSweep | Glob):
            return known.CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise UserError.of([f"{problem}: {error}"]) from None
    raise UserError.of([f"{problem}: use interval(a,b), tag(log,interval(a,b)), int(interval(a,b)), choice or range"])


class Study:
    """One search. A trial is unfinished until ``finish``: a later driver gets it again.

    Args:
        folder: of the grid; the study's file is in it.
        space: what is searched.
        settings: of the search.

    Raises:
        UserError: Optuna is missing.
    """

    def __init__(self, folder: Path, space: Space, settings: Optuna) -> None:
        self._optuna = optuna()
        self._space = dict(space)
        self._settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        journal = self._optuna.storages.journal
        storage = self._optuna.storages.JournalStorage(journal.JournalFileBackend(str(folder / FILE)))
        self._study = self._optuna.create_study(
            study_name=folder.name, storage=storage, direction="minimize", load_if_exists=True
        )
        self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
        self._study.pruner = self._optuna.pruners.SuccessiveHalvingPruner(
            min_resource=settings.prune_from or "auto", reduction_factor=settings.reduction_factor
        )
        self._open: dict[int, Any] = {}  # trials that this driver has taken
        self._reported: dict[int, int] = {}  # last reported step by trial

    def _sampler(self, existing: int) -> Any:
        """Make a sampler whose seed differs for a later start, which would else propose the first trials again."""
        seed = self._settings.seed + existing
        if self._settings.sampler is Sampler.random:
            return self._optuna.samplers.RandomSampler(seed=seed)
        startup = self._settings.startup_trials
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def left(self) -> int:
        """Return the number of trials that may still be proposed as new ones."""
        return max(0, self._settings.trials - len(self._study.get_trials(deepcopy=False)))

    def unfinished(self) -> list[Proposal]:
        """Return the trials that an earlier or another driver began and that have not ended."""
        running = (self._optuna.trial.TrialState.RUNNING,)
        return [
            Proposal(trial.number, tuple(trial.user_attrs["overrides"]))
            for trial in self._study.get_trials(deepcopy=False, states=running)
            if trial.number not in self._open and "overrides" in trial.user_attrs
        ]

    def take(self, proposal: Proposal) -> None:
        """Resume an unfinished trial."""
        stored = self._study.get_trials(deepcopy=False)[proposal.number]
        self._open[proposal.number] = self._optuna.trial.Trial(self._study, stored._trial_id)
        self._reported[proposal.number] = stored.last_step or 0

    def ask(self) -> Proposal:
        """Return a new trial.

        Raises:
            UserError: the space was another one when the study began.
        """
        try:
            trial = self._study.ask(fixed_distributions=self._space)
        except ValueError as error:
            remedy = "choices cannot change within a study: give the search another name with grid.name=..."
            raise UserError.of([f"{error}; {remedy}"]) from None
        overrides = [f"{key}={value}" for key, value in trial.params.items()]
        trial.set_user_attr("overrides", overrides)
        self._open[trial.number] = trial
        self._reported[trial.number] = 0
        return Proposal(trial.number, tuple(overrides))

    def report(self, number: int, records: Iterable[Mapping[str, Any]]) -> bool:
        """Report the validation losses so far; return whether to prune the trial.

        A trial is compared with what the others had at the same step: asynchronous successive halving (Li et al.,
        A System for Massively Parallel Hyperparameter Tuning, 2018) as Optuna does it.
        """
        trial = self._open[number]
        for record in records:
            if record["step"] > self._reported[number] and record.get("val/loss") is not None:
                trial.report(float(record["val/loss"]), int(record["step"]))
                self._reported[number] = record["step"]
        return self._settings.prune and bool(trial.should_prune())

    def finish(self, number: int, value: float | None, *, pruned: bool = False) -> None:
        """Report a trial's end: its validation loss, that it was pruned, or with neither that it failed."""
        states = self._optuna.trial.TrialState
        state = states.PRUNED if pruned else states.FAIL if value is None else states.COMPLETE
        self._study.tell(self._open.pop(number), None if pruned else value, state=state, skip_if_finished=True)

    def best(self) -> tuple[float, tuple[str, ...]] | None:
        """Return the lowest validation loss of whole trials, and that trial's overrides."""
        whole = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
        if not whole:
            return None
        trial = min(whole, key=lambda each: each.value)
        return float(trial.value), tuple(trial.user_attrs["overrides"])

    def counts(self) -> dict[str, int]:
        """Return the number of whole, pruned, failed and unfinished trials."""
        names = {"COMPLETE": "whole", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "unfinished"}
        counts = dict.fromkeys(names.values(), 0)
        for trial in self._study.get_trials(deepcopy=False):
            counts[names.get(trial.state.name, "unfinished")] += 1
        return counts


def feed(study: Study, room: int, free: Callable[[Proposal], bool]) -> list[Proposal]:
    """Return the trials to start next: unfinished ones that no driver runs, then new ones.

    Args:
        study: the search.
        room: how many at most.
        free: whether no driver runs the trial's run.
    """
    proposals: list[Proposal] = []
    for proposal in study.unfinished():
        if len(proposals) < room and free(proposal):
            study.take(proposal)
            proposals.append(proposal)
    while len(proposals) < room and study.left():
        proposals.append(study.ask())
    return proposals
