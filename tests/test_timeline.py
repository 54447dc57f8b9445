"""A job's pipeline, simulated on a stated device and drawn on request."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import configured

from gpt.config.schema import Config
from gpt.plan.pipeline_schedule import bubble
from gpt.plan.pipeline_simulation import timeline
from gpt.plan.step_time import cost
from gpt.utils.errors import UserError

BIG = ["model=175b", "parallel=mp8_pp16", "data=tokens", "data.path=x", "task=plan"]
ON_A100 = ["device=a100_80", "precision=bf16"]


def test_the_simulation_and_the_sum_of_parts_say_the_same_time() -> None:
    for more in ([], ["parallel.virtual_pp_degree=2", "trainer.global_batch_size=128"]):
        config = configured([*BIG, *ON_A100, *more])
        line, said = timeline(config), cost(config)
        assert line is not None
        assert said is not None
        assert line.step == pytest.approx(said.seconds, rel=0.03)


def test_the_head_makes_the_last_stage_wait_least() -> None:
    line = timeline(configured([*BIG, *ON_A100]))
    assert line is not None
    idle = [line.idle(stage) for stage in range(16)]
    assert idle[15] == min(idle)
    assert max(idle) > bubble(16, 1536) + 0.02  # the closed form knows even stages only


def test_without_figures_of_a_device_there_is_no_timeline() -> None:
    assert timeline(configured(BIG)) is None


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["plan.picture=step.pdf", *ON_A100], "plan.picture=step.pdf: must end in .svg or .png"),
        (["plan.picture=nowhere/step.svg", *ON_A100], "plan.picture=nowhere/step.svg: there is no folder nowhere"),
        (["plan.picture=step.svg", "precision=bf16"], "device=auto does not state device.peak_tflops.bf16"),
        (["plan.picture=step.svg", "plan.search=true", *ON_A100], "leave plan.search=true away"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_anything_is_done(overrides: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        configured([*BIG, *overrides])


def test_a_plan_draws_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpt.tasks import plan
    from gpt.utils.console import Console

    config: Config = configured([*BIG, *ON_A100, "trainer.global_batch_size=32", f"plan.picture={tmp_path}/step.svg"])
    plan.show(config, Console(), [])
    assert "175b a100_80:  1F1B, 16 stages, 32 micro batches" in (tmp_path / "step.svg").read_text()
    assert "idle by stage" in capsys.readouterr().out


def test_a_grid_of_plans_says_that_it_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpt.tasks import plan
    from gpt.utils.console import Console

    config = configured([*BIG, *ON_A100, f"plan.picture={tmp_path}/step.svg"])
    plan.show_grid([(BIG, config)], Console())
    assert "nothing is drawn for several" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
