"""Hydra plugins: run a grid (``-m``) as cells (``launchers.sweep``); check a single run before it starts.

Hydra takes plugins from the package ``hydra_plugins`` only, and imports all of it at every start: keep this light.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Sweeper over all combinations; Hydra's own one writes files and composes everything twice.

    With ``hparams=optuna`` sweeps define the search space.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the arguments."""
        self.loader = hydra_context.config_loader
        self.master = config
        self.pool = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run all cells, or a search."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        from gpt.utils.console import Console
        from launchers.sweep import checks, launch

        if self.master.optuna.search:
            from launchers.sweep import optuna_search

            return optuna_search.search(self.loader, self.master, arguments)
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(arguments)
        checks.before(parsed, self.master, Console())
        (cells,) = BasicSweeper.split_arguments(parsed, None)
        returns = self.pool.launch(cells, initial_job_idx=0)
        launch.raise_for_failures(returns)
        return [returns]


class PoolLauncher(Launcher):
    """Launcher of cells, side by side on this host or as one array on a cluster."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the arguments."""
        self.loader = hydra_context.config_loader
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose, check and run all cells. A failed one is returned as such, and does not raise.

        Raises:
            UserError: a cell cannot be; nothing was started.
            JobFailed: the grid was stopped.
        """
        from launchers.sweep import launch

        return launch.launch(self.loader, self.config, job_overrides, first=initial_job_idx == 0)


class PreflightCallback(Callback):
    """Resolve and check a single run before Hydra creates its directory, so that bad input leaves nothing behind.

    ``cli.COMMAND`` holds the job for ``gpt.main`` and for the resolvers of the run's name and directory.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Resolve and check; a callback's Exception would only be a warning to Hydra, so leave by SystemExit."""
        from gpt import cli
        from gpt.utils.errors import UserError
        from launchers import driver

        try:
            overrides = list(config.hydra.overrides.task)
            job = cli.resolve(cli.job_config(config), config.hydra.runtime.choices, overrides)
            if job.config.optuna.search:
                raise UserError.of(["hparams=optuna makes many runs: add -m"])
            cli.COMMAND.set(job)
            driver.preflight(job.config, Path(str(config.hydra.run.dir)))
        except UserError as error:
            cli.fail(str(error))
        except cli.CONFIG_ERRORS as error:
            cli.fail(str(UserError.of([str(error)])))
