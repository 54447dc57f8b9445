"""The pipeline's picture: what can be read in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gpt.plan.pipeline_plot import BACKWARD, FORWARD, draw
from gpt.plan.pipeline_simulation import Pipeline, Timeline, simulate


def step(stages: int, micros: int, chunks: int = 1, **more: Any) -> Timeline:
    virtuals = stages * chunks
    return simulate(Pipeline([0.01] * virtuals, [0.02] * virtuals, stages, micros, chunks, **more))


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_each_stage_has_a_row_its_micro_batches_and_the_share_it_waits(tmp_path: Path) -> None:
    words = texts(draw(step(4, 8), tmp_path / "step.svg", "tiny"))
    assert [f"stage {stage}" for stage in range(4)] == [word for word in words if word.startswith("stage")]
    assert words.count("27.3% idle") == 4
    assert words.count("7") == 2 * 4
    assert "tiny  1F1B, 4 stages, 8 micro batches: step 330 ms, idle 27.3% of 330 ms of passes" in words


def test_what_follows_the_passes_and_chunks_are_told_apart(tmp_path: Path) -> None:
    plain = draw(step(4, 8), tmp_path / "plain.svg").read_text()
    more = draw(step(4, 8, 2, reduction=[0.02] * 4, update=0.01), tmp_path / "more.svg")
    assert {"forward, chunk 1", "backward, chunk 0", "gradients over replicas", "update"} <= set(texts(more))
    assert FORWARD.lower() in plain
    assert BACKWARD.lower() in plain
    colours = set(re.findall(r"fill: (#[0-9a-f]{6})", more.read_text()))
    assert len(colours - set(re.findall(r"fill: (#[0-9a-f]{6})", plain))) >= 4


def test_a_long_step_shows_its_ends_in_a_small_file(tmp_path: Path) -> None:
    words = texts(draw(step(16, 1536), tmp_path / "long.svg"))
    assert (tmp_path / "long.svg").stat().st_size < 400_000
    assert words.count("stage 15") == 1
    assert not {"700", "1535"} & set(words)  # numbers would not fit
    times = [float(word) for word in words if re.fullmatch(r"\d+\.\d+", word)]
    assert min(times) == 0
    assert max(times) > 46
    assert not [time for time in times if 5 < time < 40]


def test_the_same_step_gives_the_same_file(tmp_path: Path) -> None:
    one, other = (draw(step(3, 6, 2), tmp_path / name).read_bytes() for name in ("one.svg", "other.svg"))
    assert one == other
    assert draw(step(1, 2), tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
