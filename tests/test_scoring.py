"""How probable a model says a text is: the numbers of its forward pass, whoever else is scored beside it."""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest
from conftest import configured

from gpt.config.schema import Config
from gpt.inference import logprobs
from gpt.inference.sampling import log_probabilities
from gpt.model import token_scores
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology

TEXTS = [[5, 3, 9, 200, 7, 1, 1, 30], [8, 2], [4], [383, 0, 383]]


def model_of(config: Config) -> GPT:
    model = GPT(config, Topology.initialize(config))
    model.initialise()
    model.eval()
    return model


@pytest.fixture
def model(small: list[str]) -> GPT:
    return model_of(configured([*small, "model.init_std=0.3"]))


@pytest.mark.parametrize(("columns", "logits"), [(256, 1 << 24), (3, 1 << 24), (256, 1000)])
def test_scores_are_those_of_the_forward_pass(
    model: GPT, monkeypatch: pytest.MonkeyPatch, columns: int, logits: int
) -> None:
    monkeypatch.setattr(logprobs, "PREFILL_COLUMNS", columns)
    monkeypatch.setattr(token_scores, "LOGITS", logits)
    for text, scored in zip(TEXTS, logprobs.score(model, TEXTS), strict=True):
        assert len(scored.logprobs) == len(scored.best) == len(scored.best_logprobs) == len(text) - 1
        with paddle.no_grad():
            logits_TV = model(paddle.to_tensor([text])).numpy()[0]
        logprobs_TV = log_probabilities(logits_TV)[:-1]
        np.testing.assert_allclose(scored.logprobs, logprobs_TV[np.arange(len(text) - 1), text[1:]], atol=2e-5)
        np.testing.assert_allclose(scored.best_logprobs, logprobs_TV.max(-1), atol=2e-5)
        assert scored.best == logprobs_TV.argmax(-1).tolist()


def test_a_token_of_the_text_is_as_probable_as_the_best_only_if_it_is_the_best(model: GPT) -> None:
    greedy = [5]
    for _ in range(6):  # each time what the scores of any continuation say is best
        greedy.append(logprobs.score(model, [[*greedy, 0]])[0].best[-1])
    for scored, text in zip(logprobs.score(model, [greedy, TEXTS[0]]), (greedy, TEXTS[0]), strict=True):
        for logprob, best, top, token in zip(scored.logprobs, scored.best, scored.best_logprobs, text[1:], strict=True):
            assert (logprob == top) is (best == token)
            assert logprob <= top
    assert logprobs.score(model, [greedy])[0].best == greedy[1:]


def test_texts_of_one_token_have_no_scores(model: GPT) -> None:
    assert [dataclasses.astuple(s) for s in logprobs.score(model, [[1], [2]])] == [([], [], [])] * 2
