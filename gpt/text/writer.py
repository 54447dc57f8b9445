"""A checkpoint at work: prompts in, texts out, under any topology."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import paddle

from gpt import checkpoint, whole
from gpt.checkpoint import Checkpoint
from gpt.config import DType, UserError
from gpt.data.tokenizer import Encoder
from gpt.engine import PADDLE_DTYPE
from gpt.log import say
from gpt.model import GPT
from gpt.runs import Job
from gpt.shapes import parameter_shapes
from gpt.text import scoring
from gpt.text.beams import beams
from gpt.text.decoder import Decoder
from gpt.text.request import Completion, Piece, Sampling, Scored
from gpt.text.search import sample
from gpt.topology import Topology


class ModelWriter:
    """Implements ``gpt.text.request.Writer`` and ``Scorer``.

    All ranks of a replica are asked alike, and come to the same texts.

    Args:
        model: whose topology says which ranks take part.
        encoder: of its text.
        step: of the checkpoint.
    """

    def __init__(self, model: GPT, encoder: Encoder, step: int) -> None:
        self.model = model
        self.encoder = encoder
        self.step = step
        self.positions = model.config.model.positions
        self.vocab = encoder.vocab

    @classmethod
    def of(cls, job: Job, topology: Topology) -> ModelWriter:
        """The checkpoint that the job names.

        Raises:
            UserError: it is damaged, or has no tokenizer, or is of another model.
        """
        found = checkpoint.require(Path(str(job.config.checkpoint)), lambda line: say(f"WARNING: {line}"), topology)
        encoder = found.encoder()
        return cls(_read(job, topology, found), encoder, int(found.state["step"]))

    def encode(self, text: str) -> list[int]:
        """Token numbers of a prompt."""
        tokens: list[int] = self.encoder.encode(text).tolist()
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Their text."""
        return self.encoder.decode(tokens)

    def score(self, texts: list[list[int]]) -> list[Scored]:
        """See ``gpt.text.request.Scorer``."""
        self.model.eval()
        return scoring.score(self.model, texts)

    def write(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        on_piece: Callable[[Piece], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """See ``gpt.text.request.Writer``."""
        self.model.eval()
        go_on = keep_going or (lambda: True)
        decoder = Decoder(self.model, prompts, sampling.max_new_tokens)
        if sampling.num_beams > 1:
            return beams(decoder, prompts, sampling, self.encoder, go_on)
        return sample(decoder, prompts, sampling, self.encoder, on_piece or (lambda piece: None), go_on)


def _read(job: Job, topology: Topology, found: Checkpoint) -> GPT:
    """This rank's part of the model."""
    dtype = job.config.precision.dtype

    def settle(prefix: str, part: paddle.nn.Layer) -> None:
        if dtype is not DType.fp32:
            part.to(dtype=PADDLE_DTYPE[dtype])

    model, source = GPT(job.config, topology, settle), found.model()
    try:
        whole.require_same(source.shapes, parameter_shapes(job.config))
    except ValueError as error:
        raise UserError(f"{found.path}: {error}") from error
    for name, p in model.logical_parameters().items():
        p.set_value(paddle.to_tensor(whole.own_slice(topology, p, source, name)).astype(p.dtype))
    model.eval()
    return model
