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
sys.path.append(str(_ROOT / "launchers" / "plugins"))  # where Hydra looks for hydra_plugins

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from gpt import cli  # noqa: E402
from gpt.config import cluster_rules  # noqa: E402
from gpt.utils.errors import UserError  # noqa: E402
from gpt.utils.files import conf_dir  # noqa: E402
from launchers import driver, exit_codes, remote  # noqa: E402

cli.register()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _composed(_: DictConfig) -> float | None:
    """Do what ``PreflightCallback`` resolved; a grid's cells are started as ``launchers.sweep.run_cell``."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        cli.fail("1 problem, nothing was started:\n  - hydra/launcher: grids run with hydra/launcher=pool, the default")
    job, run_dir = cli.COMMAND.get(), Path(hydra_config.runtime.output_dir)
    try:
        if cluster_rules.is_away(job.config):
            remote.single(job.config, run_dir, job.overrides)
            _remove_if_empty(run_dir)  # shown, not submitted
            return None
        return driver.run(job.config, run_dir, job.overrides, job.choice)
    except exit_codes.ERRORS as error:
        if isinstance(error, UserError):
            _remove_if_empty(run_dir)  # Hydra has made it by now
        sys.exit(exit_codes.report_error(error))


def _remove_if_empty(folder: Path) -> None:
    """Remove an empty folder, together with the folder around it if that is then empty too."""
    if folder.resolve() == Path.cwd():
        return  # a plan has no run directory
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def _command() -> None:
    try:
        _composed()
    except cli.CONFIG_ERRORS as error:
        raise UserError(cli.explain(error, sys.argv[1:])) from error


def main() -> None:
    """Run the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed with advice
    sys.argv[1:] = cli.quote_free_text(sys.argv[1:])
    exit_codes.run(_command)


if __name__ == "__main__":
    main()
