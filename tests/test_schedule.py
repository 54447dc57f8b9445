"""The simulated pipeline: Fleet's orders, the closed forms, and what holds for any times."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.plan.pipeline_schedule import Kind, PipelineSchedule, Work, bubble, in_flight, of_fleet, program
from gpt.plan.pipeline_simulation import Pipeline, Timeline, simulate

SHAPES = [
    (1, 3, 1),
    (2, 1, 1),
    (2, 5, 1),
    (4, 2, 1),
    (4, 8, 1),
    (4, 8, 2),
    (3, 9, 3),
    (4, 4, 2),
    (8, 16, 3),
    (16, 64, 6),
]


def even(stages: int, micros: int, chunks: int = 1, **more: Any) -> Timeline:
    """A forward pass takes 1, a backward pass 2: whole numbers, so nothing is rounded."""
    virtuals = stages * chunks
    return simulate(Pipeline([1] * virtuals, [2] * virtuals, stages, micros, chunks, **more))


def fleet_says(stage: int, stages: int, micros: int, chunks: int) -> list[tuple[str, int, int]]:
    """(F or B, micro batch, chunk) in the order of Fleet's own schedule, which it can tell without a model."""
    from paddle.distributed.fleet.meta_parallel import pipeline_parallel as fleet

    kind = fleet.PipelineParallel if chunks == 1 else fleet.PipelineParallelWithInterleave
    rank = MagicMock(num_stages=stages, stage_id=stage, accumulate_steps=micros, num_model_chunks=chunks)
    rank.configure_mock(processed_steps=10**9, _profiling=False, _best_unbalanced_scheduler=False)
    rank._strategy = SimpleNamespace(
        hybrid_configs={"pp_configs": SimpleNamespace(forward_backward_overlap_scheduler=False)}
    )
    rank._layers = SimpleNamespace()
    rank._forward_micro_step_counter, rank._backward_micro_step_counter = Counter(), Counter()
    rank._get_virtual_pp_rank = lambda step, forward: kind._get_virtual_pp_rank(rank, step, forward)
    text = kind.forward_backward_pipeline(rank, None, None, static_scheduler=True)
    steps = [step.split("_vp") for step in text.strip(";").split(";")]
    return [(name[0].upper(), int(name[1:]), int(chunk[0]) if chunk else 0) for name, *chunk in steps]


@pytest.mark.parametrize(
    ("stages", "micros", "chunks"), [s for s in SHAPES if of_fleet(*s) is not PipelineSchedule.f_then_b]
)
def test_every_stage_takes_micro_batches_in_the_order_that_fleet_does(stages: int, micros: int, chunks: int) -> None:
    for stage in range(stages):
        steps = program(of_fleet(stages, micros, chunks), stage, stages, micros, chunks)
        ours = [(w.kind.value, w.micro, w.virtual // stages) for w in steps if isinstance(w, Work)]
        assert ours == fleet_says(stage, stages, micros, chunks)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_even_stages_wait_exactly_as_long_as_the_closed_form_says(shape: tuple[int, ...], blocking: bool) -> None:
    stages, micros, chunks = shape
    line = even(*shape, blocking=blocking)
    assert line.step == 3 * (chunks * micros + stages - 1)
    assert [line.idle(stage) for stage in range(stages)] == pytest.approx([bubble(*shape)] * stages, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_micro_batches_are_in_flight_as_the_formula_says(shape: tuple[int, ...]) -> None:
    stages, micros, chunks = shape
    schedule = of_fleet(*shape)
    assert even(*shape).in_flight == [in_flight(schedule, stage, stages, micros, chunks) for stage in range(stages)]
    if chunks == 1:
        assert even(*shape).in_flight == [min(stages - stage, micros) for stage in range(stages)]
    assert even(stages, micros, schedule=PipelineSchedule.f_then_b).in_flight == [micros] * stages


def test_two_uneven_stages_by_hand() -> None:
    line = simulate(Pipeline([1, 2], [2, 3], stages=2, micros=2))
    # stage 0: F0 0-1, F1 1-2, waits for the gradient of 0, B0 6-8, waits, B1 11-13. stage 1: F0 B0 F1 B1, 1 to 11.
    assert [(e.kind.value, e.micro, e.begin, e.end) for e in line.events[0]] == [
        ("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 6, 8), ("B", 1, 11, 13),
    ]  # fmt: skip
    assert [(e.begin, e.end) for e in line.events[1]] == [(1, 3), (3, 6), (6, 8), (8, 11)]
    assert (line.step, line.idle(0), line.idle(1)) == (13, 1 - 6 / 13, 1 - 10 / 13)


def test_a_message_delays_the_next_stage_and_if_it_blocks_its_sender_too() -> None:
    wanted = {"forward": [1, 1], "backward": [1, 1], "stages": 2, "micros": 2, "links": [5, 5]}
    free, blocked = simulate(Pipeline(**wanted)), simulate(Pipeline(**wanted, blocking=True))
    assert [e.begin for e in free.events[1]] == [6, 7, 11, 12]  # the second message waits for the first on the link
    assert [e.begin for e in free.events[0][:2]] == [0, 1]
    assert [e.begin for e in blocked.events[0][:2]] == [0, 6]  # F1 only when F0 has gone
    assert blocked.step > free.step


def test_gradients_are_added_up_after_the_last_backward_pass_or_during_it() -> None:
    after = even(2, 2, reduction=[4, 4], update=1)
    during = even(2, 2, reduction=[4, 4], update=1, overlapped=True)
    assert after.step == after.passes + 4 + 1
    assert during.step == after.passes + 2 + 1  # two of the four seconds are hidden by the last backward pass
    assert even(2, 2, reduction=[1, 1], overlapped=True).step == after.passes


def test_stages_that_share_a_core_take_as_long_as_all_work_one_after_the_other() -> None:
    alone = even(4, 8, cores=1)
    assert alone.step == pytest.approx(4 * 8 * 3)
    assert even(4, 8, cores=4).step == even(4, 8).step
    assert even(4, 8).step < even(4, 8, cores=2).step < alone.step


@st.composite
def pipelines(draw: Any) -> Pipeline:
    stages, chunks = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (5, 1), (3, 2), (4, 3)]))
    micros = stages * draw(st.integers(1, 3)) if chunks > 1 else draw(st.integers(1, 7))
    time = st.integers(1, 9)
    times = st.lists(time, min_size=stages * chunks, max_size=stages * chunks)
    links = st.lists(st.integers(0, 5), min_size=stages, max_size=stages)
    blocking = draw(st.booleans())
    return Pipeline(draw(times), draw(times), stages, micros, chunks, links=draw(links), blocking=blocking)


@settings(deadline=None, max_examples=150)
@given(pipelines())
def test_nothing_begins_before_what_it_needs_and_no_stage_does_two_things_at_once(pipeline: Pipeline) -> None:
    line = simulate(pipeline)
    end = {(e.kind, e.micro, e.chunk * pipeline.stages + e.stage): e.end for part in line.events for e in part}
    assert len(end) == 2 * pipeline.micros * pipeline.stages * pipeline.chunks
    for stage, events in enumerate(line.events):
        assert all(a.end <= b.begin for a, b in pairwise(events))
        for event in events:
            virtual = event.chunk * pipeline.stages + stage
            last = virtual == pipeline.stages * pipeline.chunks - 1
            if event.kind is Kind.backward:
                travel = 0 if last else pipeline.links[stage]
                needed = end[Kind.forward if last else Kind.backward, event.micro, virtual + (not last)]
                assert event.begin >= max(needed + travel, end[Kind.forward, event.micro, virtual])
            elif virtual:
                link = pipeline.links[(stage - 1) % pipeline.stages]
                assert event.begin >= end[Kind.forward, event.micro, virtual - 1] + link


@settings(deadline=None, max_examples=150)
@given(pipelines(), st.integers(0, 5))
def test_a_step_is_never_shorter_than_its_busiest_stage_and_a_slower_link_never_shortens_it(
    pipeline: Pipeline, slower: int
) -> None:
    line = simulate(pipeline)
    assert line.step >= max(map(line.busy, range(pipeline.stages)))
    assert line.step >= sum(pipeline.forward) + sum(pipeline.backward)
    links = [time + slower for time in pipeline.links]
    changed = {**vars(pipeline), "links": links}
    assert simulate(Pipeline(**changed)).step >= line.step
