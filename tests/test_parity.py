"""Every topology computes what one process computes: same seed, data and global batch, same losses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import harness
import pytest
from conftest import SMALL, configured

from gpt.config.derived import plain, world_size
from gpt.data import corpus

pytestmark = pytest.mark.slow

STEPS = 10
FEW = 4  # where the same job is asked something else
NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0")
# A global batch that every topology here can share out, clipping that bites, and a vocabulary that mp must pad.
SAME = ("trainer.global_batch_size=8", "trainer.micro_batch_size=2", "optimizer.clip_norm=0.3", "optimizer.lr=3e-3",
        "data.split=[18,1,1]")  # fmt: skip
DEEP = "model.layers=4"  # of pipelines, so that a stage has several layers


def job(text: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Resolved configuration, data, and the number of ranks."""
    config = configured([*SMALL, "data=text", f"data.path={text}", *SAME, *overrides])
    return plain(config), corpus.prepare(config).plain(), world_size(config)


def losses(text: Path, *overrides: str, steps: int = STEPS) -> dict[str, Any]:
    """What all ranks agree on: losses, norms, validation loss."""
    config, data, ranks = job(text, *overrides)
    first, *others = harness.run("ranks:train", ranks, config, data, steps)
    assert all(other == first for other in others)
    return dict(first)


@cache
def _single(text: Path, overrides: tuple[str, ...]) -> str:
    return json.dumps(losses(text, *overrides))


def single(text: Path, *overrides: str) -> dict[str, Any]:
    """The same of one process, computed once."""
    return dict(json.loads(_single(text, overrides)))


STAGE_2, STAGE_3 = "parallel.sharding_stage=2", "parallel.sharding_stage=3"
BY_POSITION = "parallel.sequence_parallel=true"
STATIC = "parallel.static=true"


@pytest.mark.parametrize(
    "layout",
    [
        ["dp2"], ["mp2"], ["pp2"], ["sharding2"], ["mp2_pp2"], ["dp2_mp2_pp2"], ["sharding2_mp2_pp2"],
        ["sharding2", STAGE_2], ["sharding2", STAGE_3], ["sharding2", STAGE_3, "model.recompute=full"],
        ["sharding2", STAGE_2, "parallel.dp_degree=2", "trainer.micro_batch_size=1"],
        ["sharding2", STAGE_3, "parallel.mp_degree=2"],
        ["mp2", BY_POSITION], ["mp2", BY_POSITION, "model.recompute=full"], ["mp2_pp2", BY_POSITION],
        ["auto_dp2_mp2"], ["auto_pp2"], ["auto_sharding2", STAGE_2, "model.recompute=full"],
        ["auto_sharding2", STATIC], ["auto_mp2", STATIC, "model.recompute=core_attn"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_losses_are_those_of_one_process(text: Path, layout: list[str]) -> None:
    base = (*NO_DROPOUT, DEEP) if "pp" in layout[0] else NO_DROPOUT
    expected = single(text, *base)
    got = losses(text, *base, f"parallel={layout[0]}", *layout[1:])
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert got["val"] == pytest.approx(expected["val"], rel=1e-5)


@pytest.mark.parametrize("layout", [["dp2"], ["sharding2", STAGE_2]], ids=" ".join)
def test_an_overflow_on_one_rank_leaves_out_the_step_on_all(text: Path, layout: list[str]) -> None:
    config, data, ranks = job(text, *NO_DROPOUT, f"parallel={layout[0]}", *layout[1:])
    expected = single(text, *NO_DROPOUT)["grad_norm"][0]
    for first, second, scale, same in harness.run("ranks:overflow", ranks, config, data):
        assert first == pytest.approx(expected, rel=1e-4)  # the scale is taken out again
        assert (second, scale, same) == (None, 2.0, True)


def test_virtual_stages_too(text: Path) -> None:
    overrides = (*NO_DROPOUT, "model.layers=8")
    interleaved = ("parallel=pp4", "parallel.virtual_pp_degree=2")
    got = losses(text, *overrides, *interleaved)["loss"]
    assert got == pytest.approx(single(text, *overrides)["loss"], rel=1e-5)


def test_how_deep_a_pipeline_is_changes_no_bit(text: Path) -> None:
    # The same operations on the same numbers, in another process.
    one, other = (losses(text, *NO_DROPOUT, DEEP, f"parallel={parallel}", steps=FEW) for parallel in ("pp2", "pp4"))
    assert one["loss"] == other["loss"]


def test_dropout_masks_of_data_parallel_are_those_of_one_process(text: Path) -> None:
    # A micro batch has the masks of its number in the global batch, whichever replica computes it.
    assert losses(text, "parallel=dp2")["loss"] == pytest.approx(single(text)["loss"], rel=1e-5)


def test_masks_differ_between_replicas_and_heads_and_agree_where_activations_are_replicated(text: Path) -> None:
    config, _, ranks = job(text, "parallel=dp2_mp2")
    (a0, own00, b0), (a1, own01, b1), (c0, own10, _), (c1, own11, _) = harness.run("ranks:masks", ranks, config)
    assert (a0, b0) == (a1, b1)
    assert c0 == c1
    assert len({a0, b0, c0, own00, own01, own10, own11}) == 7


@pytest.mark.parametrize("parallel", ["mp2", "pp2"])
def test_recomputing_draws_the_same_masks_again(text: Path, parallel: str) -> None:
    kept = losses(text, DEEP, f"parallel={parallel}", steps=FEW)
    for recompute in ("full", "core_attn"):
        again = losses(text, DEEP, f"parallel={parallel}", f"model.recompute={recompute}", steps=FEW)
        assert again["loss"] == pytest.approx(kept["loss"], rel=1e-5)
        assert again["grad_norm"] == pytest.approx(kept["grad_norm"], rel=1e-4)


def test_the_chunked_head_is_the_whole_one(text: Path) -> None:
    chunked = losses(text, *NO_DROPOUT, "parallel=mp2", "model.loss_chunk=7", steps=FEW)
    assert chunked["loss"] == pytest.approx(single(text, *NO_DROPOUT)["loss"][:FEW], rel=1e-5)


def goes_on(text: Path, folder: Path, base: tuple[str, ...], chain: list[list[str]], steps: int) -> list[float]:
    """Losses of a run that changes its topology every so many steps."""
    got: list[float] = []
    for parallel, *more in chain:
        config, data, ranks = job(text, *base, f"parallel={parallel}", *more)
        first = len(got) + 1
        each = harness.run("ranks:go_on", ranks, config, data, str(folder), first, first + steps - 1)
        assert all(one == each[0] for one in each)
        got += each[0]
    return got


def test_a_checkpoint_of_one_topology_goes_on_under_another(text: Path, tmp_path: Path) -> None:
    base = (*NO_DROPOUT, "model.layers=8")
    chain = [
        ["dp2_mp2_pp2"],
        ["sharding2_stage3"],
        ["pp4", "parallel.virtual_pp_degree=2"],
        ["single"],
        ["mp2", BY_POSITION],
    ]
    assert goes_on(text, tmp_path, base, chain, 2) == pytest.approx(single(text, *base)["loss"], rel=1e-5)


def test_a_checkpoint_of_one_engine_goes_on_under_the_other(text: Path, tmp_path: Path) -> None:
    chain = [["auto_mp2"], ["auto_pp2"], ["single"], ["auto_sharding2", STATIC], ["auto_sharding2"]]
    expected = single(text, *NO_DROPOUT)["loss"][:10]
    assert goes_on(text, tmp_path, NO_DROPOUT, chain, 2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("preset", ["mp2", "sharding2_stage3"])
def test_a_rank_reads_and_writes_its_share_and_all_pass_over_what_one_wrote_and_lost(
    text: Path, tmp_path: Path, preset: str
) -> None:
    config, data, _ = job(text, *NO_DROPOUT, f"parallel={preset}")
    harness.run("ranks:go_on", 2, config, data, str(tmp_path), 1, 1)
    harness.run("ranks:go_on", 2, config, data, str(tmp_path), 2, 2)
    whole = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "step_00000002").glob("*.safetensors"))
    file = tmp_path / "checkpoints" / "step_00000002" / "optimizer-00001-of-00002.safetensors"
    for step in (2, 1):
        shares = harness.run("ranks:share", 2, config, str(tmp_path))
        assert [share[0] for share in shares] == [step, step]
        assert all(read < 0.65 * whole and given < 0.65 * whole for _, read, given in shares), (shares, whole)
        assert sum(given for *_, given in shares) <= whole
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1  # the second rank's; only one rank reads it to check
        file.write_bytes(raw)


def test_a_rank_that_fails_ends_the_harness_with_its_words(text: Path) -> None:
    config, data, _ = job(text, "parallel=dp2")
    data["parts"] = []
    with pytest.raises(harness.RankFailedError, match="rank"):
        harness.run("ranks:train", 2, config, data, 1, timeout=60)
