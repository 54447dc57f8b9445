"""What the look at token files says is what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt.data import token_files, tokenizer
from scripts import convert_tokens, inspect_tokens


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    """A prefix in both formats, and its tokenizer: three documents, one empty."""
    vocabulary = tmp_path / "tokenizer.json"
    tokenizer.train(["one fish two fish red fish blue fish"] * 9, 300, vocabulary)
    encoder = tokenizer.open_encoder(vocabulary)
    documents = [[*encoder.encode("one fish two fish"), encoder.eot], [], [*encoder.encode("red fish"), encoder.eot]]
    lens = np.array([len(d) for d in documents])
    ids = np.array([t for d in documents for t in d])
    for write, name in ((token_files.write, "a"), (token_files.write_megatron, "b")):
        write(str(tmp_path / name), ids, lens, np.arange(4), np.uint16)
    return tmp_path, vocabulary


@pytest.mark.parametrize("name", ["a", "b", "b.bin"])
def test_documents_decode_and_figures_count(
    corpus: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, vocabulary = corpus
    picture = folder / "lengths.png"
    arguments = [str(folder / name), "--tokenizer", str(vocabulary), "--document", "0", "--picture", str(picture)]
    assert inspect_tokens.main(arguments) == 0
    out = capsys.readouterr().out
    assert "one fish two fish<|endoftext|>" in out
    assert "red fish" not in out.split("--- document")[1]
    assert "documents                 3   (1 empty)" in out
    assert "100.0% of documents end with end-of-text" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_entropy_is_that_of_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_files.write(str(tmp_path / "a"), np.array([5, 5, 7, 7]), np.array([4]), np.arange(2), np.uint16)
    assert inspect_tokens.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{np.log(2):.3f} nats a token" in out
    assert "2 different tokens, the largest 7" in out
    assert "5 5 7 7" in out


def test_another_datas_tokenizer_is_noticed(corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, vocabulary = corpus
    token_files.write(str(folder / "c"), np.array([60000]), np.array([1]), np.arange(2), np.uint16)
    assert inspect_tokens.main([str(folder / "c"), "--tokenizer", str(vocabulary)]) == 0
    assert "WARNING     token 60000 is beyond this tokenizer" in capsys.readouterr().out


def test_the_tokenizer_beside_a_set_is_used_and_comes_along(
    corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, vocabulary = corpus
    vocabulary.rename(folder / "a_tokenizer.json")
    assert convert_tokens.main([str(folder / "a"), str(folder / "other" / "c")]) == 0
    assert inspect_tokens.main([str(folder / "other"), "--document", "2"]) == 0
    assert "red fish<|endoftext|>" in capsys.readouterr().out


def test_what_is_not_there_is_said(corpus: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = corpus
    for arguments, expected in (
        ([str(folder)], "2 sets in this folder; name one"),
        ([str(folder / "a"), "--document", "3"], "there is no document 3; there are 3"),
        ([str(folder / "none")], "no such token file"),
    ):
        assert inspect_tokens.main(arguments) == 2
        assert expected in capsys.readouterr().err
