"""Generate and score texts with a checkpoint, under any topology."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import paddle

from gpt.config.derived import PADDLE_DTYPE
from gpt.config.parameters import parameter_shapes
from gpt.config.sampling import Sampling
from gpt.config.schema import DType
from gpt.data.tokenizer import Encoder
from gpt.inference import logprobs
from gpt.inference.beam_search import beam_search
from gpt.inference.decoder import Decoder
from gpt.inference.sampling import sample
from gpt.inference.types import Completion, TextDelta, TokenLogprobs
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint, reshard
from gpt.runs.checkpoint.checkpoint import Checkpoint
from gpt.runs.run_dir import Job
from gpt.utils.console import say
from gpt.utils.errors import UserError


class Generator:
    """Implements ``gpt.inference.types.TextGenerator`` and ``Scorer``; a collective call of the ranks of a replica."""

    def __init__(self, model: GPT, encoder: Encoder, step: int) -> None:
        self.model = model
        self.encoder = encoder
        self.step = step
        self.positions = model.config.model.positions
        self.vocab = encoder.vocab

    @classmethod
    def of(cls, job: Job, topology: Topology) -> Generator:
        """Load the checkpoint that the job names.

        Raises:
            UserError: it is damaged, or has no tokenizer, or is of another model.
        """
        loaded = checkpoint.load_or_fail(
            Path(str(job.config.checkpoint)), lambda line: say(f"WARNING: {line}"), topology
        )
        encoder = loaded.encoder()
        return cls(_load_model(job, topology, loaded), encoder, int(loaded.state["step"]))

    def encode(self, text: str) -> list[int]:
        """Return token numbers of a prompt."""
        tokens: list[int] = self.encoder.encode(text).tolist()
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token numbers."""
        return self.encoder.decode(tokens)

    def score(self, texts: list[list[int]]) -> list[TokenLogprobs]:
        """See ``gpt.inference.types.Scorer``."""
        self.model.eval()
        return logprobs.score(self.model, texts)

    def write(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        on_piece: Callable[[TextDelta], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """See ``gpt.inference.types.TextGenerator``."""
        self.model.eval()
        keep_going = keep_going or (lambda: True)
        decoder = Decoder(self.model, prompts, sampling.max_new_tokens)
        if sampling.num_beams > 1:
            return beam_search(decoder, prompts, sampling, self.encoder, keep_going)
        return sample(decoder, prompts, sampling, self.encoder, on_piece or (lambda piece: None), keep_going)


def _load_model(job: Job, topology: Topology, loaded: Checkpoint) -> GPT:
    """Build this rank's part of the model and load its shards."""
    dtype = job.config.precision.dtype

    def to_dtype(prefix: str, part: paddle.nn.Layer) -> None:
        if dtype is not DType.fp32:
            part.to(dtype=PADDLE_DTYPE[dtype])

    model = GPT(job.config, topology, to_dtype)
    try:
        reshard.load_model(topology, model.logical_parameters(), loaded.model(), parameter_shapes(job.config))
    except ValueError as error:
        raise UserError(f"{loaded.path}: {error}") from error
    model.eval()
    return model
