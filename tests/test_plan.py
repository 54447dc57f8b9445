"""What a run needs, before it runs: figures that were worked out independently."""

from __future__ import annotations

import pytest
from conftest import configured

from gpt import plan
from gpt.config import DType

DATA = ["data=tokens", "data.path=x"]


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


@pytest.mark.parametrize(("model", "parallel", "stage"), STATE)
def test_state_per_rank(model: str, parallel: str, stage: int) -> None:
    config = configured([f"model={model}", f"parallel={parallel}", f"parallel.sharding_stage={stage}", *DATA])
    config.precision.dtype = DType.bf16
    need = plan.memory(config)
    state = (need.weights + need.gradients + need.optimizer) / 2**30
    assert state == pytest.approx(STATE[model, parallel, stage], rel=0.01)  # of 16 ranks, the fullest


def test_flops_per_token_by_hand() -> None:
    # 345m at 1024: 6 (24 x 12 x 1024^2 + 50304 x 1024) + 6 x 24 x 1024 x 1024.
    config = configured(["model=345m", *DATA])
    assert plan.flops_per_token(config) == 6 * (24 * 12 * 1024**2 + 50304 * 1024) + 6 * 24 * 1024 * 1024


@pytest.mark.parametrize(
    ("micro_batches", "virtual", "bubble"), [(16, 1, 0.48), (64, 1, 0.19), (1536, 1, 0.01), (16, 6, 0.135)]
)
def test_the_pipeline_bubble(micro_batches: int, virtual: int, bubble: float) -> None:
    config = configured(["model=175b", "parallel=mp8_pp16", *DATA])
    config.trainer.global_batch_size = micro_batches
    config.parallel.virtual_pp_degree = virtual
    assert plan.pipeline_bubble(config) == pytest.approx(bubble, abs=0.005)


def test_recompute_and_chunks_need_less() -> None:
    needs = [
        plan.memory(configured(["model=1.3b", f"model.recompute={how}", *DATA])).activations
        for how in ("none", "full_attn", "core_attn", "full")
    ]
    assert needs[0] > needs[1]
    assert needs[0] > needs[2] > needs[3]
    whole, chunked = (plan.memory(configured(["model=1.3b", f"model.loss_chunk={n}", *DATA])) for n in (0, 1024))
    assert chunked.logits < whole.logits


def test_an_unknown_device_has_no_peak_and_so_no_mfu() -> None:
    assert plan.peak_flops("NVIDIA A100-SXM4-80GB", DType.bf16) == 312e12
    assert plan.peak_flops("NVIDIA A100-SXM4-80GB", DType.fp32) is None
    assert plan.peak_flops("AMD EPYC", DType.bf16) is None


def test_an_offloaded_optimizer_takes_no_memory_of_the_device() -> None:
    here, away = (plan.memory(configured(["optimizer.offload=" + str(value).lower()])) for value in (False, True))
    assert (away.weights, away.gradients) == (here.weights, here.gradients)
    assert (here.optimizer > 0, away.optimizer) == (True, 0)
