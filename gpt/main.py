"""The one entry: compose, check, plan, run the task.

python -m gpt.main model=345m parallel=single optimizer.lr=1e-4
"""

import contextlib
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "gpt":
    sys.path[0] = str(_ROOT)  # started as a file: gpt/*.py must not shadow other modules

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from gpt import cli, driver, follow, planning  # noqa: E402
from gpt.config import UserError  # noqa: E402
from gpt.files import conf_dir  # noqa: E402
from gpt.guard import BAD_INPUT, FAILED  # noqa: E402
from gpt.launching import JobFailed  # noqa: E402
from launchers import roles  # noqa: E402

STOPPED = (130, 143)

cli.register()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _composed(composed: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN and planning.is_plan(composed):
        return None  # the gate makes one table of all cells, when it has seen them
    config = cli.checked(composed, hydra_config.runtime.choices)
    run_dir = Path(hydra_config.runtime.output_dir)
    try:
        if hydra_config.mode is RunMode.MULTIRUN:  # a single run has passed the gate already
            driver.gate(config, run_dir)
        return driver.run(config, run_dir, list(hydra_config.overrides.task))
    except (UserError, JobFailed, OSError) as error:
        if isinstance(error, UserError):
            _remove_if_empty(run_dir)  # Hydra has made it by now
        code = _said(error)
        # After an Exception Hydra goes on with a grid's next cell; SystemExit ends it.
        if hydra_config.mode is RunMode.RUN or code in STOPPED:
            sys.exit(code)
        raise


def _remove_if_empty(folder: Path) -> None:
    """Together with the folder around it, if that is then empty too."""
    if folder.resolve() == Path.cwd():
        return  # a plan has no run directory
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def main() -> None:
    """Run the command line; every ending is an exit code of the table in docs/architecture.md."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed with advice
    sys.argv[1:] = cli.with_text_quoted(sys.argv[1:])
    role, code = roles.detect(os.environ), 0
    try:
        follow.run(role, _composed) if role.starter else _composed()
    except (UserError, JobFailed, OSError, KeyboardInterrupt, *cli.CONFIG_ERRORS) as error:
        code = _said(error)
    except SystemExit as end:  # what it had to say is said
        code = end.code if isinstance(end.code, int) else FAILED if end.code else 0
    follow.over(role, code)
    sys.exit(code)


def _said(error: BaseException) -> int:
    """Tell the user, once, and return the exit code."""
    message, code = str(error), FAILED
    if isinstance(error, UserError):
        code = BAD_INPUT
    elif isinstance(error, JobFailed):
        code = error.code if error.code > 0 else FAILED
    elif isinstance(error, cli.CONFIG_ERRORS):  # before OSError: some of Hydra's are of that kind too
        message, code = cli.explain(error, sys.argv[1:]), BAD_INPUT
    elif isinstance(error, OSError):  # a full or lost disk
        message = f"FAILED: {error}"
    else:
        message, code = "interrupted", STOPPED[0]
    if message and not getattr(error, "said", False):
        print(message, file=sys.stderr, flush=True)
        error.said = True  # type: ignore[attr-defined]  # a grid raises it again at its end
    return code


if __name__ == "__main__":
    main()
