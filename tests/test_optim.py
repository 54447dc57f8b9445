"""The learning rate is a function of the step; decay spares biases and norms; the norm and the clip are exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import paddle
import pytest
from conftest import SMALL, configured

from gpt.config import parameters as parameter_table
from gpt.config.cluster import Device
from gpt.config.schema import LRSchedule, Optimizer, ScheduleName
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.train import grad_norm, lr_scheduler
from gpt.train import optimizer as optimizers
from gpt.utils.signals import GuardError

PUBLISHED = LRSchedule(ScheduleName.cosine, warmup_steps=3600, decay_steps=360_000, min_lr=1e-5)


def test_the_published_schedule() -> None:
    # The predecessor's documents log 2.77778e-8 for t = 2 and 1.52778e-7 for t = 11; the first update uses t = 1.
    assert lr_scheduler.lr_at(1, 5e-5, PUBLISHED) == pytest.approx(5e-5 / 3600)
    assert lr_scheduler.lr_at(2, 5e-5, PUBLISHED) == pytest.approx(2.77778e-8, rel=1e-5)
    assert lr_scheduler.lr_at(11, 5e-5, PUBLISHED) == pytest.approx(1.52778e-7, rel=1e-5)
    assert lr_scheduler.lr_at(3600, 5e-5, PUBLISHED) == 5e-5
    assert lr_scheduler.lr_at((3600 + 360_000) // 2, 5e-5, PUBLISHED) == pytest.approx(3e-5)  # half-way down
    assert lr_scheduler.lr_at(360_000, 5e-5, PUBLISHED) == pytest.approx(1e-5)
    assert lr_scheduler.lr_at(360_001, 5e-5, PUBLISHED) == 1e-5


@pytest.mark.parametrize("name", list(ScheduleName))
@pytest.mark.parametrize(("warmup", "decay"), [(0, 1), (0, 10), (10, 10), (3, 10)])
def test_every_schedule_stays_between_zero_and_its_peak(name: ScheduleName, warmup: int, decay: int) -> None:
    schedule = LRSchedule(name, warmup, decay, min_lr=0.1)
    rates = [lr_scheduler.lr_at(step, 1.0, schedule) for step in range(1, 15)]
    assert all(0 < rate <= 1 for rate in rates)
    assert all(a <= b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[max(warmup, 1) :]))


def test_biases_and_layer_norms_are_not_decayed() -> None:
    config = configured([*SMALL, "data=tokens", "data.path=x"])
    names = GPT(config, Topology(config.parallel, Device.cpu)).logical_parameters()
    assert {n for n in names if parameter_table.parameter(n).weight_decay} == {
        "word.weight",
        "position.weight",
        *(f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("attention.qkv", "attention.out", "fc1", "fc2")),
    }


def test_an_update_is_adamw() -> None:
    settings = Optimizer(lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.5, clip_norm=1.0)
    start = np.array([1.0, -2.0, 3.0], np.float32)
    parameters = {}
    for name in ("position.weight", "norm.bias"):
        parameters[name] = paddle.create_parameter([3], "float32")
        parameters[name].set_value(start)
    optimizer = optimizers.build(parameters, settings, master_weights=False)
    m = v = np.zeros(3)
    expected = {name: start.astype(np.float64) for name in parameters}
    for step in (1, 2, 3):
        gradient = np.array([0.5, -1.0, 0.1]) * step
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        for name, p in parameters.items():
            (p * paddle.to_tensor(gradient.astype(np.float32))).sum().backward()
            decayed = expected[name] * (1 - 0.1 * 0.5) if name == "position.weight" else expected[name]
            expected[name] = decayed - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        optimizer.step()
        optimizer.clear_grad()
    for name, p in parameters.items():
        np.testing.assert_allclose(p.numpy(), expected[name], rtol=1e-5)


def test_clipping_scales_all_gradients_to_the_limit() -> None:
    parameters = [paddle.create_parameter([4, 5], "float32"), paddle.create_parameter([7], "float32")]
    gradients = [np.random.default_rng(i).standard_normal(p.shape).astype(np.float32) for i, p in enumerate(parameters)]
    for p, g in zip(parameters, gradients, strict=True):
        (p * paddle.to_tensor(g)).sum().backward()
    norm = grad_norm.global_norm(parameters)
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-6)
    large = paddle.create_parameter([1 << 20], "float32")
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    (large * paddle.to_tensor(values)).sum().backward()
    assert grad_norm.global_norm([large]) == pytest.approx(np.sqrt((values.astype(np.float64) ** 2).sum()), rel=1e-7)
    grad_norm.clip(parameters, norm, 100.0)
    assert grad_norm.global_norm(parameters) == pytest.approx(norm)
    grad_norm.clip(parameters, norm, 0.0)
    assert grad_norm.global_norm(parameters) == pytest.approx(norm)
    grad_norm.clip(parameters, norm, 0.5)
    assert grad_norm.global_norm(parameters) == pytest.approx(0.5, rel=1e-5)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_enough_good_steps() -> None:
    scale = optimizers.DynamicLossScaler()
    scale.after_step(finite=False)
    assert scale.value == 16384
    for _ in range(optimizers.DynamicLossScaler.GOOD_STEPS - 1):
        scale.after_step(finite=True)
    assert scale.value == 16384
    scale.after_step(finite=True)
    assert (scale.value, scale.good_steps) == (32768, 0)


def test_gradients_that_overflow_at_every_scale_stop_the_run() -> None:
    scale = optimizers.DynamicLossScaler(value=optimizers.DynamicLossScaler.LEAST)
    with pytest.raises(GuardError, match="precision=bf16"):
        scale.after_step(finite=False)
