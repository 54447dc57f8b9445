"""When each stage of a pipeline does what: a discrete-event simulation of Fleet's schedules.

It tells what the closed forms cannot: stages of different length (the embedding, the head), links that take time,
sends that a stage waits for or not, gradients that are added up at the end or during the last backward pass, and
stages that share cores.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gpt.config.derived import accumulate_steps
from gpt.config.schema import Config
from gpt.plan.memory import on_cpu
from gpt.plan.pipeline_schedule import Exchange, Kind, PipelineSchedule, Program, Work, of_fleet, program
from gpt.plan.step_time import stage_times


@dataclass(frozen=True)
class Pipeline:
    """What is simulated; times in seconds.

    Attributes:
        forward: of one micro batch, per virtual stage in the order of the model: p x v of them.
        backward: the same.
        stages: p.
        micros: m, micro batches a step.
        chunks: v.
        schedule: None: the one that Fleet takes.
        links: a message's time from stage s to s + 1 or back, for each s; the last is the way round. Empty: no time.
        blocking: both sides are busy while a message travels, and one that sends waits for the receiver (NCCL on the
            stream that computes); False: a stage goes on at once and messages of a link follow one another (a thread
            of its own, as in ``gpt.parallel.cpu.sockets``).
        reduction: adding up gradients over replicas, per stage. Empty: none.
        overlapped: a chunk's share of it goes on during the chunk's last backward pass; False: it follows the last one.
        update: what follows once all stages are through: clipping, optimizer.
        cores: computing stages that the machine can serve at full speed; more share it evenly. None: all.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    stages: int
    micros: int
    chunks: int = 1
    schedule: PipelineSchedule | None = None
    links: Sequence[float] = ()
    blocking: bool = False
    reduction: Sequence[float] = ()
    overlapped: bool = False
    update: float = 0
    cores: int | None = None

    def __post_init__(self) -> None:
        virtuals = self.stages * self.chunks
        assert len(self.forward) == len(self.backward) == virtuals, f"a time for each of {virtuals} virtual stages"
        assert len(self.links) in (0, self.stages), f"a time for each of {self.stages} links"
        assert len(self.reduction) in (0, self.stages), f"a time for each of {self.stages} stages"

    @property
    def order(self) -> PipelineSchedule:
        """The schedule."""
        return self.schedule or of_fleet(self.stages, self.micros, self.chunks)


class Event(NamedTuple):
    """A stage computes: seconds from the start of the step."""

    stage: int
    kind: Kind
    micro: int
    chunk: int
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happened.

    Attributes:
        events: by stage, in order.
        passes: seconds until the last forward or backward pass of any stage has ended.
        reduced: per stage, when its gradients are added up.
        step: seconds of the whole step.
        in_flight: per stage, most chunks of micro batches forward but not yet backward.
    """

    pipeline: Pipeline
    events: list[list[Event]]
    passes: float
    reduced: list[float]
    step: float
    in_flight: list[int]

    def busy(self, stage: int) -> float:
        """Seconds of forward and backward passes."""
        return sum(event.end - event.begin for event in self.events[stage])

    def idle(self, stage: int) -> float:
        """Share of ``passes`` that a stage waits."""
        return 1 - self.busy(stage) / self.passes

    @property
    def bubble(self) -> float:
        """Mean idle share of the stages."""
        return sum(map(self.idle, range(len(self.events)))) / len(self.events)


def simulate(pipeline: Pipeline) -> Timeline:
    """Run one step."""
    state = _State(pipeline)
    for stage in range(pipeline.stages):
        state.go_on(stage)
    while state.next_event():
        pass
    unfinished = [s for s, at in enumerate(state.at) if at < len(state.programs[s])]
    assert not unfinished, f"stages {unfinished} wait for ever"
    reduced = [_reduced(pipeline, stage, events) for stage, events in enumerate(state.events)]
    return Timeline(
        pipeline,
        state.events,
        passes=max(events[-1].end for events in state.events),
        reduced=reduced,
        step=max(reduced) + pipeline.update,
        in_flight=[_most(events) for events in state.events],
    )


@dataclass
class _State:
    """Stages at their places in their programs, passes and messages under way.

    ``served`` is the time that a stage would have computed by now had it always been at it: with fewer cores than
    stages it runs slower than ``now``.
    """

    pipeline: Pipeline
    now: float = 0
    served: float = 0
    running: list[tuple[float, int, float]] = field(default_factory=list)  # end on the clock ``served``, stage, begin
    travelling: list[tuple[float, Work, int, int]] = field(default_factory=list)  # arrival, what, from, to
    arrived: set[Work] = field(default_factory=set)
    awaited: dict[Work, int] = field(default_factory=dict)  # by the stage that waits for it
    offered: dict[Work, int] = field(default_factory=dict)  # by the stage that sends it, blocking
    free: dict[tuple[int, int, Kind], float] = field(default_factory=lambda: defaultdict(int))  # links, from when on

    def __post_init__(self) -> None:
        p = self.pipeline
        self.programs = [program(p.order, stage, p.stages, p.micros, p.chunks) for stage in range(p.stages)]
        self.at = [0] * p.stages
        self.pending = [0] * p.stages  # messages that a stage waits for
        self.events: list[list[Event]] = [[] for _ in range(p.stages)]

    def go_on(self, stage: int) -> None:
        """A stage does what it can until it computes or waits."""
        steps: Program = self.programs[stage]
        while self.at[stage] < len(steps):
            step = steps[self.at[stage]]
            if isinstance(step, Work):
                times = self.pipeline.forward if step.kind is Kind.forward else self.pipeline.backward
                heapq.heappush(self.running, (self.served + times[step.virtual], stage, self.now))
                return
            self._exchange(stage, step)
            if self.pending[stage]:
                return
            self.at[stage] += 1

    def _exchange(self, stage: int, exchange: Exchange) -> None:
        for work in exchange.sends:
            if self.pipeline.blocking:
                self.pending[stage] += 1
                self.offered[work] = stage
                if work in self.awaited:
                    self._travel(work, stage)
            else:
                self._travel(work, stage)
        for work in exchange.receives:
            if work in self.arrived:
                self.arrived.remove(work)
                continue
            self.pending[stage] += 1
            self.awaited[work] = stage
            if work in self.offered:
                self._travel(work, self.offered[work])

    def _travel(self, work: Work, source: int) -> None:
        target = work.virtual % self.pipeline.stages
        link = source if work.kind is Kind.forward else target
        time = self.pipeline.links[link] if self.pipeline.links else 0
        end = max(self.now, self.free[source, target, work.kind]) + time
        self.free[source, target, work.kind] = end
        heapq.heappush(self.travelling, (end, work, source, target))

    def next_event(self) -> bool:
        """A pass ends or a message arrives; False: neither is under way."""
        cores = self.pipeline.cores
        rate = 1 if cores is None or len(self.running) <= cores else cores / len(self.running)
        left = self.running[0][0] - self.served if self.running else None
        ends = None if left is None else self.now + (left if rate == 1 else left / rate)
        if self.travelling and (ends is None or self.travelling[0][0] <= ends):
            time, work, source, target = heapq.heappop(self.travelling)
            self.served, self.now = self.served + (time - self.now) * rate, time
            self._arrive(work, source, target)
            return True
        if ends is None:
            return False
        self.served, stage, begin = heapq.heappop(self.running)
        self.now = ends
        done = self.programs[stage][self.at[stage]]
        assert isinstance(done, Work)
        chunk = done.virtual // self.pipeline.stages
        self.events[stage].append(Event(stage, done.kind, done.micro, chunk, begin, self.now))
        self.at[stage] += 1
        self.go_on(stage)
        return True

    def _arrive(self, work: Work, source: int, target: int) -> None:
        over = [target] if self.awaited.pop(work, None) is not None else []
        if not over:
            self.arrived.add(work)
        if self.offered.pop(work, None) is not None:
            over.append(source)
        for stage in over:
            self.pending[stage] -= 1
            if not self.pending[stage]:
                self.at[stage] += 1
                self.go_on(stage)


def _reduced(pipeline: Pipeline, stage: int, events: list[Event]) -> float:
    """When a stage's gradients are added up over the replicas."""
    time = pipeline.reduction[stage] if pipeline.reduction else 0
    if not pipeline.overlapped:
        return events[-1].end + time
    last = {event.chunk: event for event in events if event.kind is Kind.backward}  # later ones replace earlier ones
    done: float = 0
    for event in sorted(last.values(), key=lambda event: event.begin):
        done = max(max(done, event.begin) + time / pipeline.chunks, event.end)
    return done


def _most(events: list[Event]) -> int:
    held, most = 0, 0
    for event in events:
        held += 1 if event.kind is Kind.forward else -1
        most = max(most, held)
    return most


# A job's pipeline on a stated device, simulated.


def timeline(config: Config) -> Timeline | None:
    """One step of ``config`` on ``config.device``; None if that does not state what is needed (``cost.missing``).

    On an accelerator a message keeps both sides busy, as Fleet sends on the stream that computes; on a CPU messages
    travel beside the passes (``gpt.parallel.cpu.sockets``).
    """
    times, stages = stage_times(config), config.parallel.pp_degree
    if times is None:
        return None
    return simulate(
        Pipeline(
            times.forward,
            times.backward,
            stages,
            accumulate_steps(config),
            config.parallel.virtual_pp_degree,
            links=[times.send] * stages,
            blocking=not on_cpu(config),
            reduction=[times.reduce] * stages,
            update=times.update,
        )
    )
