"""Megatron's pair of files: read as what others wrote, written as what others read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, configured
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config.task_schemas import Split
from gpt.data import corpus, token_files, tokenizer
from gpt.data.dataset import TokenDataset
from gpt.utils.errors import UserError
from scripts import convert_tokens


def by_hand(
    prefix: Path, sentences: list[list[int]], docs: list[int], code: int, kind: str, modes: bool = False
) -> None:
    """The format written item by item with ``struct`` alone: nothing in common with what reads it."""
    size = struct.calcsize(f"<{kind}")
    with open(f"{prefix}.bin", "wb") as file:
        for sentence in sentences:
            file.write(struct.pack(f"<{len(sentence)}{kind}", *sentence))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code))
        file.write(struct.pack("<Q", len(sentences)) + struct.pack("<Q", len(docs)))
        for sentence in sentences:
            file.write(struct.pack("<i", len(sentence)))
        offset = 0
        for sentence in sentences:
            file.write(struct.pack("<q", offset))
            offset += size * len(sentence)
        for number in docs:
            file.write(struct.pack("<q", number))
        if modes:
            file.write(bytes(len(sentences)))


CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_every_integer_type_is_read(tmp_path: Path, code: int, modes: bool) -> None:
    sentences = [[1, 2, 3], [4], [], [5, 6, 127]]
    by_hand(tmp_path / "a", sentences, [0, 2, 4], code, CODES[code], modes)
    token_set = token_files.load(str(tmp_path / "a"))
    assert token_set.ids.tolist() == [1, 2, 3, 4, 5, 6, 127]
    assert token_set.document_ends.tolist() == [4, 7]
    assert token_set.largest_id() == 127


@given(st.lists(st.lists(st.integers(0, 70_000), max_size=5), min_size=1, max_size=12), st.data())
@settings(max_examples=80, deadline=None)
def test_conversion_there_and_back_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("there")
    if not any(sentences):
        sentences[0] = [7]
    inner = sorted(data.draw(st.lists(st.integers(0, len(sentences)), max_size=4)))
    by_hand(folder / "a", sentences, [0, *inner, len(sentences)], 4, "i")
    for source, out in (("a", "published"), ("published", "b"), ("b", "again")):
        assert convert_tokens.main([str(folder / source), str(folder / out)]) == 0
    if max(max(s, default=0) for s in sentences) >= 1 << 16:  # int32 stays int32: the very same files
        assert (folder / "b.bin").read_bytes() == (folder / "a.bin").read_bytes()
        assert (folder / "b.idx").read_bytes() == (folder / "a.idx").read_bytes()
    for name in ("_ids.npy", "_idx.npz"):
        assert (folder / f"again{name}").exists()
    for one, other in zip(token_files.read(str(folder / "a")), token_files.read(str(folder / "again")), strict=True):
        assert one.tolist() == other.tolist()


def test_what_is_written_is_the_format_byte_by_byte(tmp_path: Path) -> None:
    sentences = [[1, 2, 65535], [], [5]]
    by_hand(tmp_path / "theirs", sentences, [0, 1, 1, 3], 8, "H")
    ids, lens, docs = np.array([1, 2, 65535, 5]), np.array([3, 0, 1], np.int32), np.array([0, 1, 1, 3])
    token_files.write_megatron(str(tmp_path / "ours"), ids, lens, docs, np.uint16)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_both_formats_give_the_same_samples_and_the_same_identity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, lens = rng.integers(0, 300, 2000), np.full(40, 50)
    docs = np.arange(41)
    for write, name in ((token_files.write, "one"), (token_files.write_megatron, "other")):
        write(str(tmp_path / name), ids, lens, docs, np.uint16)
    one, other = (configured([*SMALL, "data=tokens", f"data.path={tmp_path}/{name}"]) for name in ("one", "other"))
    prepared = [corpus.prepare(config) for config in (one, other)]
    assert prepared[0].fingerprint == prepared[1].fingerprint
    batches = [TokenDataset(c, p, Split.train).batch(0, 32) for c, p in zip((one, other), prepared, strict=True)]
    assert (batches[0].inputs_BT == batches[1].inputs_BT).all()


def test_end_of_text_is_what_the_tokenizer_says(tmp_path: Path) -> None:
    tokenizer.train(["one fish two fish " * 9], 300, tmp_path / "tokenizer.json")
    by_hand(tmp_path / "a", [[5, 6, 7, 0] * 20] * 40, list(range(41)), 8, "H")
    overrides = [*SMALL, "data=tokens", f"data.path={tmp_path}/a"]
    assert corpus.prepare(configured(overrides)).eot_id is None
    named = configured([*overrides, f"data.tokenizer={tmp_path}/tokenizer.json"])
    assert corpus.prepare(named).eot_id == 0


def test_any_way_of_naming_a_set_finds_it(tmp_path: Path) -> None:
    by_hand(tmp_path / "a", [[1, 2]], [0, 1], 8, "H")
    token_files.write(str(tmp_path / "b"), np.array([3]), np.array([1]), np.arange(2), np.uint16)
    assert token_files.prefixes_at(str(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "b")]
    for name in ("a", "a.bin", "a.idx"):
        (prefix,) = token_files.prefixes_at(str(tmp_path / name))
        assert token_files.load(prefix).ids.tolist() == [1, 2]
    by_hand(tmp_path / "b", [[4]], [0, 1], 8, "H")
    assert token_files.load(str(tmp_path / "b")).ids.tolist() == [3]
    assert token_files.load(str(tmp_path / "b.bin")).ids.tolist() == [4]
    assert len(token_files.prefixes_at(str(tmp_path))) == 2


def cut(ending: str, by: int) -> object:
    def do(prefix: str) -> None:
        path = Path(prefix + ending)
        path.write_bytes(path.read_bytes()[:-by])

    return do


def put(ending: str, at: int, what: bytes) -> object:
    def do(prefix: str) -> None:
        content = bytearray(Path(prefix + ending).read_bytes())
        content[at : at + len(what)] = what
        Path(prefix + ending).write_bytes(content)

    return do


DAMAGE = {
    "no bin": (lambda p: Path(f"{p}.bin").unlink(), r"no such token file: .*a\.bin"),
    "no idx": (lambda p: Path(f"{p}.idx").unlink(), r"no such token file: .*a\.idx"),
    "bin cut": (cut(".bin", 1), r"a\.bin is damaged: 7 bytes, but its index describes 4 tokens of 2 bytes"),
    "idx cut": (cut(".idx", 3), r"a\.idx is damaged: 79 bytes, but 2 sequences and 2 documents take 82"),
    "idx empty": (cut(".idx", 82), "this is no Megatron index"),
    "header cut": (cut(".idx", 60), "this is no Megatron index"),
    "other magic": (put(".idx", 0, b"TNTIDX"), "this is no Megatron index"),
    "version": (put(".idx", 9, b"\x02"), "version 2, element type 8; version 1 with integer tokens"),
    "floats": (put(".idx", 17, b"\x06"), "version 1, element type 6"),
    "negative length": (put(".idx", 34, struct.pack("<ii", -1, 5)), "offsets are not those"),
    "offsets": (put(".idx", 50, b"\x02"), "offsets are not those of sequences one after another"),
    "documents": (put(".idx", 58, b"\x09"), "the document boundaries do not cover the 2 lengths"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_pair_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    by_hand(tmp_path / "a", [[1, 2, 3], [4]], [0, 1, 2], 8, "H")
    damage, expected = DAMAGE[case]
    damage(str(tmp_path / "a"))
    with pytest.raises(UserError, match=expected):
        token_files.load(str(tmp_path / "a.idx"))


def test_a_negative_token_is_found_before_training(tmp_path: Path) -> None:
    by_hand(tmp_path / "a", [[1, 2, -1] * 50] * 20, list(range(21)), 4, "i")
    config = configured([*SMALL, "data=tokens", f"data.path={tmp_path}/a"])
    assert any("token 2 is -1, and no token number is negative" in p for p in corpus.check(config))


def test_a_full_disk_leaves_no_half_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (token_files.write, token_files.write_megatron):
        with pytest.raises(OSError, match="No space"):
            write(str(tmp_path / "a"), np.array([3]), np.array([1]), np.arange(2), np.uint16)
    assert list(tmp_path.iterdir()) == []


def test_conversion_never_writes_over_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(tmp_path / "a", [[1, 2]], [0, 1], 8, "H")
    (tmp_path / "b_idx.npz").write_text("mine")
    assert convert_tokens.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "b_idx.npz exists already" in capsys.readouterr().err
    assert (tmp_path / "b_idx.npz").read_text() == "mine"
