"""A trained model in EleutherAI's lm-eval harness, which needs no torch for it:

    python -m gpt.harness --tasks lambada_openai --model_args checkpoint=outputs/my_run

Everything after the module's name is an argument of ``lm-eval run``. As ``--model_args`` there are ``checkpoint``
(a run, or one of its checkpoints) and ``precision``; ``--device cpu`` keeps it off a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.config import Config, Device, UserError
from gpt.guard import BAD_INPUT
from launchers import host, local

if TYPE_CHECKING:
    from gpt.runs import Job

READY = "GPT_HARNESS_READY"  # in the environment: threads and allocator are set
MISSING = "the lm-eval harness is not installed: pip install 'gpt-runner[lm-eval]'"


def main() -> None:
    """Run ``lm-eval run --model gpt`` with the arguments of this command."""
    if READY not in os.environ:  # before Paddle starts, threads and allocator must be in the environment
        environment = {**local.environment(Config(), 1, live=False), READY: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "gpt.harness", *sys.argv[1:]], environment)
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
    from gpt import cli, trained

    device = Device.cpu if on_cpu else Device.auto
    try:
        config = cli.job(["task=evaluate", f"precision={precision}", f"cluster.device={device.value}"])
    except cli.CONFIG_ERRORS as error:
        raise UserError(f"--model_args precision={precision}: fp32, bf16 or fp16") from error
    config.checkpoint = checkpoint
    config.cluster.device = host.resolve_device(config)
    if problems := host.problems(config, 1):
        raise UserError.of(problems)
    return trained.job(config, trained.home(Path(checkpoint)))


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
            from gpt.text.answers import Answers

            if not checkpoint:
                raise UserError("--model_args checkpoint=... names a run or one of its checkpoints")
            self.answers = Answers(trained_job(checkpoint, precision, on_cpu=device == "cpu"))
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
