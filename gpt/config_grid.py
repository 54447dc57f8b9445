"""Schema of grids: many runs from one command, and the page about them."""

from __future__ import annotations

from dataclasses import dataclass

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
