"""Notices that no rank of a job moves any more, and who is missing. It reads files only, from outside the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gpt.utils import heartbeat
from gpt.utils.heartbeat import Beat

LOOK_EVERY_SECONDS = 0.5


class Watchdog:
    """Follows the heartbeats of all ranks and the growth of the run's records.

    Args:
        log_dir: holds the heartbeats.
        ranks: in the whole job.
        seconds: without any progress until the job counts as stuck; 0: never.
        records: a file that grows with progress.
        clock: of seconds; another one in tests.
    """

    def __init__(
        self, log_dir: Path, ranks: int, seconds: float, records: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log_dir = log_dir
        self._ranks = ranks
        self._seconds = seconds
        self._records = records
        self._clock = clock
        self._beats: list[Beat | None] = [None] * ranks
        self._seen: object = None
        self._since = self._looked = clock()

    def stuck(self) -> str | None:
        """What to tell the user if the job is stuck, else None. Cheap enough to be called all the time."""
        now = self._clock()
        if now - self._looked < min(LOOK_EVERY_SECONDS, self._seconds / 4 or LOOK_EVERY_SECONDS):
            return None
        self._looked = now
        self._beats = [heartbeat.read(self._log_dir, rank) for rank in range(self._ranks)]
        seen = (self._beats, self._records.stat().st_size if self._records.exists() else 0)
        if seen != self._seen:
            self._seen, self._since = seen, now
        if self._seconds <= 0 or now - self._since < self._seconds:
            return None
        return (
            f"STOPPED: no rank made progress for {self._seconds:,.0f} s (cluster.hang_seconds). {self.missing()}. "
            f"Where each rank was in the code is at the end of its log: {self._log_dir}/worker.R.log"
        )

    def missing(self) -> str:
        """Which ranks were behind the others when it last looked."""
        return missing(self._beats)


def missing(beats: list[Beat | None]) -> str:
    """Which ranks are behind the others.

    Example:
        >>> missing([Beat(7, "reduce", 20, 0.0), Beat(7, "forward", 19, 0.0)])
        'Rank 1 did not arrive: rank 1 at step 7 (forward); rank 0 at step 7 (reduce)'
    """
    places = [beat.place if beat else (-1, -1) for beat in beats]
    behind = [rank for rank, place in enumerate(places) if place < max(places)]
    where: dict[str, list[int]] = {}
    for rank in sorted(range(len(beats)), key=lambda rank: places[rank]):
        where.setdefault(_said(beats[rank]), []).append(rank)
    table = "; ".join(f"{named(ranks)} {place}" for place, ranks in where.items())
    if not behind:
        return f"All ranks are at the same place: {table}"
    verb = named(behind)
    return f"{verb[0].upper()}{verb[1:]} did not arrive: {table}"


def named(ranks: list[int]) -> str:
    """Ranks in words, neighbours joined.

    Example:
        >>> named([3]), named([0, 1, 2, 5])
        ('rank 3', 'ranks 0-2, 5')
    """
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {words}"


def _said(beat: Beat | None) -> str:
    return f"at step {beat.step:,} ({beat.phase})" if beat else "not begun"
