"""A trained model in EleutherAI's lm-eval, on one rank and without torch: log-likelihoods and texts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.config import derived
from gpt.config.cluster import Device
from gpt.config.sampling import Sampling
from gpt.config.schema import Config
from gpt.inference.generator import Generator
from gpt.parallel.topology import Topology
from gpt.runs.run_dir import Job
from gpt.utils.console import say
from gpt.utils.errors import UserError
from gpt.utils.launch_env import WorkerEnv
from gpt.utils.signals import BAD_INPUT
from launchers import checks, local

NEW_TOKENS = 256  # of a text whose task gives no number
SECONDS_BETWEEN_LINES = 10.0
MISSING = "the lm-eval harness is not installed: pip install 'gpt-runner[lm-eval]'"


class EvalModel:
    """The checkpoint of a job, scored and continued as ``task=serve`` does.

    Raises:
        UserError: it is damaged, or has no tokenizer with an end-of-text.
    """

    def __init__(self, job: Job) -> None:
        self._generator = Generator.of(job, Topology.initialize(job.config))
        if self._generator.encoder.eot is None:
            raise UserError(
                f"{job.config.checkpoint}: its tokenizer has no end-of-text, which stands before a text without context"
            )
        self.eot = self._generator.encoder.eot
        self.length = job.config.data.seq_len
        self.encode = self._generator.encode

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
    ) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) of each pair, and whether greedy decoding would give the continuation.

        Args:
            pairs: token numbers; the context has one or more. A pair that is too long loses its beginning.
            batch_size: pairs of one forward pass.
        """
        texts = [[*context, *continuation][-self.length - 1 :] for context, continuation in pairs]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # a batch has rows of similar length
        results = [(0.0, True)] * len(pairs)
        last = time.monotonic()
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            for i, scores in zip(batch, self._generator.score([texts[i] for i in batch]), strict=True):
                start = max(0, len(texts[i]) - 1 - len(pairs[i][1]))
                results[i] = sum(scores.logprobs[start:]), scores.best[start:] == texts[i][start + 1 :]
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say(f"{first + len(batch):,} of {len(order):,}")
        return results

    def generate(self, prompt: str, settings: Mapping[str, Any]) -> str:
        """Return the continuation of a prompt; of a prompt that is too long the end is read.

        Args:
            prompt: text.
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
        return self._generator.write([tokens], sampling)[0][0].text


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
    """Return the job of a checkpoint on one rank.

    Raises:
        UserError: there is no checkpoint, or a value is invalid.
    """
    from gpt import cli
    from gpt.runs import source

    device = Device.cpu if on_cpu else Device.auto
    try:
        config = cli.compose_job(["task=evaluate", f"precision={precision}", f"cluster.device={device.value}"])
    except cli.CONFIG_ERRORS as error:
        raise UserError(f"--model_args precision={precision}: fp32, bf16 or fp16") from error
    values = {"checkpoint": checkpoint, "cluster.device": derived.resolve_device(config)}
    config = derived.replace_in(config, values)
    if problems := checks.problems(config, 1):
        raise UserError.of(problems)
    return source.job(config, source.results_dir(Path(checkpoint)))


def register() -> None:
    """Register ``--model gpt`` with lm-eval."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    @register_model("gpt")
    class Model(TemplateLM):  # type: ignore[misc]
        """lm-eval's interface: log-likelihoods and texts for lists of requests."""

        def __init__(
            self,
            checkpoint: str = "",
            precision: str = "fp32",
            device: str | None = None,  # lm-eval's default is cuda:0
            batch_size: int | str = 8,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            from gpt.worker import import_paddle

            import_paddle()

            if not checkpoint:
                raise UserError("--model_args checkpoint=... names a run or one of its checkpoints")
            self.model = EvalModel(trained_job(checkpoint, precision, on_cpu=device == "cpu"))
            self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)

        @property
        def eot_token_id(self) -> int:
            """Return the token before a text without context."""
            return self.model.eot

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Return token numbers."""
            return self.model.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            results = self.model.loglikelihoods(pairs, self.batch_size)
            for (texts, _, _), result in zip(requests, results, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
            return results

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Return log-likelihoods of whole texts; each token counts once, after end-of-text or what is before it."""
            pairs, of_text = [], []
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.model.length, 1):
                    pairs.append(utils.make_disjoint_window(window))
                    of_text.append(number)
            totals = [0.0] * len(requests)
            for number, (value, _) in zip(of_text, self.model.loglikelihoods(pairs, self.batch_size), strict=True):
                totals[number] += value
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Return texts up to the first of ``until``; greedy unless the task samples."""
            texts = []
            for request in requests:
                context, settings = request.args
                texts.append(self.model.generate(context, settings))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            return texts


if __name__ == "__main__":
    main()
