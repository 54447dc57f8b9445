"""What an evaluation harness asks of a model on one rank: how likely a continuation is, and how a text goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt import checkpoint, measure
from gpt.config import UserError
from gpt.data.windows import Endings
from gpt.engine import Engine
from gpt.log import say
from gpt.runs import Job
from gpt.text.request import Sampling
from gpt.text.writer import ModelWriter
from gpt.topology import Topology

NEW_TOKENS = 256  # of a text whose task does not say


class Answers:
    """The checkpoint that a job names.

    Args:
        job: on one rank.

    Raises:
        UserError: it is damaged, or has no tokenizer with an end-of-text.
    """

    def __init__(self, job: Job) -> None:
        topology = Topology.connect(job.config)
        found = checkpoint.require(Path(str(job.config.checkpoint)), lambda line: say(f"WARNING: {line}"), topology)
        encoder = found.encoder()
        if encoder.eot is None:
            raise UserError(f"{found.tokenizer}: no end-of-text, which stands before a text that has nothing before it")
        self.eot = encoder.eot
        self.length = job.config.data.seq_len
        self._engine = Engine(job.config, topology, train=False)
        self._engine.load(found.model(), None, {})
        self._engine.model.eval()
        self._writer = ModelWriter(self._engine.model, encoder, int(found.state["step"]))

    def encode(self, text: str) -> list[int]:
        """Token numbers."""
        return self._writer.encode(text)

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log probability of the continuation, and whether greedy would write it.

        Args:
            pairs: token numbers; the context has one or more. What is too long loses its beginning.
            batch_size: pairs of one forward pass.
        """
        contexts, endings = ([np.array(pair[part], dtype=np.int64) for pair in pairs] for part in (0, 1))
        rows = Endings(contexts, endings, self.length)
        found = [(0.0, True)] * len(pairs)
        for first, some in measure.scored(self._engine, rows, batch_size):
            for i, (nll, tokens, right) in enumerate(zip(some.nll_B, some.tokens_B, some.right_B, strict=True)):
                found[rows.order[first + i]] = -float(nll), bool(right == tokens)
        return found

    def text(self, prompt: str, settings: Mapping[str, Any]) -> str:
        """How a prompt goes on.

        Args:
            prompt: of what is too long the end is read.
            settings: as lm-eval's tasks give them: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``,
                ``top_k``, ``top_p``; greedy without ``do_sample``.
        """
        until = settings.get("until") or []
        sampled = bool(settings.get("do_sample", False))
        sampling = Sampling(
            max_new_tokens=int(settings.get("max_gen_toks", NEW_TOKENS)),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )
        tokens = self.encode(prompt)[-max(1, self.length - sampling.max_new_tokens) :] or [self.eot]
        return self._writer.write([tokens], sampling)[0][0].text
