"""Schema of grids: many runs from one command, and the page about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


@dataclass
class Grid:
    """How the cells of a grid (``-m``) run. None of it changes what a cell computes."""

    name: str | None = None  # None: what is swept, and a hash of what is not
    slots: int | None = None  # devices or cores that are shared out; None: all of this host
    retries: int = MISSING
    fail_fast: bool = MISSING
    confirm_above: int = MISSING


@dataclass
class Report:
    """The page about runs."""

    path: str | None = None  # a grid, or any folder with runs in it
    output: str | None = None  # the folder that gets the page and the tables; None: the same


class Sampler(Enum):
    """How Optuna proposes values."""

    tpe = "tpe"
    random = "random"


@dataclass
class Optuna:
    """A search over hyper-parameters (``-m hparams=optuna``). None of it changes what a trial computes."""

    search: bool = MISSING
    trials: int = MISSING
    parallel: int | None = None  # trials at a time; None: as many as the slots hold
    sampler: Sampler = MISSING
    seed: int = MISSING
    startup_trials: int = MISSING
    space: dict[str, str] = field(default_factory=dict)  # key -> a sweep as on the command line, which wins
    prune: bool = MISSING
    prune_from: int | None = None  # steps of the first rung; None: Optuna's estimate from the first whole trial
    reduction_factor: int = MISSING
