"""What ranks exchange: names and shapes of whole arrays, who updates what, gates and links."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import configured

from gpt.config.cluster import Device
from gpt.config.derived import replace_in
from gpt.config.parameters import WORD, owners, parameter_shapes
from gpt.data.dataset import Batch
from gpt.model.gpt import GPT
from gpt.parallel.cpu import sockets
from gpt.parallel.topology import Topology


class Store:
    """Paddle's store, within one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 10)
            return self._values[key]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:1")
    return Store()


def on_all(size: int, work: Any) -> list[Any]:
    """``work(rank)`` of all ranks, on a thread each."""
    with ThreadPoolExecutor(size) as pool:
        return [future.result(20) for future in [pool.submit(work, rank) for rank in range(size)]]


@pytest.mark.parametrize("vocab", [257, 384])
def test_a_checkpoint_has_the_names_and_shapes_of_the_single_model(small: list[str], vocab: int) -> None:
    config = configured([*small, f"model.vocab={vocab}", "data.vocab=257", "model.layers=3"])
    model = GPT(config, Topology(config.parallel, Device.cpu))
    assert parameter_shapes(config) == {name: list(p.shape) for name, p in model.logical_parameters().items()}
    config = replace_in(config, {"parallel.mp_degree": 2})  # a table padded further is cut in checkpoints
    assert parameter_shapes(config)[WORD][0] == 384


def test_the_owners_of_parameters_have_about_as_much_each(small: list[str]) -> None:
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(configured(small)).items()}
    owner = owners(sizes, 3)
    assert set(owner) == set(sizes)
    load = [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in range(3)]
    assert max(load) < 1.2 * min(load)


def test_a_padded_batch_counts_what_the_batch_counts() -> None:
    batch = Batch(np.arange(6).reshape(2, 3), np.arange(1, 7).reshape(2, 3), np.ones((2, 3), np.float32))
    padded = batch.padded(5)
    assert padded.inputs_BT.shape == padded.labels_BT.shape == padded.mask_BT.shape == (5, 3)
    assert (padded.inputs_BT[:2] == batch.inputs_BT).all()
    assert padded.mask_BT.sum() == 6
    assert batch.masked().mask_BT.sum() == 0


def test_nobody_passes_a_gate_before_all_are_there(store: Store) -> None:
    late = time.monotonic() + 0.3

    def pass_gate(rank: int) -> float:
        gate = sockets.SocketBarrier(store, "gate", rank, 3)
        gate.enter()
        if rank == 2:
            time.sleep(max(0.0, late - time.monotonic()))
        gate.enter()
        passed = time.monotonic()
        gate.close()
        return passed

    assert min(on_all(3, pass_gate)) >= late


def test_a_gate_says_that_a_rank_has_ended(store: Store) -> None:
    gates = on_all(2, lambda rank: sockets.SocketBarrier(store, "gate", rank, 2))
    gates[1].close()
    with pytest.raises(ConnectionError, match="was lost"):
        gates[0].enter()
    gates[0].close()


def test_links_carry_arrays_in_order_while_both_ends_send_first(store: Store) -> None:
    big = 1 << 20  # more than the kernel buffers

    def swap(rank: int) -> list[float]:
        outgoing, incoming = sockets.links(store, "pipe", rank, [1 - rank])
        for value in (1.0, 2.0, 3.0):
            outgoing[1 - rank].send(np.full(big, value + 10 * rank, np.float32))
        got = np.empty((2, big // 2), np.float32)
        means = []
        for _ in range(3):
            incoming[1 - rank].receive(got)
            means.append(float(got.mean()))
        outgoing[1 - rank].close()
        incoming[1 - rank].close()
        return means

    assert on_all(2, swap) == [[11.0, 12.0, 13.0], [1.0, 2.0, 3.0]]
