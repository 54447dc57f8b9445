"""A step is a function of seed, number and state: resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import configured

from gpt.config.cluster import Device
from gpt.config.task_schemas import Split
from gpt.data import corpus
from gpt.data.dataset import TokenDataset
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint.reshard import ShardRange, TensorShards
from gpt.train.trainer import Trainer
from gpt.utils import signals
from gpt.utils.signals import GuardError


class Kept:
    """What one rank gave to a checkpoint, in memory."""

    def __init__(self, pieces: TensorShards) -> None:
        self.pieces = pieces
        self.shapes = {name: piece.shape for name, piece in pieces.items()}

    def read(self, name: str, where: ShardRange) -> np.ndarray:
        return self.pieces[name].array[tuple(slice(*ends) for ends in where.box(self.shapes[name]))]


def make(small: list[str], *overrides: str) -> tuple[Trainer, TokenDataset]:
    config = configured([*small, *overrides])
    engine = Trainer(config, Topology(config.parallel, Device.cpu))
    return engine, TokenDataset(config, corpus.prepare(config), Split.train)


def weights(engine: Trainer) -> dict[str, np.ndarray]:
    return {name: p.numpy() for name, p in engine.parameters.items()}


def test_ten_steps_and_ten_more_after_a_reload_are_twenty_steps(small: list[str]) -> None:
    engine, samples = make(small)
    whole = [engine.step(n, samples) for n in range(1, 21)]
    expected = weights(engine)

    first, samples = make(small)
    losses = [first.step(n, samples) for n in range(1, 11)]
    model, slots, rest = first.state()
    second, samples = make(small, "trainer.max_steps=99")
    second.load(Kept(model), Kept(slots), rest)
    losses += [second.step(n, samples) for n in range(11, 21)]

    assert losses == whole
    for name, value in weights(second).items():
        assert (value == expected[name]).all(), name


def test_a_reload_with_other_optimizer_state_is_something_else(small: list[str]) -> None:
    # The test above can fail: any part of the state that is off shows.
    engine, samples = make(small)
    for n in range(1, 6):
        engine.step(n, samples)
    model, slots, rest = engine.state()
    after = engine.step(6, samples), engine.step(7, samples)
    for missing in ("moment1", "moment2", "beta1_pow"):
        other, _ = make(small)
        half = {k: replace(v, array=v.array * 0.5) if missing in k else v for k, v in slots.items()}
        other.load(Kept(model), Kept(half), rest)
        assert (other.step(6, samples), other.step(7, samples)) != after


def test_the_optimizer_state_is_named_by_parameter(small: list[str]) -> None:
    engine, samples = make(small)
    engine.step(1, samples)
    _, slots, _ = engine.state()
    assert len(slots) == 4 * len(engine.parameters)
    assert {key.rsplit(".", 1)[0] for key in slots} == set(engine.parameters)
    assert slots["layers.1.fc1.weight.moment1_0"].array.shape == (32, 128)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(small: list[str], micro: int) -> None:
    off = ["model.dropout=0", "model.attention_dropout=0"]
    whole, samples = make(small, *off, "trainer.micro_batch_size=8")
    parts, _ = make(small, *off, f"trainer.micro_batch_size={micro}")
    for n in range(1, 6):
        one, other = whole.step(n, samples), parts.step(n, samples)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_the_loss_falls(small: list[str]) -> None:
    engine, samples = make(small, "data.overfit=true", "optimizer.lr=1e-2", "model.dropout=0")
    losses = [engine.step(n, samples).loss for n in range(1, 41)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(small: list[str], poison: float) -> None:
    engine, samples = make(small)
    engine.step(1, samples)
    word = engine.parameters["word.weight"]
    values = word.numpy()
    values[:, 0] = poison
    word.set_value(values)
    before = weights(engine)
    with pytest.raises(GuardError, match=r"at step 2; the weights were not touched"):
        engine.step(2, samples)
    for name, value in weights(engine).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_gradient_that_is_no_number_stops_too() -> None:
    with pytest.raises(GuardError, match=r"the gradient norm is inf at step 7"):
        signals.require_finite(7, 1.0, float("inf"))
    signals.require_finite(7, 1.0, None)


def test_evaluation_is_the_mean_over_all_tokens_and_changes_nothing(small: list[str]) -> None:
    engine, _ = make(small, "data.split=[1,1,1]")
    before = weights(engine)
    val = TokenDataset(engine.config, corpus.prepare(engine.config), Split.val, shuffled=False)
    count = len(val)
    assert count % 4  # a last micro batch that is smaller
    loss = engine.evaluate(val, 10**6)
    total = counted = 0.0
    for i in range(count):
        batch = val.batch(i, 1)
        n = float(batch.mask_BT.sum())
        import paddle

        arrays = [paddle.to_tensor(a) for a in (batch.inputs_BT, batch.labels_BT, batch.mask_BT)]
        total += engine.model.loss(*arrays, n).item() * n
        counted += n
    assert loss == pytest.approx(total / counted, rel=1e-5)
    assert engine.evaluate(val, 10**6) == loss
    for name, value in weights(engine).items():
        assert (value == before[name]).all()


def test_a_checkpoint_of_another_model_is_refused(small: list[str]) -> None:
    engine, _ = make(small)
    model, slots, rest = engine.state()
    other, _ = make(small, "model.hidden=16")
    with pytest.raises(ValueError, match=r"word.weight has shape \[384, 32\] there and \[384, 16\] here"):
        other.load(Kept(model), Kept(slots), rest)
    deeper, _ = make(small, "model.layers=3")
    with pytest.raises(ValueError, match="another model"):
        deeper.load(Kept(model), Kept(slots), rest)


def test_an_offloaded_optimizer_makes_the_same_steps_and_checkpoints(small: list[str]) -> None:
    plain, samples = make(small)
    offloaded, _ = make(small, "optimizer.offload=true")
    for n in range(1, 4):
        assert offloaded.step(n, samples).loss == plain.step(n, samples).loss
    (model, slots, rest), (expected, expected_slots, _) = offloaded.state(), plain.state()
    for name, value in expected.items():
        np.testing.assert_array_equal(model[name].array, value.array)
    assert set(slots) == set(expected_slots)
    again, _ = make(small, "optimizer.offload=true")
    again.load(Kept(model), Kept(slots), rest)
    assert again.step(4, samples).loss == plain.step(4, samples).loss
