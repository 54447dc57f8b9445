"""What each stage of a pipeline does, in which order, and when it meets its neighbours: Fleet's schedules.

Virtual stage k = chunk x stages + stage is the k-th part of the model in its order. ``micro`` is a micro batch.
The orders are those of Paddle 3.3's ``PipelineParallel`` (1F1B), ``PipelineParallelWithInterleave`` and, where there
are as many micro batches as stages, ``PipelineParallelWithInterleaveFthenB``; a test asks Fleet itself for them. 1F1B
is Narayanan et al. 2019 (PipeDream), interleaved 1F1B Narayanan et al. 2021, F-then-B Huang et al. 2019 (GPipe).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple


class Kind(str, Enum):
    """Direction of a pass."""

    forward = "F"
    backward = "B"


class PipelineSchedule(str, Enum):
    """In which order a stage takes micro batches."""

    one_f_one_b = "1F1B"
    interleaved = "interleaved 1F1B"
    f_then_b = "F-then-B"


class Work(NamedTuple):
    """One micro batch forward or backward through one virtual stage."""

    kind: Kind
    micro: int
    virtual: int


class Exchange(NamedTuple):
    """Where a stage hands out and waits: each ``Work`` stands for what it needs from the neighbour."""

    sends: tuple[Work, ...] = ()
    receives: tuple[Work, ...] = ()


Program = list["Work | Exchange"]


def of_fleet(stages: int, micros: int, chunks: int = 1) -> PipelineSchedule:
    """The schedule that Fleet takes for this shape.

    Example:
        >>> of_fleet(4, 8, 2), of_fleet(4, 4, 2)
        (<PipelineSchedule.interleaved: 'interleaved 1F1B'>, <PipelineSchedule.f_then_b: 'F-then-B'>)
    """
    if chunks == 1:
        return PipelineSchedule.one_f_one_b
    return PipelineSchedule.interleaved if micros >= 2 * stages else PipelineSchedule.f_then_b


def warm_up(schedule: PipelineSchedule, stage: int, stages: int, micros: int, chunks: int = 1) -> int:
    """Forward passes before a stage's first backward pass, not counting the one that pairs with it.

    1F1B: p - s - 1. Interleaved: 2 (p - s - 1) + (v - 1) p, where m is a multiple of p. Never more than there are.
    """
    if schedule is PipelineSchedule.f_then_b:
        return micros * chunks
    after = stages - stage - 1
    steps = after if schedule is PipelineSchedule.one_f_one_b else 2 * after + (chunks - 1) * stages
    return min(steps, micros * chunks)


def in_flight(schedule: PipelineSchedule, stage: int, stages: int, micros: int, chunks: int = 1) -> int:
    """Most micro batches whose activations a stage holds at once, counted in chunks (1/v of the stage's layers each).

    The warm-up and one more: min(p - s, m) under 1F1B.

    Example:
        >>> [in_flight(PipelineSchedule.one_f_one_b, stage, 4, 8) for stage in range(4)]
        [4, 3, 2, 1]
        >>> [in_flight(PipelineSchedule.interleaved, stage, 4, 8, 2) for stage in range(4)]
        [11, 9, 7, 5]
    """
    return min(warm_up(schedule, stage, stages, micros, chunks) + 1, micros * chunks)


def bubble(stages: int, micros: int, chunks: int = 1) -> float:
    """Share of a step that even stages with instant links wait: (p - 1) / (v m + p - 1), under every schedule here.

    Example:
        >>> bubble(4, 8), bubble(1, 8)
        (0.2727272727272727, 0.0)
    """
    return (stages - 1) / (chunks * micros + stages - 1)


def program(schedule: PipelineSchedule, stage: int, stages: int, micros: int, chunks: int = 1) -> Program:
    """Everything a stage does in a step, with the points where it exchanges activations and gradients.

    Args:
        schedule: which.
        stage: from 0.
        stages: p.
        micros: m, micro batches a step.
        chunks: v, parts of the model per stage; interleaved takes m in multiples of p.
    """
    assert chunks == 1 or schedule is not PipelineSchedule.one_f_one_b, "1F1B has one chunk per stage"
    assert schedule is not PipelineSchedule.interleaved or micros % stages == 0, "Fleet's rule for virtual stages"
    forwards = [Work(Kind.forward, *step) for step in _steps(schedule, stage, stages, micros, chunks)]
    backwards = [
        Work(Kind.backward, micro, virtual + (chunks - 1 - 2 * (virtual // stages)) * stages)
        for _, micro, virtual in forwards
    ]
    shape = _Shape(stages * chunks, warm_up(schedule, stage, stages, micros, chunks))
    parts = _alternating if schedule is PipelineSchedule.one_f_one_b else _paired
    return list(parts(shape, forwards, backwards))


def _steps(schedule: PipelineSchedule, stage: int, stages: int, micros: int, chunks: int) -> Iterator[tuple[int, int]]:
    """(micro, virtual) of the forward passes in order: interleaved takes p micro batches per chunk at a time."""
    group = stages if schedule is PipelineSchedule.interleaved else micros
    for first in range(0, micros, group):
        for chunk in range(chunks):
            for micro in range(first, first + group):
                yield micro, chunk * stages + stage


class _Shape(NamedTuple):
    virtuals: int
    warm_up: int

    def after(self, work: Work) -> tuple[Work, ...]:
        """What the neighbour can do with the result; nothing at the ends of the model."""
        virtual = work.virtual + (1 if work.kind is Kind.forward else -1)
        return (Work(work.kind, work.micro, virtual),) if 0 <= virtual < self.virtuals else ()

    def needs(self, works: list[Work], number: int) -> tuple[Work, ...]:
        """The work with this number, if there is one and it waits for a neighbour."""
        if number >= len(works):
            return ()
        end = 0 if works[number].kind is Kind.forward else self.virtuals - 1
        return (works[number],) if works[number].virtual != end else ()


def _alternating(shape: _Shape, forwards: list[Work], backwards: list[Work]) -> Iterator[Work | Exchange]:
    """1F1B: an output leaves at once; a gradient leaves after the next input has come."""
    ahead, steady = shape.warm_up, len(forwards) - shape.warm_up
    for i in range(ahead):
        yield Exchange(receives=shape.needs(forwards, i))
        yield forwards[i]
        yield Exchange(sends=shape.after(forwards[i]))
    yield Exchange(receives=shape.needs(forwards, ahead))
    for i in range(steady):
        yield forwards[ahead + i]
        yield Exchange(sends=shape.after(forwards[ahead + i]))
        yield Exchange(receives=shape.needs(backwards, i))
        yield backwards[i]
        yield Exchange(receives=shape.needs(forwards, ahead + i + 1))
        yield Exchange(sends=shape.after(backwards[i]))
    for i in range(steady, len(backwards)):
        yield Exchange(receives=shape.needs(backwards, i))
        yield backwards[i]
        yield Exchange(sends=shape.after(backwards[i]))


def _paired(shape: _Shape, forwards: list[Work], backwards: list[Work]) -> Iterator[Work | Exchange]:
    """Interleaved, F-then-B: one exchange in all directions after each forward pass, backward pass or pair of them."""
    ahead, steady = shape.warm_up, len(forwards) - shape.warm_up
    yield Exchange(receives=shape.needs(forwards, 0))
    for i in range(ahead):
        yield forwards[i]
        first_gradient = shape.needs(backwards, 0) if i == ahead - 1 and steady else ()
        yield Exchange(shape.after(forwards[i]), shape.needs(forwards, i + 1) + first_gradient)
    for i in range(steady):
        yield forwards[ahead + i]
        yield backwards[i]
        results = shape.after(forwards[ahead + i]) + shape.after(backwards[i])
        yield Exchange(results, shape.needs(forwards, ahead + i + 1) + shape.needs(backwards, i + 1))
    if not steady:
        yield Exchange(receives=shape.needs(backwards, 0))
    for i in range(steady, len(backwards)):
        yield backwards[i]
        yield Exchange(shape.after(backwards[i]), shape.needs(backwards, i + 1))
