"""What a run needs, before it runs: figures that were worked out independently."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from conftest import ROOT, composed, configured
from omegaconf import OmegaConf

from gpt.config import rules
from gpt.config.derived import accumulate_steps, padded_vocab, replace_in, world_size
from gpt.config.parameters import parameter_shapes
from gpt.config.rules import rule_problems
from gpt.config.schema import Config, DType, Parallel, Recompute
from gpt.config.task_schemas import Attention
from gpt.plan import communication, devices, explain, flops, memory, report, step_time, summary
from gpt.plan.search import fits_memory
from gpt.utils import machine

DATA = ["data=tokens", "data.path=x"]
GIB = 2**30

# GiB of weights, gradients, master weights and moments at 16 bytes per parameter in bf16, on the fullest rank: from the
# parameter counts by hand (345m: 354,871,296 x 16 / 2^30 = 5.29).
STATE = {
    ("345m", "single", 1): 5.29,
    ("1.3b", "dp8", 1): 19.58,
    ("6.7b", "sharding16", 1): 29.44,
    ("6.7b", "sharding16", 2): 17.82,
    ("6.7b", "sharding16", 3): 6.20,
    ("175b", "mp8_pp16", 1): 21.59,
}


def laid_out(config: Config, **degrees: int | bool) -> Config:
    """The same job with other degrees, all others 1."""
    keys = {"dp": 1, "sharding": 1, "stage": 1, "mp": 1, "pp": 1, "virtual": 1, "sp": False, **degrees}
    return dataclasses.replace(config, parallel=Parallel(*keys.values()))  # type: ignore[arg-type]


def on(config: Config, device: str, dtype: DType = DType.bf16) -> Config:
    """The same job on a known device."""
    precision = dataclasses.replace(config.precision, dtype=dtype)
    cluster = dataclasses.replace(config.cluster, device=type(config.cluster.device).gpu)
    return dataclasses.replace(config, device=devices.table()[device], precision=precision, cluster=cluster)


@pytest.mark.parametrize(("model", "parallel", "stage"), STATE)
def test_state_per_rank(model: str, parallel: str, stage: int) -> None:
    config = configured([f"model={model}", f"parallel={parallel}", f"parallel.sharding_stage={stage}", *DATA])
    config = replace_in(config, {"precision.dtype": DType.bf16})
    assert memory.memory(config).state / GIB == pytest.approx(STATE[model, parallel, stage], rel=0.01)


def test_the_middle_stage_of_the_published_175b_layout_has_20_25_gib_of_state() -> None:
    config = on(configured(["model=175b", "parallel=mp8_pp16", *DATA]), "a100_80")
    assert memory.stages(config)[7].state / GIB == pytest.approx(20.25, abs=0.01)


def test_parameters_of_the_stages_add_up() -> None:
    config = configured(["model=6.7b", *DATA])
    total = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    assert total == flops.parameters(config) == 6_654_402_560
    (alone,) = flops.stage_parameters(config)
    assert alone.elements == total
    staged = flops.stage_parameters(laid_out(config, pp=4))
    assert sum(part.elements - part.tied for part in staged) == total
    split = flops.stage_parameters(laid_out(config, mp=2, pp=4))
    common = config.model.layers * 6 * 4096 + config.model.positions * 4096 + 2 * 4096  # what every mp rank has
    padding = (50432 - 50304) * 4096  # rows of the table, to a multiple of 128 x 2
    assert 2 * sum(part.elements - part.tied for part in split) == total + common + padding


def test_flops_per_token_against_a_count_of_all_products() -> None:
    config = configured(["model=345m", *DATA])
    m, s = config.model, config.data.seq_len
    matrices = sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if len(shape) == 2)
    weights = matrices - m.positions * m.hidden  # looked up, not multiplied; the word table is, as the head
    square = m.layers * 2 * (2 * s * m.hidden)  # q k' and the mix: a product of s x d and d x s per head, by row
    assert flops.flops_per_token(config) == 3 * (2 * weights + square / 2)
    assert flops.flops_per_token(config, causal=False) == 3 * (2 * weights + square)
    # By hand: 6 (24 x 12 x 1024^2 + 50304 x 1024) + 6 x 24 x 1024 x 1024.
    assert flops.flops_per_token(config) == 6 * (24 * 12 * 1024**2 + 50304 * 1024) + 6 * 24 * 1024 * 1024


def test_recomputation_counts_what_is_done_twice() -> None:
    config = configured(["model=345m", *DATA])
    m = config.model
    base = flops.flops_per_token(config)

    def executed(how: Recompute, exempt: list[int]) -> float:
        model = dataclasses.replace(m, recompute=how, no_recompute_layers=exempt)
        return flops.hardware_flops_per_token(dataclasses.replace(config, model=model)) - base

    assert executed(Recompute.none, []) == 0
    assert executed(Recompute.core_attn, []) == m.layers * 2 * m.hidden * config.data.seq_len
    assert executed(Recompute.full, []) == pytest.approx((base - 6 * 50304 * m.hidden) / 3)  # a third forward pass
    assert executed(Recompute.full, [0, 5]) == pytest.approx(executed(Recompute.full, []) * 22 / 24)


@pytest.mark.parametrize(
    ("micro_batches", "virtual", "bubble"), [(16, 1, 0.48), (64, 1, 0.19), (1536, 1, 0.01), (16, 6, 0.135)]
)
def test_the_pipeline_bubble(micro_batches: int, virtual: int, bubble: float) -> None:
    config = configured(["model=175b", "parallel=mp8_pp16", *DATA])
    config = replace_in(config, {"trainer.global_batch_size": micro_batches})
    config = replace_in(config, {"parallel.virtual_pp_degree": virtual})
    assert step_time.pipeline_bubble(config) == pytest.approx(bubble, abs=0.005)


def test_a_block_keeps_what_korthikanti_et_al_list() -> None:
    # Table 2: s b h (34 + 5 a s / h), over t mp ranks s b h (10 + 24 / t + 5 a s / h t), block input alone 2 s b h.
    config = on(configured(["model=345m", *DATA]), "v100_32", DType.fp16)
    h, ratio = 1024, 5 * 16 * 1024 / 1024
    assert memory.block(config, Recompute.none) == h * (34 + ratio)
    assert memory.block(config, Recompute.core_attn) == h * 34
    assert memory.block(config, Recompute.full) == h * 2
    split = laid_out(config, mp=8)
    assert memory.block(split, Recompute.none) == h * (10 + 24 / 8 + ratio / 8)
    flash = on(config, "a100_40")
    assert flash.device.attention is Attention.flash
    assert memory.block(flash, Recompute.none) == h * 34 + 4 * 16  # and a float32 sum per head and row


def test_micro_batches_in_flight() -> None:
    config = configured(["model=175b", "parallel=mp8_pp16", *DATA])
    assert [memory.in_flight(config, stage) for stage in (0, 1, 15)] == [16, 15, 1]
    config = replace_in(config, {"parallel.virtual_pp_degree": 3})
    # Chunks; in layers of a stage p (1 + (p - 1) / (p v)) on the first (Korthikanti et al., 2022, section 4.2.3).
    assert memory.in_flight(config, 0) / 3 == pytest.approx(16 * (1 + 15 / (16 * 3)), rel=0.01)
    config = replace_in(config, {"trainer.global_batch_size": 4})
    assert memory.in_flight(config, 0) == 4 * 3


def test_recompute_and_chunks_need_less() -> None:
    needs = [
        memory.memory(configured(["model=1.3b", f"model.recompute={how}", *DATA])).activations
        for how in ("none", "full_attn", "core_attn", "full")
    ]
    assert needs[0] > needs[1]
    assert needs[0] > needs[2] > needs[3]
    whole, chunked = (memory.memory(configured(["model=1.3b", f"model.loss_chunk={n}", *DATA])) for n in (0, 1024))
    assert chunked.logits < whole.logits


def test_an_offloaded_optimizer_takes_no_memory_of_the_device() -> None:
    here, away = (memory.memory(configured(["optimizer.offload=" + str(value).lower()])) for value in (False, True))
    assert (away.weights, away.gradients) == (here.weights, here.gradients)
    assert (here.optimizer > 0, away.optimizer, away.host > here.optimizer) == (True, 0, True)


def test_traffic_by_hand() -> None:
    config = on(configured(["model=345m", "trainer.micro_batch_size=8", *DATA]), "a100_80")
    elements, tokens, h = 354_871_296, 8 * 1024, 1024

    def sent(**degrees: int | bool) -> dict[str, float]:
        return {one.axis: one.sent for one in communication.traffic(laid_out(config, **degrees))}

    assert sent() == {}
    assert sent(dp=8) == {"dp": 2 * 7 / 8 * elements * 2}
    # ZeRO: gradients to their owners and parameters back are as much as one sum of all gradients; here gradients are
    # summed on all first (stage 1), or come per micro batch (stage 2), of which there is one.
    assert sent(sharding=4, stage=2)["sharding"] == pytest.approx(2 * 3 / 4 * elements * 2)
    assert sent(sharding=4, stage=1)["sharding"] == pytest.approx(3 * 3 / 4 * elements * 2)
    assert sent(sharding=4, stage=3)["sharding"] == pytest.approx(3 * 3 / 4 * elements * 2)
    # Two sums each way per block, a ring of 2 (n - 1) / n; and one for the embedding or the head.
    assert sent(mp=4)["mp"] == pytest.approx((24 * 4 + 1) * 2 * 3 / 4 * tokens * h * 2)
    assert sent(mp=4, sp=True)["mp"] == sent(mp=4)["mp"]
    table = padded_vocab(config) * h * 2
    assert sent(pp=4)["pp"] == 2 * tokens * h * 2 + table


def test_an_axis_that_leaves_the_node_uses_its_ports() -> None:
    config = on(configured(["model=345m", *DATA]), "a100_80")
    inside, between = 0.8 * 300e9, 0.8 * 25e9
    assert communication.link(laid_out(config, mp=8), "mp") == (inside, False)
    assert communication.link(laid_out(config, mp=16), "mp") == (8 * between, True)
    assert communication.link(laid_out(config, mp=8, pp=2), "pp") == (between, True)
    assert communication.link(laid_out(config, mp=2, dp=8), "dp") == (4 * between, True)
    assert communication.link(laid_out(config, mp=2, dp=4), "dp") == (inside, False)


def test_a_published_step_is_predicted_within_a_tenth() -> None:
    # Korthikanti et al. 2022, table 5: GPT 175B, 64 A100 80 GB, tensor 8, pipeline 8, 3 chunks, batch 64, micro batch
    # 1, sequence parallel and selective recomputation: 13.75 s, before FlashAttention.
    shape = ["model=175b", "model.positions=2048", "trainer.global_batch_size=64", "trainer.micro_batch_size=1"]
    config = laid_out(on(configured([*shape, *DATA]), "a100_80"), mp=8, pp=8, virtual=3, sp=True)
    config = replace_in(config, {"device.attention": Attention.matrix})
    found = step_time.cost(config)
    assert found is not None
    assert found.seconds == pytest.approx(13.75, rel=0.1)
    assert explain.check_fit(config).fits
    assert sum((found.compute, found.exposed, found.bubble)) == pytest.approx(found.seconds)


def test_the_bubble_of_even_stages_is_the_closed_form() -> None:
    shape = ["model=175b", "model.vocab=128", "model.positions=2048", "model.dropout=0", *DATA]
    config = laid_out(on(configured(shape), "a100_80"), mp=1, pp=16)
    for micros, virtual in ((16, 1), (64, 1), (64, 6)):
        config = replace_in(config, {"trainer.global_batch_size": micros})
        config = replace_in(config, {"parallel.virtual_pp_degree": virtual})
        found, times = step_time.cost(config), step_time.stage_times(config)
        assert found is not None
        assert times is not None
        passes = micros * (sum(times.forward) + sum(times.backward)) / 16
        assert found.bubble / (found.bubble + passes) == pytest.approx(step_time.pipeline_bubble(config), rel=0.02)
        assert len(times.forward) == len(times.backward) == 16 * virtual


def options(group: str) -> list[str]:
    return sorted(p.stem for p in Path(ROOT / "conf" / group).glob("*.yaml"))


def test_every_model_on_every_layout_is_planned_and_its_figures_agree() -> None:
    models = {name: configured([f"model={name}", *DATA]) for name in options("model")}
    files = [ROOT / "conf" / "parallel" / f"{name}.yaml" for name in options("parallel") if name != "auto"]
    layouts = [Parallel(**OmegaConf.load(file)) for file in files]  # type: ignore[arg-type]
    planned = 0
    for config in models.values():
        for parallel in layouts:
            job = on(dataclasses.replace(config, parallel=dataclasses.replace(parallel)), "a100_80")
            if rule_problems(job):
                continue
            planned += 1
            needs, parts = memory.stages(job), flops.stage_parameters(job)
            assert len(needs) == len(parts) == parallel.pp_degree
            assert memory.memory(job).total == max(need.total for need in needs)
            assert all(need.total >= need.state - need.gradients + need.activations for need in needs)
            assert sum(part.elements - part.tied for part in parts) * parallel.mp_degree >= flops.parameters(job)
            found = step_time.cost(job)
            assert found is not None
            assert found.compute + found.exposed + found.bubble == pytest.approx(found.seconds)
            assert 0 < found.mfu <= found.hfu < job.device.efficiency
            assert (not communication.traffic(job)) == (world_size(job) == 1)
            assert report.memory_table(job).rows
            assert fits_memory(job) is (memory.memory(job).total <= 78 * GIB)
    assert planned > len(models) * len(layouts) * 3 // 4


@pytest.mark.parametrize("name", [name for name in options("device") if name not in ("auto", "cpu")])
def test_a_device_states_what_a_plan_needs_and_where_it_is_from(name: str) -> None:
    config, _ = composed([f"device={name}"])
    assert config.device.name == name
    spec = devices.table()[name]
    assert spec.memory_gib == config.device.memory_gib
    assert (spec.bandwidth_share, spec.per_node) == (config.device.bandwidth_share, config.device.per_node)
    assert spec.match
    for part in spec.match:
        found = devices.called(f"NVIDIA {part}")
        assert found is not None
        assert found.name == name
    assert "data sheet" in (ROOT / "conf" / "device" / f"{name}.yaml").read_text() or name in ("a800", "h800")
    assert None not in (spec.bandwidth_gb_s, spec.intra_node_gb_s, spec.inter_node_gb_s, spec.watts)


def test_an_unknown_device_has_no_peak_and_so_no_mfu() -> None:
    assert devices.peak_flops("NVIDIA A100-SXM4-80GB", DType.bf16) == 312e12
    assert devices.peak_flops("NVIDIA A100-SXM4-80GB", DType.fp32) is None
    assert devices.peak_flops("AMD EPYC", DType.bf16) is None


def test_mfu_is_counted_with_the_device_that_runs() -> None:
    planned = configured(["device=a100_80"])
    assert devices.peak_here(planned, "CPU") is None  # a run on a CPU that was planned for another device
    chosen, known = on(planned, "h100"), on(planned, "h100")
    known = replace_in(known, {"device": configured([]).device})
    assert devices.peak_here(chosen, "Something new") == 989e12
    assert devices.peak_here(known, "NVIDIA A100-PCIE-40GB") == 312e12
    assert devices.peak_here(known, "Something new") is None


def test_the_gpu_of_this_host_is_known_without_paddle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "GPU_FOLDER", tmp_path)
    assert machine.gpu_name() == ""
    (tmp_path / "0000:07:00.0").mkdir()
    (tmp_path / "0000:07:00.0" / "information").write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ: 1\n")
    found = devices.called(machine.gpu_name())
    assert found is not None
    assert found.name == "a100_80"


def test_no_time_is_said_where_the_optimizer_is_on_the_host() -> None:
    config = on(configured(["optimizer.offload=true", *DATA]), "a100_80")
    assert step_time.cost(config) is None
    assert rules.missing_device_keys(config) == ["the speed of its host, where the optimizer is"]


def test_device_and_plan_do_not_name_a_run() -> None:
    from gpt.config.derived import plain
    from gpt.runs.run_dir import run_name

    values = [plain(configured(more)) for more in ([], ["device=h100", "plan.top=3"])]
    older = {key: value for key, value in values[0].items() if key not in ("device", "plan")}
    assert len({run_name(config, "single") for config in (*values, older)}) == 1


def test_accumulation_is_what_the_plan_says() -> None:
    config = configured(["model=175b", "parallel=mp8_pp16", *DATA])
    assert dict(summary.summary(config))["batch"].startswith("1,536 samples = 1,572,864 tokens a step, 1536 micro")
    assert accumulate_steps(config) == 1536


def test_the_page_has_the_tables_of_the_planner() -> None:
    from scripts import plan_tables

    page = plan_tables.PAGE.read_text(encoding="utf-8")
    assert plan_tables.known_devices() in page
    assert plan_tables.predecessor() in page
