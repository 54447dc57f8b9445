"""The plan beside what was measured, counted and published; all of it, with sources, is in docs/plan-validation.md."""

from __future__ import annotations

from typing import Any

import harness
import pytest
from conftest import ROOT, configured

from gpt.config.derived import plain
from gpt.plan import flops, memory
from gpt.plan.step_time import cost
from scripts.bench_plan import runs

DATA = ["data=tokens", "data.path=x"]


@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml")))
def test_parameters_and_flops_are_those_that_torch_counts(reference: Any, model: str) -> None:
    """By ``FlopCounterMode`` over Hugging Face's GPT-2 of the same shape, both ways (scripts/bench_plan.py)."""
    config = configured([f"model={model}", *DATA])
    assert [flops.parameters(config), flops.flops_per_token(config, causal=False)] == reference.count(model)


def test_steps_of_published_runs_of_large_models_are_predicted() -> None:
    large = [run for run in runs() if run.source in ("N2", "K")]  # whose layout is stated in full
    errors = {run.name: said.seconds / run.seconds - 1 for run in large if (said := cost(run.config))}
    assert len(errors) == len(large) == 14
    assert {name: error for name, error in errors.items() if abs(error) > 0.15} == {}


@pytest.mark.slow
def test_every_stage_of_a_pipeline_holds_the_bytes_that_the_plan_says() -> None:
    config = configured(
        ["parallel=pp2", "model.hidden=256", "model.layers=4", "data=tokens", "data.path=none", "data.seq_len=128",
         "trainer.micro_batch_size=2", "trainer.global_batch_size=8", "cluster.device=cpu"]
    )  # fmt: skip
    for need, found in zip(memory.stages(config), harness.run("ranks:allocated", 2, plain(config)), strict=True):
        assert need.between == pytest.approx(found["between"], rel=0.01)
        assert need.total == pytest.approx(found["peak"], rel=0.05)
