"""``task=serve``: answer completions over HTTP with a checkpoint."""

from __future__ import annotations

from gpt.inference import prompts
from gpt.inference.server import address
from gpt.runs import source
from gpt.tasks.generate import DECODING
from gpt.tasks.spec import Command, TaskSpec


def check(command: Command) -> list[str]:
    """Return why the address cannot be used, and whether there is no text."""
    return address.problems(command.config.serve) + ([] if source.vocabulary(command.trained) else [prompts.NO_TEXT])


TASK = TaskSpec(check, worker="gpt.tasks.workers.serve", environment=DECODING)
