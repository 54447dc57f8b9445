"""``task=prepare``: raw text to token files."""

from __future__ import annotations

import shlex

from gpt.data.preprocess import pipeline
from gpt.tasks.spec import Command, Driver, TaskSpec
from gpt.utils import machine
from gpt.utils.errors import JobFailed
from gpt.utils.signals import FAILED


def run(command: Command, driver: Driver) -> float | None:
    """Write the token files and say how to train on them.

    Raises:
        JobFailed: too much of the text is unreadable.
    """
    config, console = command.config, driver.console
    try:
        with console.measure() as show:
            manifest = pipeline.prepare(config, console.note, show, machine.cores())
    except pipeline.TooManyBadRecords as error:
        raise JobFailed(f"FAILED: {error}", FAILED) from error
    except KeyboardInterrupt:
        console.note("the same command goes on with what is done")
        raise
    prefix = shlex.quote(str(config.prepare.output))
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items() if count)
    rows = [(key, f"{manifest[key]:,}") for key in ("documents", "tokens", "bytes", "duplicates")]
    rows += [("bytes per token", f"{manifest['bytes_per_token']:.3f}"), ("skipped", skipped or "nothing")]
    rows.append(("files", f"{config.prepare.output}_ids.npy, _idx.npz, _tokenizer.json, _manifest.json"))
    console.table("prepared", rows)
    vocab = manifest["tokenizer"]["vocab"]
    fit = "" if vocab <= config.model.vocab else f" model.vocab={vocab}"
    console.next_commands([(f"python -m gpt.main data=tokens data.path={prefix}{fit}", "train on it")])
    return None


TASK = TaskSpec(lambda command: pipeline.check(command.config), run)
