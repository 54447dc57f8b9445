"""What an evaluation harness asks of a model on one rank: how likely a continuation is, and how a text goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config import derived
from gpt.config.cluster import Device
from gpt.config.sampling import Sampling
from gpt.config.schema import Config
from gpt.data.eval_dataset import Continuations
from gpt.inference.generator import Generator
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint as checkpoints
from gpt.runs.run_dir import Job
from gpt.train.trainer import Trainer
from gpt.utils.console import say
from gpt.utils.errors import UserError
from gpt.utils.launch_env import WorkerEnv
from gpt.utils.signals import BAD_INPUT
from launchers import checks, local

NEW_TOKENS = 256  # of a text whose task does not say


class EvalModel:
    """The checkpoint that a job names.

    Args:
        job: on one rank.

    Raises:
        UserError: it is damaged, or has no tokenizer with an end-of-text.
    """

    def __init__(self, job: Job) -> None:
        topology = Topology.initialize(job.config)
        found = checkpoints.load_or_fail(
            Path(str(job.config.checkpoint)), lambda line: say(f"WARNING: {line}"), topology
        )
        encoder = found.encoder()
        if encoder.eot is None:
            raise UserError(f"{found.tokenizer}: no end-of-text, which stands before a text that has nothing before it")
        self.eot = encoder.eot
        self.length = job.config.data.seq_len
        self._engine = Trainer(job.config, topology, train=False)
        self._engine.load(found.model(), None, {})
        self._engine.model.eval()
        self._writer = Generator(self._engine.model, encoder, int(found.state["step"]))

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
        rows = Continuations(contexts, endings, self.length)
        found = [(0.0, True)] * len(pairs)
        for first, some in self._engine.evaluator.row_scores(rows, batch_size):
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


# A trained model in EleutherAI's lm-eval harness, which needs no torch for it:

MISSING = "the lm-eval harness is not installed: pip install 'gpt-runner[lm-eval]'"


def main() -> None:
    """Run ``lm-eval run --model gpt`` with the arguments of this command."""
    if not WorkerEnv.from_env(os.environ).tuned:
        environment = local.environment(Config(), 1, WorkerEnv(tuned=True))
        os.execve(sys.executable, [sys.executable, "-m", "gpt.lm_eval", *sys.argv[1:]], environment)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"{MISSING} ({error})", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    register()
    sys.argv[1:1] = ["run", "--model", "gpt"]
    try:
        cli_evaluate()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def trained_job(checkpoint: str, precision: str, *, on_cpu: bool) -> Job:
    """The job of a checkpoint on one rank.

    Raises:
        UserError: there is none, or the values are not ones that can be.
    """
    from gpt import cli
    from gpt.runs import source

    device = Device.cpu if on_cpu else Device.auto
    try:
        config = cli.compose_job(["task=evaluate", f"precision={precision}", f"cluster.device={device.value}"])
    except cli.CONFIG_ERRORS as error:
        raise UserError(f"--model_args precision={precision}: fp32, bf16 or fp16") from error
    config.checkpoint = checkpoint
    config.cluster.device = derived.resolve_device(config)
    if problems := checks.problems(config, 1):
        raise UserError.of(problems)
    return source.job(config, source.results_dir(Path(checkpoint)))


def register() -> None:
    """Make ``--model gpt`` known to lm-eval."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    @register_model("gpt")
    class Model(TemplateLM):  # type: ignore[misc]
        """The harness's view: log-likelihoods and greedy texts for lists of requests."""

        def __init__(
            self,
            checkpoint: str = "",
            precision: str = "fp32",
            device: str | None = None,  # lm-eval says cuda:0 where nothing is said
            batch_size: int | str = 8,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            from gpt.worker import import_paddle

            import_paddle()

            if not checkpoint:
                raise UserError("--model_args checkpoint=... names a run or one of its checkpoints")
            self.answers = EvalModel(trained_job(checkpoint, precision, on_cpu=device == "cpu"))
            self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)

        @property
        def eot_token_id(self) -> int:
            """What stands before a text that has nothing before it."""
            return self.answers.eot

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Token numbers."""
            return self.answers.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = self.answers.loglikelihoods(pairs, self.batch_size)
            for (texts, _, _), one in zip(requests, found, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, one)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Of whole texts, every token counted once after end-of-text or what is before it."""
            pairs, of_text = [], []
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.answers.length, 1):
                    pairs.append(utils.make_disjoint_window(window))
                    of_text.append(number)
            totals = [0.0] * len(requests)
            for number, (value, _) in zip(of_text, self.answers.loglikelihoods(pairs, self.batch_size), strict=True):
                totals[number] += value
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Texts up to the first of ``until``; greedy unless the task samples."""
            texts = []
            for request in requests:
                context, settings = request.args
                texts.append(self.answers.text(context, settings))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            return texts


if __name__ == "__main__":
    main()
