"""Layouts that are found, verdicts, and what the command prints of plans."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran, composed, configured
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import DATA, GIB, laid_out, on

from gpt.config.derived import global_batch_size, replace_in, world_size
from gpt.config.rules import check, rule_problems
from gpt.config.schema import Config, DType, Recompute
from gpt.plan import devices, explain, flops, memory, report, search, step_time
from gpt.tasks import plan
from gpt.utils.console import Console
from gpt.utils.errors import UserError

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def gpt_175b() -> Config:
    """The published layout on A100 80 GB."""
    return on(configured(["model=175b", "parallel=mp8_pp16", *DATA]), "a100_80")


@pytest.fixture(scope="module")
def gpt_1b() -> Config:
    return on(configured(["model=1.3b", "parallel=dp8", *DATA]), "v100_32", DType.fp16)


@pytest.fixture(scope="module")
def found(gpt_175b: Config) -> list[search.Candidate]:
    return search.search(gpt_175b, 128)


def test_layouts_are_legal_fit_and_are_sorted(found: list[search.Candidate]) -> None:
    assert len(found) > 100
    seconds = [candidate.seconds for candidate in found]
    assert seconds == sorted(seconds)
    for candidate in found[::29]:
        config = candidate.config
        assert rule_problems(config) == []
        assert world_size(config) == 128
        assert global_batch_size(config) == 1536
        assert candidate.bytes == max(need.total for need in memory.stages(config)) <= 78 * GIB
        assert candidate.cost == step_time.cost(config)
    assert {candidate.config.parallel.pp_degree for candidate in found} >= {4, 8, 16, 32}
    assert any(candidate.config.parallel.virtual_pp_degree > 1 for candidate in found)


def test_the_published_layout_fits_and_the_search_finds_one_as_fast(
    gpt_175b: Config, found: list[search.Candidate]
) -> None:
    assert search.fits_memory(gpt_175b)
    published = step_time.cost(gpt_175b)
    assert published is not None
    assert found[0].seconds <= published.seconds


def test_thousands_of_devices_are_searched(gpt_175b: Config) -> None:
    best = search.search(gpt_175b, 4096)[0]
    assert world_size(best.config) == 4096
    assert 1.5 < best.seconds < 5


def test_what_does_not_fit_says_by_how_much_and_what_would(gpt_1b: Config) -> None:
    alone = laid_out(gpt_1b)
    alone = replace_in(alone, {"model.recompute": Recompute.none})
    need = memory.memory(alone).total / GIB
    assert need > 30
    said = explain.check_fit(alone)
    assert said.fits is False
    assert f"does not fit: {need:.1f} GiB is {need - 30:.1f} GiB more than the 30.0 GiB of v100_32" in said.lines[0]
    assert said.lines[1] in ("would fit: trainer.micro_batch_size=4 trainer.global_batch_size=8",
                             "would fit: model.recompute=full")  # fmt: skip
    for keys in explain.nearest(alone):
        changed = on(configured(["model=1.3b", "model.recompute=none", *DATA, *keys]), "v100_32", DType.fp16)
        assert search.fits_memory(changed), keys
        assert global_batch_size(changed) == global_batch_size(alone)


def test_every_named_change_is_legal_and_fits() -> None:
    job = ["model=6.7b", "parallel=sharding16", "precision=fp16", "device=v100_16", *DATA]
    base = on(configured(job), "v100_16", DType.fp16)
    found = [explain.changes(base, candidate) for candidate in search.candidates(base, 16)]
    assert len(found) > 50
    for keys in found[::40]:
        changed = on(configured([*job, *keys]), "v100_16", DType.fp16)
        assert search.fits_memory(changed), keys
        assert (world_size(changed), global_batch_size(changed)) == (16, 128), keys


def test_where_no_layout_fits_more_devices_are_named(gpt_175b: Config) -> None:
    small = dataclasses.replace(laid_out(gpt_175b, mp=8), device=gpt_175b.device)
    said = explain.check_fit(small)
    assert said.fits is False
    # 174.6e9 parameters at 16 bytes are 81 GiB for each of 32.
    assert "no layout of 8 such devices fits; of 64 some do" in said.lines[1]
    assert search.search(small, 32) == []
    assert search.search(small, 64)


def test_a_plan_without_a_device_says_which_would_do() -> None:
    said = explain.check_fit(configured(["model=1.3b", *DATA]))
    assert said.fits is None
    assert said.lines[1].startswith("fits a100_40, a100_80")
    assert report.times(configured([]))[0][1].startswith("no device is stated")


def test_a_search_needs_times(gpt_1b: Config) -> None:
    with pytest.raises(UserError, match=r"peak_tflops\.fp32"):
        search.search(on(gpt_1b, "a100_40", DType.fp32), 8)


def test_the_printed_command_makes_the_layout(gpt_1b: Config) -> None:
    typed = ["model=1.3b", "parallel=dp8", "precision=fp16", "task=plan", "plan.search=true", *DATA]
    for candidate in search.search(gpt_1b, 8)[::61]:
        words = shlex.split(plan.command(typed, candidate))
        assert words[:3] == ["python", "-m", "gpt.main"]
        again = configured(words[3:])
        assert again.task.value == "pretrain"
        assert again.parallel == candidate.config.parallel
        assert (again.model, again.trainer) == (candidate.config.model, candidate.config.trainer)


@settings(max_examples=60, deadline=None)
@given(mp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4, 8]), sharding=st.sampled_from([1, 2, 4, 8]),
       more=st.sampled_from(["mp", "pp", "sharding"]))  # fmt: skip
def test_more_ranks_never_need_more_state(gpt_1b: Config, mp: int, pp: int, sharding: int, more: str) -> None:
    before = {"mp": mp, "pp": pp, "sharding": sharding}
    few, many = (laid_out(gpt_1b, **keys) for keys in (before, {**before, more: 2 * before[more]}))
    state = [max(part.elements * 4 + part.owned * 12 for part in flops.stage_parameters(job)) for job in (few, many)]
    # An owner has whole tensors: the largest, the word table, can be more than an even share.
    slack = 12 * 50432 * 2048 if more == "sharding" or sharding > 1 else 0
    assert state[1] <= state[0] + slack


@settings(max_examples=60, deadline=None)
@given(micro=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]), mp=st.sampled_from([1, 2]),
       how=st.sampled_from(list(Recompute)))  # fmt: skip
def test_memory_grows_with_the_micro_batch_and_shrinks_with_recomputation(
    gpt_1b: Config, micro: int, pp: int, mp: int, how: Recompute
) -> None:
    def need(size: int, recompute: Recompute) -> memory.Memory:
        config = laid_out(gpt_1b, mp=mp, pp=pp)
        batch = {"trainer.micro_batch_size": size, "trainer.global_batch_size": 64}
        return memory.memory(replace_in(config, {**batch, "model.recompute": recompute}))

    assert need(micro, how).total <= need(2 * micro, how).total
    assert need(micro, how).activations <= need(micro, Recompute.none).activations
    assert need(micro, Recompute.full).total <= need(micro, how).total


@settings(max_examples=30, deadline=None)
@given(key=st.sampled_from(["bandwidth_gb_s", "intra_node_gb_s", "inter_node_gb_s", "efficiency"]))
def test_a_better_device_is_never_slower(gpt_175b: Config, key: str) -> None:
    faster = dataclasses.replace(gpt_175b.device, **{key: 1.3 * getattr(gpt_175b.device, key)})
    now, then = step_time.cost(gpt_175b), step_time.cost(dataclasses.replace(gpt_175b, device=faster))
    assert now is not None
    assert then is not None
    assert then.seconds < now.seconds


BAD = {
    "top": (["plan.top=0"], "plan.top=0: must be at least 1"),
    "budget": (["plan.token_budget=0"], "plan.token_budget=0: must be at least 1"),
    "reserve": (["plan.reserve_gib=-1"], "plan.reserve_gib=-1.0: must be at least 0"),
    "all kept": (["task=plan", "device=a100_40", "plan.reserve_gib=40"], "leaves nothing of device.memory_gib=40"),
    "devices": (
        ["task=plan", "plan.devices=8"],
        "parallel=auto (the layout at hand has 1 ranks)",
    ),
    "fit": (["task=plan", "plan.require_fit=true"], "needs device.memory_gib: choose a device"),
    "search": (["task=plan", "plan.search=true"], "device=auto does not state device.memory_gib"),
    "peak": (["task=plan", "plan.search=true", "device=v100_32", "precision=bf16"], "device.peak_tflops.bf16"),
    "efficiency": (["device.efficiency=1.5"], "device.efficiency=1.5: a share of what is stated"),
    "memory": (["device.memory_gib=0"], "device.memory_gib=0.0: must be more than 0"),
    "tflops": (["device.peak_tflops.bf16=-1"], "device.peak_tflops.bf16=-1.0: must be more than 0"),
    "price": (["device.price_per_hour=-2"], "device.price_per_hour=-2.0: must be at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_of_plan_and_device_are_named(case: str) -> None:
    overrides, expected = BAD[case]
    _, problems = check(*composed(overrides))
    assert any(expected in problem for problem in problems), problems


def test_this_host_is_a_device_once_it_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT_CACHE", str(tmp_path))
    assert "python scripts/calibrate.py" in report.times(configured(["device=cpu"]))[0][1]
    _, problems = check(*composed(["task=plan", "device=cpu", "plan.search=true"]))
    assert "python scripts/calibrate.py" in problems[0]
    figures = {"memory_gib": 16, "fp32_tflops": 0.1, "bandwidth_gb_s": 10, "link_gb_s": 1}
    (tmp_path / "device_cpu.json").write_text(json.dumps(figures))
    alone, two = (step_time.cost(configured(["device=cpu", f"parallel={name}"])) for name in ("single", "dp2"))
    assert alone is not None
    assert two is not None
    assert two.compute == pytest.approx(
        alone.compute, rel=0.05
    )  # half the batch each on half the cores; each updates all
    assert two.exposed > alone.exposed == 0
    (tmp_path / "device_cpu.json").write_text("{")
    assert step_time.cost(configured(["device=cpu"])) is None


def test_calibration_measures_and_keeps_what_a_plan_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from scripts import calibrate

    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "SIZE", 64)
    monkeypatch.setattr(calibrate, "ELEMENTS", 1 << 12)
    monkeypatch.setattr(calibrate, "run", lambda what, ranks: calibrate.compute() if ranks == 1 else {"link_gb_s": 2.0})
    monkeypatch.setattr("sys.argv", ["calibrate.py"])
    calibrate.main()
    assert all((devices.calibrated(key) or 0) > 0 for key in devices.CALIBRATION)
    assert devices.calibrated("link_gb_s") == 2.0
    assert step_time.cost(configured(["device=cpu"])) is not None


@pytest.mark.parametrize("width", [80, 160])
def test_a_plan_reads_well_in_a_terminal(
    width: int, gpt_175b: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    plan.show(gpt_175b, Console(), [])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    tables_, verdict_ = shown.split("verdict:")
    assert max(map(len, tables_.splitlines())) <= width
    (row,) = [line for line in tables_.splitlines() if "middle 7" in line]
    assert len(row.split()) == 9  # stage and number, and every figure on one line
    assert verdict_.startswith(" fits: ")


@pytest.mark.slow
def test_a_grid_of_plans_is_one_table(gpt: Run, tmp_path: Path) -> None:
    ran = gpt("-m", "task=plan", "model=345m,175b", "parallel=single,mp8_pp16", "device=a100_40", "precision=bf16",
              "plan.token_budget=300000000000")  # fmt: skip
    assert ran.code == 0, ran.text
    assert ran.out.count("== plan") == 1
    rows = [line.split() for line in ran.out.splitlines()[2:]]
    assert [row[0] for row in rows if row[0] in ("345m", "175b")] == ["345m", "175b", "175b"]
    assert "yes" in rows[0]
    assert "no" in rows[1]
    assert "not possible: model=345m parallel=mp8_pp16: model.layers=24 is not divisible" in ran.out
    assert list(tmp_path.iterdir()) == []
    refused = gpt("-m", "task=plan", "model=345m", "parallel=mp8_pp16,mp2", "parallel.pp_degree=7")
    assert refused.code == 2
    assert "model.layers=24 is not divisible" in refused.err


@pytest.mark.slow
def test_the_command_says_the_verdict_and_leaves_with_2_only_if_asked(gpt: Run, tmp_path: Path) -> None:
    job = ["task=plan", "model=175b", "parallel=mp8_pp16", "precision=bf16"]
    ran = gpt(*job, "device=a100_40", "plan.require_fit=true", "device.price_per_hour=2")
    assert ran.code == 0, ran.text
    for words in ("verdict: fits: 3", "device hours, ", "MWh", "MFU", "first 0 *", "between nodes"):
        assert words in ran.out, ran.out
    strict = gpt(*job, "device=v100_16", "plan.require_fit=true")
    assert strict.code == 2
    assert "plan.require_fit: does not fit: 3" in strict.err
    searched = gpt("task=plan", "model=1.3b", "plan.search=true", "plan.devices=8", "device=v100_32", "precision=fp16")
    assert "layouts of 8 devices fit" in searched.out
    assert "python -m gpt.main model=1.3b device=v100_32 precision=fp16 parallel=single" in searched.out
    assert list(tmp_path.iterdir()) == []
