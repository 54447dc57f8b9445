"""Blends and huge sets: shares, repeats, what is said of them, and no memory for 300 billion tokens."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Ran, configured

from gpt.config.task_schemas import Split
from gpt.data import corpus, token_files
from gpt.data.dataset import TokenDataset


def write(prefix: Path, token: int, documents: int) -> None:
    lens = np.full(documents, 50)
    token_files.write(str(prefix), np.full(lens.sum(), token), lens, np.arange(documents + 1), np.uint16)


def blended(folder: Path, weights: dict[str, float]) -> list[str]:
    parts = ", ".join(f"{{path: {folder}/{name}, weight: {weight}}}" for name, weight in weights.items())
    return [*SMALL, "data=blend", f"data.blend=[{parts}]", "data.seq_len=8"]


def test_every_prefix_of_a_blend_holds_each_share_to_within_one_sample(tmp_path: Path) -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.7}
    for token, name in enumerate(weights):
        write(tmp_path / name, token, 40)
    config = configured(blended(tmp_path, weights))
    which = TokenDataset(config, corpus.prepare(config), Split.train).batch(0, 1000).inputs_BT[:, 0]
    for token, weight in enumerate(weights.values()):
        error = np.cumsum(which == token) - weight * np.arange(1, 1001)
        assert np.abs(error).max() < 1


def test_an_exhausted_set_repeats_whole_passes_in_new_orders(tmp_path: Path) -> None:
    write(tmp_path / "big", 1, 400)
    ids, lens = np.arange(50 * 20), np.full(20, 50)
    token_files.write(str(tmp_path / "small"), ids + 1000, lens, np.arange(21), np.uint16)
    config = configured([*blended(tmp_path, {"big": 1, "small": 1}), "data.split=[1,0,0]"])
    samples = TokenDataset(config, corpus.prepare(config), Split.train)
    first = samples.batch(0, 2000).inputs_BT[:, 0]
    small = first[first >= 1000]
    per_pass = (20 * 50 - 1) // 8
    one, other = small[:per_pass], small[per_pass : 2 * per_pass]
    assert sorted(one) == sorted(other) == list(range(1000, 1000 + 8 * per_pass, 8))
    assert one.tolist() != other.tolist()
    assert samples.epochs(2000)[1] == 1000 / per_pass


def huge(prefix: Path, billions: int) -> None:
    """A set whose tokens are a hole in a sparse file: the size is real, the disk is not."""
    lens = np.full(billions, 1_000_000_000, np.int32)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lens.sum(dtype=np.int64)))
    from gpt.data.token_files import HEADER, MAGIC

    offsets = 2 * np.concatenate([[0], np.cumsum(lens[:-1], dtype=np.int64)])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, len(lens), len(lens) + 1))
        file.write(lens.tobytes() + offsets.tobytes() + np.arange(len(lens) + 1).tobytes())


def test_300_billion_tokens_take_no_memory_and_resuming_takes_no_time(tmp_path: Path) -> None:
    try:
        huge(tmp_path / "huge", 300)
    except OSError:
        pytest.skip("this file system has no sparse files of 600 GB")
    with open(tmp_path / "huge.bin", "r+b") as file:  # a mark near the end, to see that it is read
        file.seek(2 * 299_999_000_000)
        file.write(np.full(1000, 9, np.uint16).tobytes())
    config = configured([*SMALL, "data=tokens", f"data.path={tmp_path}/huge", "data.seq_len=32"])
    tracemalloc.start()  # sees numpy's arrays, too
    start = time.perf_counter()
    part = corpus.DatasetPart(f"{tmp_path}/huge", 1.0)
    prepared = corpus.DatasetInfo([part], "huge", None, None, None, 300_000_000_000)
    samples = TokenDataset(config, prepared, Split.train)
    assert len(samples) == (285 * 10**9 - 1) // 32  # 94.9 % of 300 documents
    samples.batch(0, 8)
    late = samples.batch(8_000_000_000, 8)  # where a run would resume after all but 0.9 of an epoch
    seconds = time.perf_counter() - start
    assert (late.inputs_BT == TokenDataset(config, prepared, Split.train).batch(8_000_000_000, 8).inputs_BT).all()
    assert seconds < 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    tail = token_files.load(part.path)
    assert tail.ids[-1_000_000] == 9


@pytest.mark.slow
def test_a_run_names_the_sets_of_its_blend_and_how_often_each_is_read(gpt, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "alpha", 1, 400)
    write(tmp_path / "beta", 2, 20)
    ran: Ran = gpt(*blended(tmp_path, {"alpha": 3, "beta": 1}), "cluster.device=cpu", "data.split=[90,10,0]")
    assert ran.code == 0, ran.text
    # 12 steps of 8 samples: 72 of alpha's 2,249 and 24 of beta's 112.
    assert "0.032 epoch(s) of the training split of alpha, 0.75 of the samples" in ran.text
    assert "0.214 epoch(s) of the training split of beta, 0.25 of the samples" in ran.text
