"""Tokens on disk, samples in order, batches: exact, and a function of (seed, number) alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, configured
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config.schema import Order
from gpt.config.task_schemas import Split
from gpt.data import corpus, sampler, token_files, tokenizer
from gpt.data.dataset import TokenDataset
from gpt.data.preprocess.documents import pieces as file_pieces
from gpt.utils.errors import UserError


def write_set(prefix: Path, lens: list[int], *, vocab: int = 300, seed: int = 0) -> np.ndarray:
    """A token set in the published format."""
    ids = np.random.default_rng(seed).integers(0, vocab, sum(lens)).astype(np.uint16)
    np.save(f"{prefix}_ids.npy", ids)
    np.savez(f"{prefix}_idx.npz", lens=np.array(lens, np.int32), docs=np.arange(len(lens) + 1, dtype=np.int64))
    return ids


def samples_of(prefix: Path, *overrides: str, split: Split = Split.train, **kwargs: bool) -> TokenDataset:
    config = configured([*SMALL, "data=tokens", f"data.path={prefix}", "data.seq_len=8", *overrides])
    return TokenDataset(config, corpus.prepare(config), split, **kwargs)


# --- the permutation ---


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_order_visits_every_sample_once_per_epoch(n: int, seed: int, epoch: int) -> None:
    assert sorted(sampler.permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_the_order_looks_random_and_differs_by_seed_and_epoch() -> None:
    n = 100_000
    one, other, later = (sampler.permute(np.arange(n), n, *key) for key in ((1, 0), (2, 0), (1, 1)))
    for permuted in (one, other, later):
        assert abs(np.corrcoef(permuted, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(one, later)[0, 1]) < 0.02


def test_the_order_of_a_huge_set_needs_no_memory() -> None:
    n = 300_000_000_000 // 1024
    where = sampler.permute(np.arange(1000), n, 0, 0)
    assert len(set(where.tolist())) == 1000
    assert 0 <= where.min() <= where.max() < n


# --- Megatron's tables against a naive reference ---


def naive_megatron(lengths: np.ndarray, seq_len: int, samples: int, seed: int) -> list[list[tuple[int, int]]]:
    """The published algorithm, one token at a time: the (document, offset) pairs of every sample, in order."""
    tokens_per_epoch, epochs = int(lengths.sum()), 1
    while (epochs * tokens_per_epoch - 1) // seq_len < samples:
        epochs += 1
    rng = np.random.RandomState(seed)
    before = ((epochs - 1) * tokens_per_epoch - 1) // seq_len
    separate = epochs > 1 and samples - before < int(0.80 * ((tokens_per_epoch - 1) // seq_len))

    def tiled(times: int) -> np.ndarray:
        documents = np.tile(np.arange(len(lengths), dtype=np.int32), times)
        rng.shuffle(documents)
        return documents

    documents = np.concatenate([tiled(epochs - 1), tiled(1)]) if separate else tiled(epochs)
    stream = [(int(d), i) for d in documents for i in range(lengths[d])]
    cut = [stream[k * seq_len : k * seq_len + seq_len + 1] for k in range((len(stream) - 1) // seq_len)]
    first = np.arange(before if separate else len(cut), dtype=np.uint32)
    rng.shuffle(first)
    last = np.arange(before if separate else len(cut), len(cut), dtype=np.uint32)
    if separate:
        rng.shuffle(last)
    return [cut[k] for k in [*first, *last]]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda lens: sum(lens) > 8),
    seq_len=st.integers(1, 7),
    samples=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_the_megatron_index_equals_the_naive_algorithm(
    lengths: list[int], seq_len: int, samples: int, seed: int
) -> None:
    lens = np.array(lengths)
    index = sampler.megatron_index(lens, seq_len, samples, seed)
    expected = naive_megatron(lens, seq_len, samples, seed)
    assert len(index.shuffle) == len(expected) >= samples
    for number, pairs in enumerate(expected):
        row, offset = index.starts[index.shuffle[number]]
        ours = []
        while len(ours) < seq_len + 1:
            document = int(index.documents[row])
            ours += [(document, i) for i in range(offset, lengths[document])]
            row, offset = row + 1, 0
        assert ours[: seq_len + 1] == pairs


def test_the_megatron_index_is_cached_under_everything_it_depends_on(tmp_path: Path) -> None:
    lens = np.array([10, 20, 30])
    base = {"fingerprint": "f", "split": (0, 3), "lengths": lens, "seq_len": 4, "samples": 20, "seed": 1}
    sampler.cached_megatron_index(tmp_path, **base)
    for key, value in (("fingerprint", "g"), ("split", (0, 2)), ("seq_len", 5), ("samples", 40), ("seed", 2)):
        sampler.cached_megatron_index(tmp_path, **{**base, key: value})
    assert len(list((tmp_path / "index").iterdir())) == 6
    sampler.cached_megatron_index(tmp_path, **base)
    assert len(list((tmp_path / "index").iterdir())) == 6


# --- samples ---


def test_samples_are_windows_of_the_split_that_share_one_token(tmp_path: Path) -> None:
    ids = write_set(tmp_path / "a", [50] * 20)
    samples = samples_of(tmp_path / "a", "data.split=[80,10,10]", shuffled=False)
    batch = samples.batch(0, len(samples))
    assert len(samples) == (16 * 50 - 1) // 8
    assert (batch.inputs_BT.flatten() == ids[: 8 * len(samples)]).all()
    assert (batch.labels_BT.flatten() == ids[1 : 8 * len(samples) + 1]).all()


@pytest.mark.parametrize("how", list(Order))
def test_a_sample_never_leaves_its_split(tmp_path: Path, how: Order) -> None:
    lens = [50] * 20
    write_set(tmp_path / "a", lens)
    # Give every split its own tokens.
    ids = np.concatenate([np.full(16 * 50, 1), np.full(2 * 50, 2), np.full(2 * 50, 3)]).astype(np.uint16)
    np.save(tmp_path / "a_ids.npy", ids)
    for split, token in ((Split.train, 1), (Split.val, 2), (Split.test, 3)):
        samples = samples_of(tmp_path / "a", "data.split=[80,10,10]", f"data.order={how.value}", split=split)
        batch = samples.batch(0, 64)
        assert set(batch.inputs_BT.flatten()) == set(batch.labels_BT.flatten()) == {token}


@pytest.mark.parametrize("how", list(Order))
def test_a_sample_depends_on_its_number_only(tmp_path: Path, how: Order) -> None:
    write_set(tmp_path / "a", [37] * 30)
    samples = samples_of(tmp_path / "a", f"data.order={how.value}")
    whole = samples.batch(0, 32)
    for first, count in ((0, 8), (8, 8), (5, 3), (31, 1)):
        part = samples.batch(first, count)
        assert (part.inputs_BT == whole.inputs_BT[first : first + count]).all()
        assert (part.labels_BT == whole.labels_BT[first : first + count]).all()


def test_the_order_does_not_depend_on_the_horizon_or_the_batch(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [37] * 30)
    one = samples_of(tmp_path / "a")
    other = samples_of(tmp_path / "a", "trainer.max_steps=999", "trainer.global_batch_size=4")
    assert (one.batch(0, 500).inputs_BT == other.batch(0, 500).inputs_BT).all()


def test_the_loss_is_masked_where_the_input_is_end_of_text(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [50] * 20)
    batch = samples_of(tmp_path / "a", "data.eot_id=7").batch(0, 64)
    assert (batch.inputs_BT == 7).any()
    assert (batch.mask_BT == (batch.inputs_BT != 7)).all()
    assert samples_of(tmp_path / "a", "data.eot_id=7", "data.mask_eot=false").batch(0, 64).mask_BT.all()


def test_overfit_repeats_the_first_batch(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [50] * 20)
    samples = samples_of(tmp_path / "a", "data.overfit=true")
    assert (samples.batch(0, 8).inputs_BT == samples.batch(8, 8).inputs_BT).all()


def test_a_split_without_a_sample_says_how_much_there_is(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [50] * 20)
    with pytest.raises(UserError, match=r"the val split has 0 of 20 documents and 0 tokens, too few for one sample"):
        samples_of(tmp_path / "a", "data.split=[1,0,0]", split=Split.val)


# --- blends ---


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_blend_is_within_one_sample_of_its_shares_at_every_prefix(weights: list[int]) -> None:
    pattern = sampler.interleave([float(w) for w in weights])
    used = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, len(pattern) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(used - exact).max() < 1
    assert np.abs(used[-1] - exact[-1]).max() < 1e-9


def test_a_blend_reads_each_set_in_its_own_order_and_repeats_small_ones(tmp_path: Path) -> None:
    for name, documents in (("a", 40), ("b", 20)):
        write_set(tmp_path / name, [50] * documents)
        ids = np.full(50 * documents, {"a": 1, "b": 2}[name], np.uint16)
        np.save(tmp_path / f"{name}_ids.npy", ids)
    parts = f"data.blend=[{{path: {tmp_path}/a, weight: 0.25}}, {{path: {tmp_path}/b, weight: 0.75}}]"
    config = configured([*SMALL, "data=blend", parts, "data.seq_len=8"])
    samples = TokenDataset(config, corpus.prepare(config), Split.train)
    first = samples.batch(0, 400).inputs_BT[:, 0]
    assert (first == 1).sum() == 100
    epochs = samples.epochs(400)
    assert epochs[0] < 1 < epochs[1]


# --- files ---


def test_sentences_are_gathered_into_documents(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [3, 4, 5, 6])
    np.savez(tmp_path / "a_idx.npz", lens=np.array([3, 4, 5, 6], np.int32), docs=np.array([0, 1, 4]))
    assert token_files.load(str(tmp_path / "a")).document_ends.tolist() == [3, 18]


def test_split_bounds_take_off_what_rounding_added() -> None:
    assert token_files.split_bounds(1000, [949, 50, 1]) == [0, 949, 999, 1000]
    assert token_files.split_bounds(3, [0.5, 0.5, 0.0]) == [0, 1, 3, 3]  # 2 + 2 is one too many
    for documents in range(1, 50):
        bounds = token_files.split_bounds(documents, [949, 50, 1])
        assert bounds[-1] == documents
        assert bounds == sorted(bounds)


DAMAGE = {
    "no file": (lambda p: Path(f"{p}_ids.npy").unlink(), "no such token file"),
    "cut short": (lambda p: Path(f"{p}_ids.npy").write_bytes(Path(f"{p}_ids.npy").read_bytes()[:-200]), "damaged"),
    "not numpy": (lambda p: Path(f"{p}_ids.npy").write_bytes(b"hello"), "damaged"),
    "not a zip": (lambda p: Path(f"{p}_idx.npz").write_bytes(b"hello"), "damaged"),
    "pickle": (lambda p: np.save(f"{p}_ids.npy", np.array([{}]), allow_pickle=True), "damaged"),
    "two rows": (lambda p: np.save(f"{p}_ids.npy", np.zeros((2, 500), np.uint16)), "not one row of integers"),
    "other text": (lambda p: np.save(f"{p}_ids.npy", np.zeros(7, np.uint16)), "the lengths add up to 1,000 tokens"),
    "no lens": (lambda p: np.savez(f"{p}_idx.npz", docs=np.arange(3)), "damaged"),
    "docs": (lambda p: np.savez(f"{p}_idx.npz", lens=np.full(20, 50), docs=np.array([0, 7])), "document boundaries"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_set_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    write_set(tmp_path / "a", [50] * 20)
    damage, expected = DAMAGE[case]
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=expected):
        token_files.load(str(tmp_path / "a"))


def test_a_token_beyond_the_vocabulary_is_found_before_training(tmp_path: Path) -> None:
    ids = write_set(tmp_path / "a", [50] * 20)
    ids[777] = 384
    np.save(tmp_path / "a_ids.npy", ids)
    config = configured([*SMALL, "data=tokens", f"data.path={tmp_path}/a"])
    assert any("token id 384 is beyond model.vocab=384" in p for p in corpus.check(config))


# --- text ---


def test_text_is_tokenised_once_and_decodes_to_itself(small: list[str], text: Path) -> None:
    config = configured(small)
    said: list[str] = []
    prepared = corpus.prepare(config, said.append)
    again: list[str] = []
    assert corpus.prepare(config, again.append) == prepared
    assert len(said) in (0, 2)  # another test may have been first
    assert again == []

    assert prepared.tokenizer is not None
    encoding = tokenizer.load(Path(prepared.tokenizer))
    token_set = token_files.load(prepared.parts[0].path)
    whole = "".join(encoding.decode(token_set.ids.tolist()).split(tokenizer.END_OF_TEXT))
    assert sorted(whole) == sorted("".join(p.read_text() for p in text.iterdir()))
    assert (token_set.ids == prepared.eot_id).sum() == 40


def test_a_changed_text_is_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one fish two fish\n" * 500)
    overrides = [*SMALL, "data=text", f"data.path={path}"]
    before = corpus.prepare(configured(overrides))
    path.write_text("red fish blue fish\n" * 500)
    assert corpus.prepare(configured(overrides)).fingerprint != before.fingerprint


def test_one_long_file_gets_a_validation_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of a text that goes on\n" for i in range(4000)))
    config = configured([*SMALL, "data=text", f"data.path={path}"])
    prepared = corpus.prepare(config)
    assert len(TokenDataset(config, prepared, Split.val)) > 0


@given(st.text(max_size=400), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_unicode_join_to_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    content = text.encode("utf-8", "replace")
    path.write_bytes(content)
    with open(path, "rb") as file:
        pieces = list(file_pieces(file, size))
    assert "".join(piece.raw.decode() for piece in pieces).encode() == content
    assert [piece.ends for piece in pieces] == [*[False] * (len(pieces) - 1), True][: len(pieces)]


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_round_trips_any_unicode(bpe: Path, text: str) -> None:
    encoding = tokenizer.load(bpe)
    text = text.encode("utf-8", "replace").decode("utf-8")
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.train(["the quick brown fox " * 50, "été 北京 日本 🙂 " * 50], 400, path)
    return path


def test_tiktoken_gives_the_ids_of_tokenizers(bpe: Path, text: Path) -> None:
    from tokenizers import Tokenizer

    reference, ours = Tokenizer.from_file(str(bpe)), tokenizer.load(bpe)
    for path in text.iterdir():
        assert ours.encode_ordinary(path.read_text()) == reference.encode(path.read_text()).ids


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"model": {"vocab": {"a": 1}}}))
    with pytest.raises(UserError, match="not a byte-level BPE"):
        tokenizer.load(tmp_path / "t.json")


def test_bad_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 100)
    config = configured([*SMALL, "data=text", f"data.path={tmp_path}"])
    assert any("latin.txt: not UTF-8 (byte 0xe9 at 3)" in p for p in corpus.check(config))
    (tmp_path / "latin.txt").write_text("")
    assert any("only 1 empty file(s)" in p for p in corpus.check(config))
    (tmp_path / "latin.txt").unlink()
    assert any("no .txt .md .rst .py files" in p for p in corpus.check(config))
