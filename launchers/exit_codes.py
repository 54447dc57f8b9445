"""Map the end of a command to an exit code of the table in docs/architecture.md, with one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from gpt.utils import launch_env
from gpt.utils.errors import JobFailed, UserError
from gpt.utils.signals import BAD_INPUT, FAILED
from launchers import external

STOPPED = (130, 143)
ERRORS = (UserError, JobFailed, OSError)


def run(command: Callable[[], object]) -> None:
    """Run the command in this process's role and exit with its exit code."""
    role, code = launch_env.detect(os.environ), 0
    try:
        external.run(role, command) if role.starter else command()
    except (*ERRORS, KeyboardInterrupt) as error:
        code = report_error(error)
    except SystemExit as end:  # its message has been printed
        code = end.code if isinstance(end.code, int) else FAILED if end.code else 0
    external.over(role, code)
    sys.exit(code)


def report_error(error: BaseException) -> int:
    """Print the error once and return the exit code."""
    message, code = str(error), FAILED
    if isinstance(error, UserError):
        code = BAD_INPUT
    elif isinstance(error, JobFailed):
        code = error.code if error.code > 0 else FAILED
    elif isinstance(error, OSError):  # a full or lost disk
        message = f"FAILED: {error}"
    else:
        message, code = "interrupted", STOPPED[0]
    if message and not getattr(error, "said", False):
        print(message, file=sys.stderr, flush=True)
        error.said = True  # type: ignore[attr-defined]  # a grid raises it again at its end
    return code
