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

from gpt import cli, driver, ends, rules_cluster  # noqa: E402
from gpt.config import UserError  # noqa: E402
from gpt.files import conf_dir  # noqa: E402
from gpt.grid import away  # noqa: E402

cli.register()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _composed(composed: DictConfig) -> float | None:
    """A single run: a grid's cells are started as ``gpt.frozen``."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        cli.fail("1 problem, nothing was started:\n  - hydra/launcher: grids run with hydra/launcher=pool, the default")
    config = cli.checked(composed, hydra_config.runtime.choices, list(hydra_config.overrides.task))
    run_dir = Path(hydra_config.runtime.output_dir)
    try:
        if rules_cluster.is_away(config):
            away.single(config, run_dir, list(hydra_config.overrides.task))
            _remove_if_empty(run_dir)  # shown, not submitted
            return None
        return driver.run(config, run_dir, list(hydra_config.overrides.task))
    except ends.ERRORS as error:
        if isinstance(error, UserError):
            _remove_if_empty(run_dir)  # Hydra has made it by now
        sys.exit(ends.said(error))


def _remove_if_empty(folder: Path) -> None:
    """Together with the folder around it, if that is then empty too."""
    if folder.resolve() == Path.cwd():
        return  # a plan has no run directory
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def main() -> None:
    """Run the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed with advice
    sys.argv[1:] = cli.with_text_quoted(sys.argv[1:])
    ends.run(_composed)


if __name__ == "__main__":
    main()
