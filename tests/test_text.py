"""Text out of a model: every way to choose, search, batch and cut does what its formula says."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import SMALL, composed, configured

from gpt import cli
from gpt.config import task_schemas
from gpt.config.cluster import Device
from gpt.config.sampling import Sampling
from gpt.inference import prompts
from gpt.inference import sampling as inference_sampling
from gpt.inference.decoder import Decoder
from gpt.inference.detokenizer import IncrementalDetokenizer
from gpt.inference.generator import Generator
from gpt.inference.types import Completion, TextDelta
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.utils import errors
from gpt.utils.arrays import Array

VOCAB, EOT = 258, 256  # bytes, end-of-text, and a token that is never text


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab, eot, digest = VOCAB, EOT, "bytes"

    def encode(self, text: str) -> Array:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def writer() -> Generator:
    """Random weights, large ones, so that what follows depends on all that came before."""
    config = configured([*SMALL, "data=tokens", "data.path=x", f"model.vocab={VOCAB}", "model.init_std=0.4"])
    model = GPT(config, Topology(config.parallel, Device.cpu))
    model.initialise()
    return Generator(model, Bytes(), 7)


def logits(writer: Generator, tokens: list[int]) -> Array:
    """After the last of some tokens, without a cache."""
    writer.model.eval()
    with paddle.no_grad():
        found: Array = writer.model(paddle.to_tensor(np.array([tokens]))).numpy()[0, -1, :VOCAB]
    return found


def greedy(writer: Generator, prompt: list[int], count: int) -> list[int]:
    """By the whole model for every token; over the last half of its positions when they are used up."""
    window, new = list(prompt), []
    for _ in range(count):
        if len(window) > writer.positions:
            window = window[-(writer.positions // 2) :]
        row = logits(writer, window)
        row[EOT] = -np.inf  # the batch is asked for texts of at least this length
        token = int(row.argmax())
        new.append(token)
        window.append(token)
    return new


def texts(found: list[list[Completion]]) -> list[list[list[int]]]:
    return [[text.tokens for text in some] for some in found]


UNEQUAL = [[72, 101], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [200], list(range(30))]


def test_a_batch_of_unequal_prompts_gets_what_each_gets_alone_also_past_the_positions(writer: Generator) -> None:
    found = writer.write(UNEQUAL, Sampling(max_new_tokens=40, min_new_tokens=40, temperature=0))
    assert texts(found) == [[greedy(writer, prompt, 40)] for prompt in UNEQUAL]
    assert writer.positions < 30 + 40


def test_a_batch_draws_what_each_prompt_draws_alone(writer: Generator) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.3, top_k=50, top_p=0.9, num_return_sequences=3, seed=4)
    together = texts(writer.write(UNEQUAL, sampling))
    alone = [texts(writer.write([prompt], sampling))[0] for prompt in UNEQUAL]
    assert together == alone
    assert len({tuple(text) for some in together for text in some}) == len(UNEQUAL) * 3  # all of them differ
    other = Sampling(**{**vars(sampling), "seed": 5})
    assert texts(writer.write(UNEQUAL, other)) != together


def test_rows_that_are_taken_elsewhere_go_on_with_their_own_past(writer: Generator) -> None:
    decoder = Decoder(writer.model, [[5, 6, 7], [8]], 10)
    decoder.step([1, 2])
    decoder.select_rows([1, 0, 1])
    decoder.step([3, 4, 5])
    for row, past in enumerate([[8, 2, 3], [5, 6, 7, 1, 4], [8, 2, 5]]):
        np.testing.assert_allclose(decoder.logits_BV[row], logits(writer, past), rtol=1e-3, atol=1e-3)


def test_a_long_prompt_is_read_in_parts(writer: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.inference.decoder.PREFILL_COLUMNS", 7)
    rows = [list(range(30)), [9]]
    decoder = Decoder(writer.model, rows, 1)
    for row, past in enumerate(rows):
        np.testing.assert_allclose(decoder.logits_BV[row], logits(writer, past), rtol=1e-3, atol=1e-3)


def test_rows_that_pad_the_table_are_not_among_what_can_be_chosen(writer: Generator) -> None:
    table = writer.model.word.weight
    before = table.numpy()
    try:
        table.set_value(np.concatenate([before[:VOCAB], 100 * np.ones_like(before[VOCAB:])]))
        decoder = Decoder(writer.model, [[1], [2, 3]], 1)
        assert (table.shape[0], decoder.logits_BV.shape) == (384, (2, VOCAB))
    finally:
        table.set_value(before)


# --- choosing ---


def drawn(logits_V: Array, sampling: Sampling, count: int = 4000) -> Array:
    rng = np.random.default_rng(0)
    chosen = [inference_sampling.sample_token(logits_V, sampling, rng) for _ in range(count)]
    return np.bincount(chosen, minlength=len(logits_V)) / count


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits_V = np.array([0.0, 1.0, -1.0, 2.0], dtype=np.float32)
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
        np.testing.assert_allclose(drawn(logits_V, Sampling(1, temperature=temperature)), expected, atol=0.03)


def test_top_k_and_top_p_cut_the_tail_and_temperature_0_is_greedy() -> None:
    logits_V = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    np.testing.assert_allclose(drawn(logits_V, Sampling(1, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(logits_V, Sampling(1, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(logits_V, Sampling(1, top_p=0.81)), [0.526, 0.316, 0.158, 0], atol=0.03)
    assert drawn(logits_V, Sampling(1, temperature=0), 10)[0] == 1


def test_the_repetition_penalty_lowers_what_was_there_whatever_its_sign() -> None:
    logits_V = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    after = inference_sampling.apply_penalties(logits_V, Sampling(1, repetition_penalty=2.0), [0, 1, 1], 0, None)
    assert after.tolist() == [1.0, -4.0, 1.0]
    assert logits_V.tolist() == [2.0, -2.0, 1.0]


def test_a_text_ends_at_end_of_text_but_not_before_its_least_length(writer: Generator) -> None:
    likely = writer.model.word.weight
    before = likely.numpy()
    try:
        eot_first = before.copy()
        eot_first[EOT] *= 100  # among the largest logits after almost anything
        likely.set_value(eot_first)
        plain = Sampling(max_new_tokens=30, temperature=1.5)
        found = [text for some in writer.write(UNEQUAL, plain) for text in some]
        ended = [text for text in found if len(text.tokens) < 30]
        assert ended
        assert {text.finish for text in ended} == {"stop"}
        later = writer.write(UNEQUAL, Sampling(max_new_tokens=30, min_new_tokens=12, temperature=1.5))
        assert min(len(text.tokens) for some in later for text in some) >= 12
        assert all(EOT not in text.tokens for some in later for text in some)
    finally:
        likely.set_value(before)


def test_log_probabilities_are_the_models(writer: Generator) -> None:
    [[found]] = writer.write([UNEQUAL[1]], Sampling(max_new_tokens=5, temperature=0.7, top_k=5))
    for i, (token, logprob) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        row = logits(writer, UNEQUAL[1] + found.tokens[:i]).astype(np.float64)
        assert logprob == pytest.approx(row[token] - np.log(np.exp(row).sum()), abs=1e-3)


# --- beam search ---


def test_wide_beams_find_the_most_probable_text_of_all() -> None:
    """Every text of up to three tokens of a small vocabulary, by brute force."""
    config = configured([*SMALL, "data=tokens", "data.path=x", "model.vocab=6", "model.init_std=0.6"])
    model = GPT(config, Topology(config.parallel, Device.cpu))
    model.initialise()

    class Few(Bytes):
        vocab, eot = 6, 5

    writer = Generator(model, Few(), 0)
    model.eval()

    def score(tokens: tuple[int, ...], penalty: float) -> float:
        whole, total = [0, 1, *tokens], 0.0
        with paddle.no_grad():
            rows = model(paddle.to_tensor(np.array([whole]))).numpy()[0, :, :6].astype(np.float64)
        for i, token in enumerate(tokens):
            total += rows[1 + i, token] - np.log(np.exp(rows[1 + i]).sum())
        return float(total / len(tokens) ** penalty)

    for penalty in (0.0, 1.0, 2.0):
        full = itertools.product(range(5), repeat=3)
        ended = [(*t, 5) for n in (0, 1, 2) for t in itertools.product(range(5), repeat=n)]
        ranked = sorted([*full, *ended], key=lambda t: -score(t, penalty))
        sampling = Sampling(max_new_tokens=3, num_beams=200, num_return_sequences=4, length_penalty=penalty)
        [found] = writer.write([[0, 1]], sampling)
        expected = [[t for t in tokens if t != 5] for tokens in ranked[:4]]
        assert [text.tokens for text in found] == expected


def test_one_beam_of_a_batch_is_that_prompts_own(writer: Generator) -> None:
    sampling = Sampling(max_new_tokens=12, num_beams=4, num_return_sequences=2)
    assert texts(writer.write(UNEQUAL, sampling)) == [texts(writer.write([p], sampling))[0] for p in UNEQUAL]


def test_beams_find_texts_at_least_as_probable_as_greedy(writer: Generator) -> None:
    for prompt in UNEQUAL:
        [[greedy_text]] = writer.write([prompt], Sampling(max_new_tokens=8, temperature=0))
        [[best]] = writer.write([prompt], Sampling(max_new_tokens=8, num_beams=6, length_penalty=0.0))
        assert sum(best.logprobs) >= sum(greedy_text.logprobs) - 1e-4


# --- the text itself ---


def test_pieces_add_up_to_the_text_and_no_half_character_is_shown(writer: Generator) -> None:
    heard: list[TextDelta] = []
    sampling = Sampling(max_new_tokens=25, temperature=1.2, num_return_sequences=2)
    found = writer.write(UNEQUAL[:2], sampling, heard.append)
    for p, s in itertools.product(range(2), range(2)):
        pieces = [piece for piece in heard if (piece.prompt, piece.sequence) == (p, s)]
        assert "".join(piece.text for piece in pieces) == found[p][s].text
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish == found[p][s].finish


def test_a_character_of_several_tokens_appears_when_it_is_whole() -> None:
    growing = IncrementalDetokenizer(Bytes(), [72], ())
    assert [growing.add(byte) for byte in "aé北".encode()] == ["a", "", "é", "", "", "北"]


def test_a_text_ends_before_a_stop_string_of_which_nothing_is_shown() -> None:
    growing = IncrementalDetokenizer(Bytes(), [], ("\n\n", "END."))
    shown = []
    for byte in b"one\ntwo EN three END. four":
        shown.append(growing.add(byte))
        if growing.stopped:
            break
    assert "".join(shown) + growing.flush() == "one\ntwo EN three "
    assert growing.text == "one\ntwo EN three "


def test_a_word_keeps_the_space_that_its_tokenizer_writes_only_inside_a_text() -> None:
    class Words(Bytes):
        """As SentencePiece: the space before the first word of what is decoded is left out."""

        def decode(self, ids: list[int]) -> str:
            return "".join(f" w{i}" for i in ids)[1:]

    growing = IncrementalDetokenizer(Words(), [1, 2], ())
    assert growing.add(3) + growing.add(4) == " w3 w4"


def test_what_says_stop_is_heard_before_the_next_token(writer: Generator) -> None:
    answers = iter([True, True, True, False])
    sampling = Sampling(max_new_tokens=30, min_new_tokens=30, temperature=0)
    [[found]] = writer.write([[1]], sampling, keep_going=lambda: next(answers))
    assert len(found.tokens) == 3


# --- prompts ---


def settings(**changed: object) -> task_schemas.Generate:
    return dataclasses.replace(configured([*SMALL, "data=tokens", "data.path=x"]).generate, **changed)  # type: ignore[arg-type]


def test_prompts_come_from_lines_and_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two\\nlines", "id": 3}\n')
    assert prompts.read(settings(prompts=str(tmp_path / "a.txt"))) == ["one", "two words"]
    assert prompts.read(settings(prompts=str(tmp_path / "a.jsonl"))) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "cannot be read"),
        ("empty.txt", "\n\n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "one"}\n{"text": 1}\n', 'line 2: not a JSON object with a "prompt"'),
        ("torn.jsonl", '{"prompt": ', "line 1: not a JSON object"),
    ],
)
def test_a_bad_file_of_prompts_is_a_sentence(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(errors.UserError, match=said):
        prompts.read(settings(prompts=str(tmp_path / name)))


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    from gpt.data import tokenizer

    path = tmp_path / "tokenizer.json"
    tokenizer.train(["some words " * 50], 260, path)
    return path


def test_everything_wrong_with_a_generation_is_said_at_once(tmp_path: Path, vocabulary: Path) -> None:
    config = configured([*SMALL, "data=tokens", "data.path=x", "parallel=dp2"])
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "z" * 40}) + "\n" + json.dumps({"prompt": ""}) + "\n")
    files = settings(prompts=str(tmp_path / "p.jsonl"), output=str(tmp_path / "there.jsonl"))
    config = dataclasses.replace(config, generate=files)
    found = prompts.check(config, vocabulary)
    assert [next(i for i, f in enumerate(found) if said in f) for said in ("exists", "prompt 1 has 40", "prompt 2;")]
    config = dataclasses.replace(config, generate=settings(interactive=True, prompts="x"))
    assert len(prompts.check(config, vocabulary)) == 2
    assert "no tokenizer" in prompts.check(config, None)[0]


def test_impossible_sampling_is_all_named() -> None:
    bad = Sampling(0, -1, -0.5, -2, 0.0, 0.0, ("",), 3, 2, float("inf"))
    text = "\n".join(bad.problems())
    for key in ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop",
                "num_return_sequences", "length_penalty"):  # fmt: skip
        assert f"generate.{key}" in text
    assert Sampling(8, 8, 0, 0, 1, 1, (), 2, 2, -1).problems() == []


@pytest.mark.parametrize(
    "prompt", ["Hello, (world)!", "北京 is", "two\nlines", 'it\'s "q"', "end\\", "{a: b}", "The ", "null"]
)
def test_a_prompt_is_text_whatever_is_in_it(prompt: str) -> None:
    config, choices = composed(["data=tokens", "data.path=x", f"prompt={prompt}"])
    assert cli.resolve(config, choices, []).config.generate.prompt == prompt
    config, choices = composed(["data=tokens", "data.path=x", "generate.prompt='as Hydra wants it '"])
    assert cli.resolve(config, choices, []).config.generate.prompt == "as Hydra wants it "
