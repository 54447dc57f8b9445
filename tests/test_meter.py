"""Figures of a step: what is said of all ranks, of a device, of a replica."""

from __future__ import annotations

import pytest
from conftest import configured

from gpt.train.metrics import Meter
from gpt.train.trainer import StepResult
from gpt.utils import launch_env


def test_several_ranks_say_tokens_per_second_of_all_of_a_device_and_of_a_replica(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(launch_env.VARIABLE, raising=False)
    meter = Meter(configured(["parallel=dp2_mp2_pp2"]))
    rates = meter.rates(2.0)
    assert rates["tokens_per_second"] == meter.tokens_per_step / 2
    assert rates["tokens_per_second_per_device"] == meter.tokens_per_step / 2 / 8
    assert rates["tokens_per_second_per_replica"] == meter.tokens_per_step / 2 / 2
    meter.start()
    record = meter.record(1, StepResult(1.0, 1.0, 1e-3, None))
    assert record["tokens_per_second"] == pytest.approx(8 * record["tokens_per_second_per_device"])
    meter.show(record)
    device, replica = (f"{record[f'tokens_per_second_per_{of}']:,.0f}" for of in ("device", "replica"))
    assert f"({device} per device, {replica} per replica)" in capsys.readouterr().out


def test_one_rank_says_one_figure() -> None:
    assert list(Meter(configured([])).rates(1.0)) == ["tokens_per_second"]
