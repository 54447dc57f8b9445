"""A trained run is measured on text and on last words as by hand, by the command and by lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import Ran, configured

from gpt.config.derived import one_rank
from gpt.data import tokenizer
from gpt.lm_eval import EvalModel, register, trained_job
from gpt.parallel.topology import Topology
from gpt.runs import source
from gpt.runs.checkpoint import checkpoint
from gpt.tasks.workers import evaluate
from gpt.train.trainer import Trainer
from gpt.utils.signals import Signals

pytestmark = pytest.mark.slow
Run = Callable[..., Ran]
LONG = "the first line of the file and " * 12  # of more tokens than the model reads
PASSAGES = ["The default value is None", f"{LONG}the second line", "If true, return a new", "a b"]
TEXT = " = Paths = \n \n The first @-@ class path ( of two ) is a str , not a 1 @,@ 000 byte buffer . \n" * 5


class Hand:
    """The trained model, one row at a time, in float64."""

    def __init__(self, run_dir: Path) -> None:
        job = source.job(configured(["task=evaluate", f"checkpoint={run_dir}"]), run_dir)
        found = checkpoint.load_or_fail(run_dir, print)
        self.engine = Trainer(
            one_rank(job.config), Topology(job.config.parallel, job.config.cluster.device), train=False
        )
        self.engine.load(found.model(), None, {})
        self.engine.model.eval()
        assert found.tokenizer
        self.encoder = tokenizer.open_encoder(found.tokenizer)

    def ending(self, context: list[int], ending: list[int]) -> tuple[float, bool]:
        """Log probability, and whether every token is the arg max."""
        row = [*context, *ending][-33:]
        logits = self.engine.model(paddle.to_tensor([row[:-1]])).numpy()[0, -len(ending) :].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        value = sum(float(log_p[i, t]) for i, t in enumerate(ending))
        return value, all(int(logits[i].argmax()) == t for i, t in enumerate(ending))

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.encoder.encode(text)]


@pytest.fixture(scope="module")
def hand(whole: Path) -> Hand:
    return Hand(whole)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with both kinds of file."""
    (tmp_path / "wiki.test.tokens").write_text(TEXT)
    (tmp_path / "cloze.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return tmp_path


def last_words(hand: Hand) -> list[tuple[float, bool, int]]:
    found = []
    for passage in PASSAGES:
        context, word = passage.rsplit(None, 1)
        ending = hand.encode(f" {word}")
        found.append((*hand.ending(hand.encode(context), ending), len(ending)))
    return found


def test_text_and_last_words_by_the_command(gpt: Run, whole: Path, hand: Hand, files: Path) -> None:
    where = f"checkpoint={whole}"
    ran = gpt(
        "task=evaluate", where, "evaluate.kind=text", "evaluate.path=wiki.test.tokens", "evaluate.stride=5",
        "evaluate.detokenizer=wikitext", "evaluate.batch_size=3", "logger=tensorboard",
    )  # fmt: skip
    assert ran.code == 0, ran.text
    assert "== text wiki.test.tokens ==\n" in ran.out
    assert "adjusted perplexity  " in ran.out
    found = json.loads((whole / "evaluation.json").read_text())["text wiki.test.tokens"]
    readable = " = Paths =\n\nThe first-class path (of two) is a str, not a 1,000 byte buffer.\n" * 5
    readable = readable.replace(".\n =", ".\n=")  # the space that begins a line goes too
    ids = hand.encode(readable)
    nll = 0.0
    for target in range(1, len(ids)):
        begin = 5 * max(0, math.ceil((target - 32) / 5))
        nll -= hand.ending(ids[begin:target], [ids[target]])[0]
    words, size = len(TEXT.split()), len(TEXT)
    ratio = (len(ids) - 1) / (words - 1)
    assert found["tokens"] == len(ids) - 1
    assert (found["words"], found["bytes"], found["stride"]) == (words, size, 5)
    assert found["loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert found["token_ratio"] == pytest.approx(ratio)
    assert found["adjusted_perplexity"] == pytest.approx(min(math.exp(20), math.exp(found["loss"] * ratio)))
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert any((whole / "tensorboard").iterdir())

    ran = gpt("task=evaluate", where, "evaluate.kind=cloze", "evaluate.path=cloze.jsonl", "parallel=mp2")
    assert ran.code == 0, ran.text
    records = json.loads((whole / "evaluation.json").read_text())
    assert {"text wiki.test.tokens", "cloze cloze.jsonl"} <= set(records)
    found, expected = records["cloze cloze.jsonl"], last_words(hand)
    assert (found["passages"], found["cut_at_the_beginning"], found["step"]) == (4, 1, 12)
    assert found["correct"] == sum(right for _, right, _ in expected)
    assert found["tokens"] == sum(count for *_, count in expected)
    total = -sum(value for value, *_ in expected)
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / 4), rel=1e-4)


def test_what_is_wrong_leaves_nothing_behind(gpt: Run, whole: Path, files: Path) -> None:
    before = sorted(whole.rglob("*"))
    ran = gpt(
        "task=evaluate", f"checkpoint={whole}", "evaluate.kind=text", "evaluate.path=no.txt", "evaluate.stride=99"
    )
    assert ran.code == 2
    assert "2 problems, nothing was started" in ran.err
    assert "evaluate.stride=99 is longer than the windows of data.seq_len=32 tokens" in ran.err
    assert "evaluate.path=no.txt: no such file" in ran.err
    assert sorted(whole.rglob("*")) == before
    ran = gpt(
        "task=evaluate", f"checkpoint={whole}", "data=text", "data.path=wiki.test.tokens", "data.extensions=[.tokens]"
    )
    assert ran.code == 2
    assert "this data is of another tokenizer than the model" in ran.err


def test_a_split_is_every_token_of_its_documents(whole: Path, hand: Hand, tmp_path: Path) -> None:
    ask = ["task=evaluate", f"checkpoint={whole}", "evaluate.split=val", "evaluate.stride=20", "evaluate.max_samples=4"]
    job = source.job(configured(ask), tmp_path)
    assert evaluate.run(job, Signals()) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["val split"]
    from gpt.data import token_files

    token_set = token_files.load(job.data.parts[0].path)
    first = token_files.split_bounds(token_set.documents, job.config.data.split)[1]
    ids = [int(i) for i in token_set.ids[int(token_set.document_ends[first - 1]) :][: 32 + 3 * 20 + 1]]
    nll, count = 0.0, 0
    for target in range(1, len(ids)):
        if ids[target - 1] != job.data.eot_id:
            begin = 20 * max(0, math.ceil((target - 32) / 20))
            nll, count = nll - hand.ending(ids[begin:target], [ids[target]])[0], count + 1
    assert (found["windows"], found["tokens"]) == (4, count)
    assert found["loss"] == pytest.approx(nll / count, rel=1e-5)


# --- lm-eval ---


def task(folder: Path, name: str, **settings: Any) -> None:
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "cloze.jsonl")}}
    context = {"doc_to_text": "{{text.rsplit(None, 1)[0]}}", "doc_to_target": "{{' ' + text.rsplit(None, 1)[1]}}"}
    (folder / f"{name}.yaml").write_text(json.dumps({**common, "test_split": "train", **context, **settings}))


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_the_same(whole: Path, hand: Hand, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(key, str(files / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval as eleuther  # gpt.lm_eval has the short name here
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    task(files, "last_word", output_type="loglikelihood", metric_list=[{"metric": "acc"}, {"metric": "perplexity"}])
    task(files, "texts", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
         metric_list=[{"metric": "bits_per_byte"}])  # fmt: skip
    task(files, "go_on", output_type="generate_until", generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
         metric_list=[{"metric": "exact_match"}])  # fmt: skip
    register()
    model = get_model("gpt")(checkpoint=str(whole), batch_size=3, device="cpu")
    manager = TaskManager(include_path=str(files), include_defaults=False)
    ran = eleuther.simple_evaluate(
        model, tasks=["last_word", "texts", "go_on"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    expected = last_words(hand)
    found = ran["results"]["last_word"]
    assert found["acc,none"] == sum(right for _, right, _ in expected) / 4
    assert found["perplexity,none"] == pytest.approx(math.exp(-sum(value for value, *_ in expected) / 4), rel=1e-4)

    nll = 0.0
    for passage in PASSAGES:
        ids = hand.encode(passage)
        for begin in range(0, len(ids), 32):  # whole windows, the last one moved back; each after one token more
            last = min(begin + 32, len(ids))
            before = [hand.encoder.eot, *ids][max(0, last - 32) : begin + 1]
            nll -= hand.ending([int(i or 0) for i in before], ids[begin:last])[0]
    size = sum(len(passage.encode()) for passage in PASSAGES)
    assert ran["results"]["texts"]["bits_per_byte,none"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    answers = [sample["resps"][0][0] for sample in ran["samples"]["go_on"]]
    assert len(answers) == 4
    assert all("\n" not in answer for answer in answers)


def test_a_text_goes_on_greedily_up_to_a_stop(whole: Path, hand: Hand) -> None:
    model = EvalModel(trained_job(str(whole), "fp32", on_cpu=True))
    ids = hand.encode("The default")
    for _ in range(6):
        ids.append(int(hand.engine.model(paddle.to_tensor([ids])).numpy()[0, -1].argmax()))
    expected = hand.encoder.decode(ids[len(hand.encode("The default")) :])
    assert model.generate("The default", {"max_gen_toks": 6}) == expected
    middle = expected[len(expected) // 2]
    found = model.generate("The default", {"max_gen_toks": 6, "until": [middle]})
    assert found == expected[: expected.index(middle)]
    assert model.generate("", {"max_gen_toks": 2})
