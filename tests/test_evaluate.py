"""What is measured is what a plain loop over single items measures, whatever the windows, batches and topology."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import harness
import numpy as np
import paddle
import pytest
from conftest import SMALL, configured
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config.cluster import Device
from gpt.config.derived import plain, replace_in
from gpt.config.rules import rule_problems
from gpt.config.schema import Config
from gpt.config.task_schemas import Detokenizer, Evaluate, EvaluateKind
from gpt.data import eval_dataset
from gpt.data.corpus import DatasetInfo, DatasetPart
from gpt.data.eval_dataset import Continuations, Windows
from gpt.parallel.topology import Topology
from gpt.runs import evaluation
from gpt.runs.run_dir import Job
from gpt.train import evaluator
from gpt.train.loggers import build
from gpt.train.trainer import Trainer

VOCAB = 300  # of 384 rows
RNG = np.random.default_rng(7)
IDS = np.repeat(RNG.integers(0, VOCAB, 51), 2)[:101]  # what a model with a tied head can guess
CONTEXTS = [RNG.integers(0, VOCAB, n) for n in (3, 40, 1, 17, 29)]
ENDS = [RNG.integers(0, VOCAB, n) for n in (1, 2, 1, 4, 3)]
TOKENS = Windows(IDS, 0, 101, length=32, stride=12, eot_id=int(IDS[50]))
SENTENCES = Continuations(CONTEXTS, ENDS, length=32)


def configuration(*overrides: str) -> Config:
    """Of a model with larger weights than usual, so that its probabilities are uneven."""
    small = [*SMALL, f"model.vocab={VOCAB}", "model.init_std=0.05", "data=tokens", "data.path=x"]
    return configured([*small, *overrides])


def engine_of() -> Trainer:
    config = configuration()
    engine = Trainer(config, Topology(config.parallel, Device.cpu))
    engine.model.eval()
    return engine


def alone(engine: Trainer, tokens: np.ndarray, last: int) -> list[tuple[float, bool]]:
    """Cross entropy of the ``last`` tokens of a row, and whether each was the arg max, from logits in float64."""
    logits = engine.model(paddle.to_tensor(tokens[None, :-1].astype(np.int64))).numpy()[0, -last:].astype(np.float64)
    each = logits - logits.max(-1, keepdims=True)
    each -= np.log(np.exp(each).sum(-1, keepdims=True))
    return [(-each[i, t], bool(logits[i].argmax() == t)) for i, t in enumerate(tokens[-last:])]


def by_hand(engine: Trainer, windows: Windows) -> tuple[float, int, int]:
    """Sum of cross entropies, tokens, right ones: for each target the one window that counts it, cut at the target."""
    nll, count, right = 0.0, 0, 0
    for target in range(1, len(windows.ids)):
        number = max(0, math.ceil((target - windows.length) / windows.stride))
        if windows.ids[target - 1] == windows.eot_id:
            continue
        ((loss, hit),) = alone(engine, windows.ids[number * windows.stride : target + 1], 1)
        nll, count, right = nll + loss, count + 1, right + hit
    return nll, count, right


# --- rows ---


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_every_token_but_the_first_counts_once_with_enough_before_it(tokens: int, length: int, data: Any) -> None:
    stride = data.draw(st.integers(1, length))
    windows = Windows(np.arange(100, 100 + tokens), 0, tokens, length, stride, None)
    seen = []
    for number in range(len(windows)):
        batch = windows.batch(number, 1)
        assert batch.inputs_BT.shape[1] <= length
        for place in np.flatnonzero(batch.mask_BT[0]):
            token = int(batch.labels_BT[0, place])
            assert batch.inputs_BT[0, : place + 1].tolist() == list(range(token - place - 1, token))
            assert place >= min(length - stride, token - 101)
            seen.append(token)
    assert seen == list(range(101, 100 + tokens))
    assert windows.counted() == max(tokens - 1, 0)


def test_what_follows_end_of_text_does_not_count() -> None:
    windows = Windows(np.array([5, 0, 6, 7, 0, 8]), 0, 6, length=3, stride=2, eot_id=0)
    batch = windows.batch(0, len(windows))
    assert batch.labels_BT[batch.mask_BT > 0].tolist() == [0, 7, 0]
    assert windows.counted() == 3


def test_a_context_too_long_loses_its_beginning_and_that_is_counted() -> None:
    rows = Continuations([np.arange(10), np.arange(2)], [np.array([20, 21]), np.array([30])], length=5)
    assert rows.cut == 1
    batch = rows.batch(0, 2)
    assert batch.inputs_BT.tolist() == [[6, 7, 8, 9, 20], [0, 1, 0, 0, 0]]
    assert batch.labels_BT[0, batch.mask_BT[0] > 0].tolist() == [20, 21]
    assert batch.labels_BT[1, batch.mask_BT[1] > 0].tolist() == [30]


# --- sums ---


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 12, 32])
def test_overlapping_windows_are_a_loop_over_single_tokens(stride: int, batch_size: int) -> None:
    engine = engine_of()
    windows = Windows(IDS, 0, 101, 32, stride, int(IDS[50]))
    nll, count, right = by_hand(engine, windows)
    found = engine.evaluator.totals(windows, batch_size)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert (found.tokens, found.right, found.rows) == (count, right, len(windows))
    some = engine.evaluator.totals(windows, batch_size, limit=3)
    assert (some.rows, some.tokens < count) == (3, len(windows) > 3)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_cloze_is_a_loop_over_single_passages(batch_size: int) -> None:
    engine = engine_of()
    pairs = list(zip(CONTEXTS, ENDS, strict=True))
    # Two passages that the model completes, one of which has its last token wrong.
    for i, extra in ((0, 0), (2, 1)):
        best = int(engine.model(paddle.to_tensor(CONTEXTS[i][None])).numpy()[0, -1].argmax())
        pairs[i] = (CONTEXTS[i], np.array([best] + [(best + 1) % VOCAB] * extra))
    each = [alone(engine, np.concatenate(pair)[-33:], len(pair[1])) for pair in pairs]
    rows = Continuations([c for c, _ in pairs], [e for _, e in pairs], 32)
    found = engine.evaluator.totals(rows, batch_size)
    assert found.nll == pytest.approx(sum(loss for one in each for loss, _ in one), rel=1e-5)
    assert found.tokens == sum(len(one) for one in each)
    assert found.rows == len(pairs)
    expected = [all(hit for _, hit in one) for one in each]
    assert expected[:3] == [True, False, False]
    assert found.rows_right == sum(expected)
    by_row = {
        rows.order[first + i]: nll for first, s in engine.evaluator.row_scores(rows, 1) for i, nll in enumerate(s.nll_B)
    }
    assert by_row[1] == pytest.approx(sum(loss for loss, _ in each[1]), rel=1e-5)


def test_padding_rows_and_the_size_of_a_piece_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    expected = engine.evaluator.totals(TOKENS, 2)
    monkeypatch.setattr("gpt.model.token_scores.LOGITS", 384 * 5)  # five rows at once
    word = engine.parameters["word.weight"]
    values = word.numpy()
    values[VOCAB:] = 50 * np.abs(values).max() * RNG.standard_normal((84, 32))
    word.set_value(values)
    found = engine.evaluator.totals(TOKENS, 2)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert found.right == expected.right > 10


def test_it_stops_between_two_batches() -> None:
    asked = iter([False, False, True])
    with pytest.raises(evaluator.Interrupted):
        engine_of().evaluator.totals(TOKENS, 1, stop=lambda: next(asked))
    assert list(asked) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mp2", "pp2", "dp2"])
def test_the_sums_are_those_of_one_process(layout: str) -> None:
    # Five batches, one of them smaller, over two replicas or a pipeline that takes two at a time.
    engine = engine_of()
    expected = [vars(engine.evaluator.totals(rows, 2)) for rows in (TOKENS, SENTENCES)]
    overrides = [f"parallel={layout}", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
    config = plain(configuration(*overrides))
    for found in harness.run("ranks:measured", 2, config):
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-6)


# --- texts ---


def test_wikitext_is_put_together_again() -> None:
    raw = ' = Valkyria = \n \n A 1 @,@ 500 @.@ 5 @-@ ton ship ( or two ) ; " the first " was the crew \'s . \n'
    assert eval_dataset.detokenize(raw, Detokenizer.none) == raw
    assert eval_dataset.detokenize(raw, Detokenizer.wikitext) == (
        ' = Valkyria =\n\nA 1,500.5-ton ship (or two); "the first" was the crew\'s.\n'
    )


def test_figures_of_a_text_are_per_token_word_and_byte() -> None:
    found = evaluation.of_text(2.5, predicted=1100, words=1001, size=5000)
    assert found["perplexity"] == math.exp(2.5)
    assert found["token_ratio"] == pytest.approx(1.1)
    assert found["adjusted_perplexity"] == pytest.approx(math.exp(2.5 * 1.1))
    assert found["bits_per_byte"] == pytest.approx(2.5 * 1100 / math.log(2) / 5000)
    assert evaluation.of_text(50.0, 10, 10, 10)["perplexity"] == math.exp(20)


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected"),
    [
        ("no.jsonl", None, "cloze", ["no such file"]),
        ("a.txt", b"", "text", ["there is no text in it"]),
        ("a.txt", b" \n\n", "text", ["there is no text in it"]),
        ("a.txt", b"\xff\xfe", "text", ["a.txt: not UTF-8"]),
        ("a.jsonl", b'{"text": "a b"}\n{"txt": "a"}\n[1]\n', "text", ["line 2: no key", "line 3: not a"]),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": 3}\n', "cloze", ["line 1: fewer than two", "line 3: 'text' is int"]),
        ("a.parquet", b"PAR1", "text", ["not .parquet"]),
        ("a.txt.gz", b"no gzip", "text", ["cannot be read"]),
        ("", None, "text", ["a folder; name one file"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_line_by_line(
    tmp_path: Path, name: str, content: bytes | None, kind: str, expected: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    settings = Evaluate(kind=EvaluateKind(kind), path=str(tmp_path / name), json_key="text")
    found = eval_dataset.problems(settings)
    assert len(found) == len(expected)
    assert all(part in problem for part, problem in zip(expected, found, strict=True)), found


def test_texts_are_read_packed_and_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"body": "one two"}\n{"body": "three"}'))
    settings = Evaluate(kind=EvaluateKind.text, path=str(tmp_path / "a.jsonl.gz"), json_key="body")
    assert eval_dataset.read(settings) == ["one two", "three"]
    (tmp_path / "wiki.test.tokens").write_text(" = A = \n\n b c\n")
    assert eval_dataset.read(Evaluate(kind=EvaluateKind.text, path=str(tmp_path / "wiki.test.tokens"))) == [
        " = A = \n\n b c\n"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluate.kind=text"], "evaluate.kind=text reads a file: name it with evaluate.path=..."),
        (["evaluate.path=x"], "evaluate.path=x goes with evaluate.kind=text or cloze"),
        (["evaluate.detokenizer=wikitext"], "evaluate.detokenizer=wikitext goes with evaluate.kind=text, not split"),
        (["evaluate.kind=cloze", "evaluate.path=x", "evaluate.stride=4"], "kind=cloze has passages, not windows"),
        (["evaluate.stride=0"], "evaluate.stride=0: must be at least 1"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_named(overrides: list[str], expected: str) -> None:
    config = configured(["task=evaluate"])
    for override in overrides:
        key, value = override.split("=")
        kinds: Any = {"kind": EvaluateKind, "detokenizer": Detokenizer, "stride": int, "path": str}
        config = replace_in(config, {key: kinds[key.removeprefix("evaluate.")](value)})
    found = rule_problems(config)
    assert len(found) == 1
    assert expected in found[0]


def job(tmp_path: Path, *overrides: str) -> Job:
    config = configured(["task=evaluate", *overrides])
    config = replace_in(config, {"checkpoint": str(tmp_path)})
    return Job(config, DatasetInfo([DatasetPart("x", 1.0)], "f", None, None, None, 100), tmp_path, ["python"])


def test_what_the_run_cannot_do_is_known_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.txt").write_text("some words")
    it = job(tmp_path, "evaluate.kind=text", f"evaluate.path={tmp_path}/a.txt", "evaluate.stride=999")
    found = evaluation.problems(it)
    assert len(found) == 2
    assert "evaluate.stride=999 is longer than the windows of data.seq_len=128 tokens" in found[0]
    assert "has no tokenizer" in found[1]


# --- where it goes ---


def test_the_last_record_of_each_kind_is_kept(tmp_path: Path) -> None:
    evaluation.write(tmp_path, "val split", {"loss": 3.0})
    evaluation.write(tmp_path, "text a.txt", {"loss": 2.0})
    evaluation.write(tmp_path, "val split", {"loss": 1.0})
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found == {"val split": {"loss": 1.0}, "text a.txt": {"loss": 2.0}}
    assert list(evaluation.rows({"token_ratio": 1.5, "tokens": 12345, "detokenizer": "none"})) == [
        ("token ratio", "1.5000"), ("tokens", "12,345"), ("detokenizer", "none"),
    ]  # fmt: skip


class FakeRun:
    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def finish(self) -> None:
        """Nothing."""


class FakeWandb:
    Settings = dict

    def __init__(self, *, opens: bool) -> None:
        self.asked: list[dict[str, Any]] = []
        self.run = FakeRun()
        self.opens = opens

    def init(self, **arguments: Any) -> FakeRun:
        self.asked.append(arguments)
        if arguments.get("resume") == "must" and not self.opens:
            raise RuntimeError("no such run")
        return self.run


@pytest.mark.parametrize(
    ("mode", "trained_with", "opens", "expected"),
    [
        ("online", True, True, [("abc", None)]),  # the run of the training
        ("online", True, False, [("abc", None), (None, "evaluate")]),
        ("online", False, True, [(None, "evaluate")]),
        ("offline", True, True, [(None, "evaluate")]),
    ],
)
def test_wandb_gets_the_figures_in_the_run_of_the_training_if_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, trained_with: bool, opens: bool, expected: Any
) -> None:
    fake = FakeWandb(opens=opens)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    if trained_with:
        (tmp_path / "wandb_id").write_text("abc")
    it = job(tmp_path, "logger=wandb", f"logger.wandb.mode={mode}")
    build.summarise(it, 20, "text some/where/wiki.test.tokens", {"loss": 2.5, "detokenizer": "none"})
    assert [(asked.get("id"), asked.get("job_type")) for asked in fake.asked] == expected
    assert fake.run.summary == {"eval/text wiki.test.tokens/loss": 2.5, "eval/text wiki.test.tokens/step": 20}


def test_tensorboard_gets_them_too(tmp_path: Path) -> None:
    build.summarise(job(tmp_path, "logger=tensorboard"), 20, "val split", {"loss": 2.5})
    assert any((tmp_path / "tensorboard").iterdir())
