"""Raw text becomes token files: exact, the same for any number of workers, and never half of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, composed, configured
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import task_schemas
from gpt.config.rules import check, rule_problems
from gpt.config.task_schemas import DocumentRule
from gpt.data import token_files, tokenizer
from gpt.data.preprocess import documents, encode, inputs, merge, pipeline

Make = Callable[..., Path]
PLAIN = configured(["task=prepare", "prepare.input=x", "prepare.output=x"]).prepare
WORDS = ["the", "quick", "brown", "fox", "été", "北京", "日本語", "🙂", "jumps\tover", "", "\n", "lazy", "dogs"]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.train(["the quick brown fox jumps over lazy dogs " * 50, "été 北京 日本 🙂 " * 50], 340, path)
    return path


@pytest.fixture
def make(tmp_path: Path, bpe: Path) -> Make:
    """Prepares ``input`` and returns the prefix."""

    def run(*overrides: str, name: str = "out", said: list[str] | None = None) -> Path:
        prefix = tmp_path / name / "x"
        own = [] if any(o.startswith("prepare.vocab") for o in overrides) else [f"prepare.tokenizer={bpe}"]
        config = configured([*SMALL, "task=prepare", f"prepare.output={prefix}", *own, *overrides])
        assert rule_problems(config) + pipeline.check(config) == []
        pipeline.prepare(config, (said if said is not None else []).append, lambda tally: None, 1)
        return prefix

    return run


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) + f" {i}" for i in range(count)]


def jsonl(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)))
    return f"prepare.input={path}"


def decoded(prefix: Path) -> list[str]:
    """The documents of a set, without end-of-text."""
    encoder = tokenizer.open_encoder(Path(f"{prefix}_tokenizer.json"))
    token_set = token_files.load(str(prefix))
    starts = [0, *token_set.document_ends]
    rows = [token_set.ids[a:b].tolist() for a, b in pairwise(starts)]
    return [encoder.decode(row).removesuffix(tokenizer.END_OF_TEXT) for row in rows]


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{name}").read_bytes() for name in ("_ids.npy", "_idx.npz", "_tokenizer.json")]


# --- exact ---


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60), max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_unicode_comes_back(tmp_path_factory: pytest.TempPathFactory, bpe: Path, rows: list[str]) -> None:
    folder = tmp_path_factory.mktemp("unicode")
    jsonl(folder / "a.jsonl", rows)
    source = inputs.find(replace(PLAIN, input=str(folder / "a.jsonl")))[0]
    setup = encode.PreprocessPlan(source, PLAIN, bpe, folder)
    encoder = tokenizer.open_encoder(bpe)
    encode.encode(encode.Chunk(0, (0, 0, source[0].size), [], 0), setup, encoder)
    with np.load(folder / "0.npz") as stored:
        ends = np.cumsum(stored["lens"])[:-1]
    parts = np.split(np.fromfile(folder / "0.ids", np.uint16), ends)
    got = [encoder.decode(part[:-1].tolist()) for part in parts if len(part)]
    assert got == [row for row in rows if row.strip()]
    assert all(part[-1] == encoder.eot for part in parts if len(part))


@pytest.mark.parametrize("overrides", [[], ["prepare.shuffle=true", "prepare.dedup=true", "prepare.val_share=0.2"]])
def test_one_two_and_five_workers_and_any_cuts_give_the_same_bytes(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    rows = jsonl(tmp_path / "a.jsonl", texts(300) + texts(100))
    whole = content(make(rows, *overrides, name="whole"))
    for workers, size in ((1, 777), (2, 1000), (5, 4096)):
        monkeypatch.setattr(pipeline, "CHUNK_BYTES", size)
        prefix = make(rows, *overrides, f"prepare.workers={workers}", name=f"w{workers}")
        assert content(prefix) == whole
        if overrides:
            assert content(Path(f"{prefix}_val")) == content(tmp_path / "whole" / "x_val")


RULES = {
    "line": ("line", None, lambda t: t.splitlines(keepends=True)),
    "blank_line": ("blank_line", None, lambda t: reference(t, lambda line: not line.strip())),
    "regex": ("regex", "^=+$", lambda t: reference(t, lambda line: bool(line) and set(line) == {"="})),
    "literal": ("literal", "<x>", lambda t: t.split("<x>")),
    "file": ("file", None, lambda t: [t]),
}


def reference(text: str, between: Callable[[str], bool]) -> list[str]:
    found, now = [], ""
    for line in text.splitlines(keepends=True):
        if between(line.rstrip("\n")):
            found, now = [*found, now], ""
        else:
            now += line
    return [*found, now]


@given(
    st.sampled_from(sorted(RULES)),
    st.lists(st.sampled_from(["a\n", "bé\n", "\n", " \n", "==\n", "=\n", "<x>", "<", "c"]), max_size=40),
    st.integers(1, 50),
)
@settings(max_examples=300, deadline=None)
def test_documents_end_where_a_naive_reader_ends_them_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, rule: str, parts: list[str], size: int
) -> None:
    text = "".join(parts)
    path = tmp_path_factory.mktemp("cuts") / "a.txt"
    path.write_text(text)
    document, separator, naive = RULES[rule]
    prepare = replace(PLAIN, document=DocumentRule(document), separator=separator, input=str(path))
    setup = encode.PreprocessPlan(inputs.find(prepare)[0], prepare, path, path.parent)
    found = [r for chunk in pipeline.chunks(setup, size) for _, r in encode.read(chunk, setup)]
    got = [r.raw.decode() for r in found if r.raw and r.raw.strip()]
    assert got == [t for t in naive(text) if t.strip()]
    if rule != "literal" and text and size > len(text.encode()):
        lines = text.split("\n")
        assert all(r.raw is None or r.raw.decode().split("\n")[0] == lines[r.line - 1] for r in found)


def test_a_long_text_is_divided_and_ends_once(tmp_path: Path, make: Make) -> None:
    text = "".join(f"line {i} 北京\n" for i in range(30_000))
    (tmp_path / "a.txt").write_text(text)
    prefix = make(f"prepare.input={tmp_path}/a.txt")
    token_set = token_files.load(str(prefix))
    assert token_set.documents > 5
    assert "".join(decoded(prefix)) == text
    assert (token_set.ids == 0).sum() == 1
    assert token_set.ids[-1] == 0


def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import zstandard
    from pyarrow import parquet

    rows = texts(200)
    whole = content(make(jsonl(tmp_path / "a.jsonl", rows), name="plain"))
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(raw[:999]) + zstandard.compress(raw[999:]))
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "d.parquet", row_group_size=33)
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 2000)
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert content(make(f"prepare.input={tmp_path}/{name}", "prepare.workers=2", name=f"o{name}")) == whole, name
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert content(make("prepare.input='-'", name="stdin")) == whole


# --- options ---


def side(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little") < share * 2**64


def test_duplicates_go_validation_is_by_text_and_the_limit_counts_documents(tmp_path: Path, make: Make) -> None:
    rows = texts(80) + texts(60) + texts(40, seed=1)
    source = jsonl(tmp_path / "a.jsonl", rows)
    once = list(dict.fromkeys(rows))
    assert decoded(make(source, "prepare.dedup=true", name="dedup")) == once
    prefix = make(source, "prepare.dedup=true", "prepare.val_share=0.25", name="val")
    assert decoded(prefix) == [t for t in once if not side(t, 0.25)]
    assert decoded(Path(f"{prefix}_val")) == [t for t in once if side(t, 0.25)]
    assert token_files.prefixes_at(str(prefix.parent)) == [str(prefix)]
    assert decoded(make(source, "prepare.limit=50", name="limit")) == rows[:50]
    assert decoded(make(source, "prepare.min_length=100", name="min")) == [t for t in rows if len(t) >= 100]


def test_a_shuffle_is_a_permutation_that_the_seed_decides(tmp_path: Path, make: Make) -> None:
    rows = texts(200)
    source = jsonl(tmp_path / "a.jsonl", rows)
    one, same, other = (
        decoded(make(source, "prepare.shuffle=true", f"seed={seed}", name=name))
        for seed, name in ((1, "one"), (1, "same"), (2, "other"))
    )
    assert one == same
    assert one != other != rows
    assert sorted(one) == sorted(other) == sorted(rows)


def test_sentences_may_be_lines_and_documents_gather_them(tmp_path: Path, make: Make) -> None:
    rows = ["a\nbb\n\nccc", "d\n", "e"]
    prefix = make(jsonl(tmp_path / "a.jsonl", rows), "prepare.sentences=line")
    with np.load(f"{prefix}_idx.npz") as index:
        assert index["docs"].tolist() == [0, 4, 5, 6]
        assert (index["lens"].dtype, index["docs"].dtype) == (np.int32, np.int64)
    assert decoded(prefix) == rows
    bare = make(jsonl(tmp_path / "a.jsonl", rows), "prepare.append_eot=false", name="bare")
    assert not (token_files.load(str(bare)).ids == 0).any()


def test_sentences_may_be_those_of_punkt_which_knows_abbreviations(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nltk.tokenize import punkt

    config = configured(["task=prepare", "prepare.input=x", "prepare.output=x", "prepare.sentences=punkt"])
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    assert ["python -m nltk.downloader punkt_tab" in p for p in documents.sentence_problems(config.prepare)] == [True]

    trainer = punkt.PunktTrainer("Then Mr. Fox came. He saw Mr. Dog. Mr. Cat ran. " * 30)
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    punkt.save_punkt_params(trainer.get_params(), str(folder))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Then Mr. Fox jumps. He quick!  Over 北京?"}) + "\n")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    prefix = make(f"prepare.input={tmp_path}/a.jsonl", "prepare.sentences=punkt", "prepare.append_eot=false")
    with np.load(f"{prefix}_idx.npz") as index:
        assert index["docs"].tolist() == [0, 3]
    assert decoded(prefix) == ["Then Mr. Fox jumps. He quick!  Over 北京?"]


@given(st.lists(st.integers(0, 5), max_size=50))
def test_the_first_of_each_stays(numbers: list[int]) -> None:
    hashes = np.array([[n // 2, n % 2] for n in numbers], np.uint64).reshape(-1, 2)
    assert merge.first_of_each(hashes).tolist() == [n not in numbers[:i] for i, n in enumerate(numbers)]


def test_the_manifest_says_what_was_made_of_what(tmp_path: Path, make: Make) -> None:
    rows = texts(50)
    prefix = make(jsonl(tmp_path / "a.jsonl", rows))
    told = json.loads(Path(f"{prefix}_manifest.json").read_text())
    assert told["input"][0]["sha256"] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert told["bytes"] == sum(len(t.encode()) for t in rows)
    assert told["tokens"] == len(token_files.load(str(prefix)).ids)
    assert told["bytes_per_token"] == told["bytes"] / told["tokens"]
    assert told["tokenizer"]["digest"] == tokenizer.digest(Path(f"{prefix}_tokenizer.json"))
    for name, file in told["files"].items():
        assert file["sha256"] == hashlib.sha256((prefix.parent / name).read_bytes()).hexdigest()
    said: list[str] = []
    make(f"prepare.input={tmp_path}/a.jsonl", said=said)
    assert "made already" in said[0]


def test_what_a_failed_start_has_finished_is_not_done_again(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(300))
    expected = content(make(source, name="whole"))
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 2000)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "merge", full)
        with pytest.raises(OSError, match="No space"):
            make(source)
    assert not list((tmp_path / "out").glob("x_[imt]*"))

    monkeypatch.delattr(encode, "_encode_chunk")
    assert content(make(source)) == expected
    assert not list((tmp_path / "out").glob("x_work*"))


# --- bad input ---

BAD = {
    "not JSON": b'{"text": "broken\n',
    "not a JSON object": b"[1]\n",
    "no key 'text', only body, id": b'{"id": 1, "body": "x"}\n',
    "'text' is int, not text": b'{"text": 7}\n',
    "not UTF-8": b'{"text": "caf\xe9"}\n',
    "NUL bytes": b'{"text": "a\\u0000b"}\n',
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_line_is_counted_named_and_skipped(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    rows = texts(100)
    jsonl(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:70], BAD[why], b"\n", b'{"text": " "}\n', *lines[70:]]))
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 1000)
    said: list[str] = []
    prefix = make(f"prepare.input={tmp_path}/a.jsonl", "prepare.max_bad=0.1", said=said)
    assert f"skipped {tmp_path}/a.jsonl:71: {why}" in said
    assert decoded(prefix) == rows
    told = json.loads(Path(f"{prefix}_manifest.json").read_text())
    assert told["skipped"] == {"bad": 1, "empty": 1, "short": 0}
    with pytest.raises(
        pipeline.TooManyBadRecords, match=r"1 of 102 records are unusable, more than prepare.max_bad=0.001"
    ):
        make(f"prepare.input={tmp_path}/a.jsonl", name="strict")
    assert not list((tmp_path / "strict").glob("x_[im]*"))


def test_a_lone_surrogate_is_not_text() -> None:
    source = inputs.Source("a", task_schemas.TextFormat.jsonl, "", 0, 0)
    raw = b'{"text": "\\ud800"}'
    assert documents.text_of(raw, source, PLAIN)[1] == "not UTF-8"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_is_before_the_damage_of_a_cut_file_is_used(tmp_path: Path, make: Make, ending: str) -> None:
    import zstandard

    rows = texts(3000)
    jsonl(tmp_path / "a.jsonl", rows)
    raw = (tmp_path / "a.jsonl").read_bytes()
    packed = gzip.compress(raw) if ending == ".gz" else zstandard.compress(raw)
    (tmp_path / f"b.jsonl{ending}").write_bytes(packed[: len(packed) // 2])
    said: list[str] = []
    prefix = make(f"prepare.input={tmp_path}/b.jsonl{ending}", "prepare.max_bad=0.1", said=said)
    assert any(f"the {ending} is damaged or cut short" in line for line in said), said
    got = decoded(prefix)
    assert got == rows[: len(got)]


def test_a_wrong_key_is_found_before_anything_is_made(tmp_path: Path, bpe: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(20))
    config = configured(
        ["task=prepare", source, f"prepare.output={tmp_path}/o/x", f"prepare.tokenizer={bpe}", "prepare.json_key=body"]
    )
    (problem,) = pipeline.check(config)
    assert "none of the first 20 records is usable: no key 'body', only text (20); first at" in problem
    assert not (tmp_path / "o").exists()


def test_bad_settings_are_said_all_at_once(tmp_path: Path) -> None:
    def problems(*overrides: str) -> list[str]:
        return check(*composed(["task=prepare", *overrides]))[1]

    assert [p.split(" has")[0] for p in problems()] == ["prepare.input", "prepare.output"]
    (needs,) = problems("prepare.input='-'", "prepare.output=x")
    assert needs.startswith("prepare.input=- needs prepare.tokenizer=...")
    (regex,) = problems("prepare.input=x", "prepare.output=x", "prepare.document=regex", "prepare.separator='('")
    assert "not a regular expression" in regex
    config = configured(
        ["task=prepare", "prepare.input=[nowhere,also]", "prepare.output=/x", f"prepare.tokenizer={tmp_path}/t.json"]
    )
    found = " ".join(pipeline.check(config))
    for words in ("nowhere: not found", "also: not found", "no such file or folder; gpt2 is known by name"):
        assert words in found
