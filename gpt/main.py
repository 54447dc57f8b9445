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

from gpt import cli, follow  # noqa: E402
from gpt.config import Config, UserError  # noqa: E402
from gpt.files import conf_dir  # noqa: E402
from gpt.guard import BAD_INPUT, FAILED  # noqa: E402
from launchers import roles  # noqa: E402

STOPPED = (130, 143)

cli.register()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _composed(composed: DictConfig) -> float | None:
    from gpt import driver

    hydra_config = HydraConfig.get()
    config = cli.checked(composed, hydra_config.runtime.choices)
    run_dir = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode is RunMode.MULTIRUN:  # a single run has passed the gate already
        _gate_cell(config, run_dir)
    try:
        return driver.run(config, run_dir, list(hydra_config.overrides.task))
    except driver.JobFailed as failure:
        # SystemExit ends a grid as well, where an Exception would start its next cell.
        if hydra_config.mode is RunMode.RUN or failure.code in STOPPED:
            sys.exit(_said(str(failure), failure.code))
        raise


def _gate_cell(config: Config, run_dir: Path) -> None:
    """The gate for a cell of a grid, whose directory Hydra has made by now."""
    from gpt import driver

    try:
        driver.gate(config, run_dir)
    except UserError:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # only if it is empty
        raise


def main() -> None:
    """Run the command line; every ending is an exit code of the table in docs/architecture.md."""
    from gpt.driver import JobFailed

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed with advice
    role, code = roles.detect(os.environ), 0
    try:
        follow.run(role, _composed) if role.starter else _composed()
    except UserError as error:
        code = _said(str(error), BAD_INPUT)
    except JobFailed as failure:
        code = _said(str(failure), failure.code)
    except cli.CONFIG_ERRORS as error:
        code = _said(cli.explain(error, sys.argv[1:]), BAD_INPUT)
    except OSError as error:  # a full or lost disk
        code = _said(f"FAILED: {error}", FAILED)
    except KeyboardInterrupt:
        code = _said("interrupted", 130)
    except SystemExit as end:  # what it had to say is said
        code = end.code if isinstance(end.code, int) else FAILED if end.code else 0
    follow.over(role, code)
    sys.exit(code)


def _said(message: str, code: int) -> int:
    if message:
        print(message, file=sys.stderr, flush=True)
    return code if code > 0 else FAILED


if __name__ == "__main__":
    main()
