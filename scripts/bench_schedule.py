"""Pipelines on this machine's cores beside their simulation: does ``gpt.plan.pipeline_simulation`` tell a step's time?

    python scripts/bench_schedule.py

Each row is a job of its own through the engine, one thread a rank; every forward and backward pass is timed. What the
simulation is told is measured with one micro batch under way, so nothing overlaps: seconds of each stage's passes, of a
message, and of what follows the passes. It then forecasts steps with more micro batches, and interleaved ones. 'With
its own passes' tells it the mean passes of the step at hand instead: what is left is the schedule and its messages.

'free' lets passes take what they take, so stages compete for the cores, also with whatever else runs. 'held' makes
every pass last a set time, longer than it computes, as if each stage had a device of its own: then more stages than
cores can be compared. The tables go into docs/plan-validation.md, the two pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.derived import typed  # noqa: E402
from gpt.config.schema import Config  # noqa: E402
from gpt.plan.pipeline_plot import draw  # noqa: E402
from gpt.plan.pipeline_schedule import Kind, bubble  # noqa: E402
from gpt.plan.pipeline_simulation import Event, Pipeline, Timeline, simulate  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402
from scripts import rank_jobs  # noqa: E402

LAYERS, MICRO = 8, 2
MODEL = [
    "model=tiny", "model.hidden=192", f"model.layers={LAYERS}", "model.heads=3", "model.vocab=2048",
    "data=tokens", "data.path=none", f"trainer.micro_batch_size={MICRO}", "cluster.device=cpu",
]  # fmt: skip
STEPS, QUICKEST = 20, 3  # of each job, and how many of them are counted: others use the machine too
HELD, HEAD_SHARE = {"F": 0.08, "B": 0.16}, 0.5  # seconds of a stage's passes; what the head adds
HELD_STEPS = 6
SMALL = ["model.hidden=64", "model.heads=1", "model.vocab=512"]  # computes in a fraction of that
SHAPES = [
    *((stages, micros, 1) for stages in (2, 4) for micros in (1, 2, 4, 8, 16)), (4, 4, 2), (4, 8, 2), (4, 16, 2),
]  # fmt: skip
PICTURED = (4, 8, 2)
PAGE = ROOT / "docs" / "plan-validation.md"


class Step(NamedTuple):
    """A measured step: begin and end of the whole, and (kind, begin, end) of each pass, on a clock all ranks share."""

    begin: float
    end: float
    passes: list[tuple[str, float, float]]


def serve(config: Config, answer: Path, *, held: bool) -> None:
    """In a rank: train, and write when each pass of each step began and ended."""
    from gpt.parallel.topology import Topology
    from gpt.train.trainer import Trainer
    from gpt.worker import exit_process

    engine = Trainer(config, Topology.initialize(config))
    samples: Any = rank_jobs.RandomSamples(config)
    passes: list[tuple[str, float, float]] = []
    (schedule,) = engine.model.schedule
    for name, kind in (("_forward_step", "F"), ("_backward_step", "B")):
        hold = partial(_held, schedule, kind, config, engine.topology.stage) if held else lambda: 0.0
        setattr(schedule, name, _timed(getattr(schedule, name), kind, passes, hold))
    steps = []
    for number in range(1, (HELD_STEPS if held else STEPS) + 1):
        engine.topology.all_reduce_sum(0.0)  # all ranks begin together
        passes.clear()
        begin = time.perf_counter()
        engine.step(number, samples)
        steps.append(Step(begin, time.perf_counter(), list(passes)))
    answer.write_text(json.dumps(steps))
    exit_process(0)


def _held(schedule: Any, kind: str, config: Config, stage: int) -> float:
    """Seconds of the pass at hand: a chunk's share; the last chunk of the last stage has the head too."""
    p = config.parallel
    last = stage == p.pp_degree - 1 and (schedule._virtual_pp_rank or 0) == p.virtual_pp_degree - 1
    return HELD[kind] * (1 / p.virtual_pp_degree + (HEAD_SHARE if last else 0))


def _timed(step: Any, kind: str, passes: list[tuple[str, float, float]], hold: Callable[[], float]) -> Any:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        begin, least = time.perf_counter(), hold()
        result = step(*arguments, **named)
        time.sleep(max(0.0, begin + least - time.perf_counter()))
        passes.append((kind, begin, time.perf_counter()))
        return result

    return wrapped


def measure(stages: int, micros: int, chunks: int, *, held: bool) -> list[list[Step]]:
    """By step, the quickest first, what each rank measured."""
    degrees = [f"parallel.pp_degree={stages}", f"parallel.virtual_pp_degree={chunks}"]
    model = [*MODEL, *(SMALL if held else [])]
    config = cli.compose_job([*model, "parallel=single", *degrees, f"trainer.global_batch_size={MICRO * micros}"])
    more = ["--held"] if held else []
    by_rank = [[Step(*step) for step in steps] for steps in rank_jobs.answers(__file__, config, *more)]
    return sorted(map(list, zip(*by_rank, strict=True)), key=whole)[:QUICKEST]


def whole(ranks: list[Step]) -> float:
    """Seconds of a step."""
    return max(rank.end for rank in ranks) - min(rank.begin for rank in ranks)


def span(ranks: list[Step]) -> float:
    """Seconds from the first pass of any rank to the last."""
    return max(rank.passes[-1][2] for rank in ranks) - min(rank.passes[0][1] for rank in ranks)


class Parts(NamedTuple):
    """What the simulation is told, in seconds."""

    forward: list[float]
    backward: list[float]
    links: list[float]
    rest: float


def parts(steps: list[list[Step]]) -> Parts:
    """From steps of one micro batch: medians of passes, of the gaps between them, of what follows."""
    stages = range(len(steps[0]))
    times = [
        [median(ranks[stage].passes[i][2] - ranks[stage].passes[i][1] for ranks in steps) for stage in stages]
        for i in (0, 1)
    ]
    gaps = [
        median(ranks[stage + 1].passes[0][1] - ranks[stage].passes[0][2] for ranks in steps) for stage in stages[:-1]
    ]
    rest = median(whole(ranks) - span(ranks) for ranks in steps)
    return Parts(times[0], times[1], [*gaps, median(gaps)], rest)


def interleaved(told: Parts, chunks: int) -> Parts:
    """The same model cut finer: the middle stages tell a block's time, the rest is the embedding's and the head's."""
    stages = len(told.forward)
    cut = []
    for times in (told.forward, told.backward):
        middle = median(times[1:-1])
        part = [middle / chunks] * (stages * chunks)
        part[0] += times[0] - middle
        part[-1] += times[-1] - middle
        cut.append(part)
    return Parts(cut[0], cut[1], told.links, told.rest)


def as_seen(ranks: list[Step], simulated: Timeline) -> Timeline:
    """A measured step in the form that is drawn; which pass is which the simulation says, whose order is the same."""
    begin = min(rank.passes[0][1] for rank in ranks)
    events = [
        [
            Event(stage, e.kind, e.micro, e.chunk, first - begin, last - begin)
            for e, (kind, first, last) in zip(simulated.events[stage], rank.passes, strict=True)
            if e.kind is Kind(kind)
        ]
        for stage, rank in enumerate(ranks)
    ]
    assert list(map(len, events)) == list(map(len, simulated.events)), "forward and backward passes in another order"
    ends = [part[-1].end for part in events]
    return Timeline(replace(simulated.pipeline, update=0), events, max(ends), ends, max(ends), simulated.in_flight)


def own_passes(told: Pipeline, seen: list[Timeline]) -> Pipeline:
    """The same with the mean seconds of measured steps' passes, by virtual stage."""
    sums = {kind: [0.0] * (told.stages * told.chunks) for kind in Kind}
    for event in (event for line in seen for events in line.events for event in events):
        share = (event.end - event.begin) / told.micros / len(seen)
        sums[event.kind][event.chunk * told.stages + event.stage] += share
    return replace(told, forward=sums[Kind.forward], backward=sums[Kind.backward])


def table(name: str, *, held: bool, cores: int | None) -> None:
    """Measure, simulate, compare; write a section."""
    rows: list[str] = []
    sentences: list[str] = []
    told: dict[int, Parts] = {}
    for stages, micros, chunks in SHAPES:
        steps = measure(stages, micros, chunks, held=held)
        if micros == 1:
            told[stages] = parts(steps)
            sentences.append(said(told[stages]))
        given = interleaved(told[stages], chunks) if chunks > 1 else told[stages]
        alone = Pipeline(given.forward, given.backward, stages, micros, chunks, links=given.links, update=given.rest)
        line = simulate(replace(alone, cores=cores))
        seen = [as_seen(ranks, line) for ranks in steps]
        found, own = median(map(whole, steps)), simulate(own_passes(alone, seen))
        figures = " | ".join(
            [f"{found * 1e3:.0f}", *(f"{x.step * 1e3:.0f} | {x.step / found - 1:+.1%}" for x in (line, own))]
        )
        waits = median(one.bubble for one in seen)
        idle = f"{waits:.1%} | {line.bubble:.1%} | {bubble(stages, micros, chunks):.1%}"
        rows.append(f"| {stages} | {chunks} | {micros} | {line.pipeline.order.value} | {figures} | {idle} |")
        print(rows[-1], flush=True)
        if held and (stages, micros, chunks) == PICTURED:
            draw(line, PAGE.with_name("schedule-simulated.png"), "simulated:")
            draw(seen[0], PAGE.with_name("schedule-measured.png"), "measured:")
    replace_section(PAGE, name, "\n".join([*HEAD, *rows, "", *sentences]))


def main() -> None:
    """Both tables, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="that the simulation lets compute at once when 'free'")
    parser.add_argument("--only", choices=["held", "free"], help="one of the two tables")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(typed(json.loads(arguments.serve[0])), Path(arguments.serve[1]), held=arguments.held)
    for name, held, cores in (("held", True, None), ("free", False, arguments.cores)):
        if arguments.only in (None, name):
            table(name, held=held, cores=cores)


def said(told: Parts) -> str:
    """What the simulation was told, as a sentence."""
    forward, backward = (", ".join(f"{time * 1e3:.1f}" for time in times) for times in (told.forward, told.backward))
    return (
        f"Told for {len(told.forward)} stages, in ms: forward {forward}; backward {backward}; a message "
        f"{median(told.links) * 1e3:.2f}; after the passes {told.rest * 1e3:.1f}."
    )


HEAD = [
    "| stages | chunks | micro batches | schedule | measured, ms | forecast, ms | error | with its own passes, ms "
    "| error | idle: measured | forecast | closed form |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
]


if __name__ == "__main__":
    main()
