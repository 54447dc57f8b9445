"""Hydra's side of the command line: resolvers, the job that a composed configuration is, clear errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gpt.config.derived import needs_checkpoint, schema
from gpt.config.rules import check, known_keys, suggest
from gpt.config.schema import Config, Task
from gpt.plan import auto_parallel
from gpt.plan.devices import calibrated
from gpt.plan.explain import AutoParallelResult
from gpt.runs import source
from gpt.runs.run_dir import find_existing, run_name
from gpt.utils.errors import UserError
from gpt.utils.files import cache_dir, conf_dir

TRAINED = [task for task in Task if needs_checkpoint(task)]
OUTPUTS = Path("outputs")
FREE_TEXT = ("prompt", "generate.prompt", "notes")
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)


def register() -> None:
    """Register the schema, the resolvers used in conf/, the preflight callback and the grid's plugins with Hydra."""
    OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("cache_dir", cache_dir, replace=True)
    OmegaConf.register_new_resolver("calibrated", calibrated, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema())
    store.store(
        group="hydra/callbacks", name="gate", node={"gate": {"_target_": "hydra_plugins.gpt_grid.PreflightCallback"}}
    )
    for group, name, plugin in (("launcher", "pool", "PoolLauncher"), ("sweeper", "grid", "GridSweeper")):
        store.store(group=f"hydra/{group}", name=name, node={"_target_": f"hydra_plugins.gpt_grid.{plugin}"})


@dataclass(frozen=True)
class ResolvedJob:
    """A command that has been composed, resolved and checked, which happens once.

    Attributes:
        config: with all degrees chosen.
        name: of its run.
        overrides: as given on the command line.
        choice: what ``parallel=auto`` chose, or None where it had nothing to choose.
    """

    config: Config
    name: str
    overrides: list[str]
    choice: AutoParallelResult | None

    def run_dir(self, outputs: Path) -> Path:
        """Return the run's folder: what ``checkpoint`` names for a task that reads one, else one in ``outputs``."""
        if self.config.checkpoint and needs_checkpoint(self.config.task):
            return source.results_dir(Path(self.config.checkpoint))
        return outputs / self.name


COMMAND: ContextVar[ResolvedJob] = ContextVar("COMMAND")  # of a single run: from PreflightCallback to main


def resolve(composed: DictConfig, choices: Any, overrides: Sequence[str], outputs: Path = OUTPUTS) -> ResolvedJob:
    """Choose degrees that have no value, check everything, and name the run.

    Args:
        composed: what Hydra composed, without its ``hydra`` node.
        choices: the option chosen for each config group.
        overrides: of the command: what they name is not for ``parallel=auto`` to choose.
        outputs: the folder of runs.

    Raises:
        UserError: listing every problem.
    """
    choices = dict(choices)
    filled, problems, choice = auto_parallel.resolve_auto(composed, choices, overrides, source.config_of)
    if problems:
        raise UserError.of(problems)
    config, problems = check(auto_parallel.for_task(filled, composed), choices)
    if problems or config is None:
        raise UserError.of(problems)
    return ResolvedJob(config, _name(filled, choices, outputs), list(overrides), choice)


def name_of_run(composed: DictConfig, choices: dict[str, Any], overrides: Sequence[str], outputs: Path) -> str:
    """Return the run's name for a configuration that need not be possible, as ``--cfg`` shows it."""
    filled, _, _ = auto_parallel.resolve_auto(composed, choices, overrides, source.config_of)
    return _name(filled, choices, outputs)


def _name(filled: DictConfig, choices: dict[str, Any], outputs: Path) -> str:
    """Return the run's name, or that of the run of the same configuration in ``outputs`` under another preset."""
    resolved = OmegaConf.to_container(filled, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    plain = {str(key): value for key, value in resolved.items()}
    return find_existing(run_name(plain, auto_parallel.name(plain["parallel"], str(choices.get("parallel")))), outputs)


def _run_name(*, _root_: DictConfig) -> str:
    if job := COMMAND.get(None):
        return job.name
    hydra = _root_.hydra
    return name_of_run(job_config(_root_), dict(hydra.runtime.choices), list(hydra.overrides.task), OUTPUTS)


def _run_dir(*, _root_: DictConfig) -> str:
    if _root_.get("checkpoint") and _root_.task in TRAINED:
        return str(source.results_dir(Path(str(_root_.checkpoint))))
    return str(OUTPUTS / _run_name(_root_=_root_))


def job_config(composed: DictConfig) -> DictConfig:
    """Return the composed configuration without Hydra's own part."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def compose_job(overrides: list[str]) -> Config:
    """Compose and check a command line, for scripts.

    Raises:
        UserError: listing every problem.
    """
    register()
    with initialize_config_dir(config_dir=conf_dir(), version_base="1.3", job_name="gpt"):
        composed = compose("config", overrides, return_hydra_config=True)
    return resolve(job_config(composed), composed.hydra.runtime.choices, overrides).config


def fail(message: str) -> None:
    """Print the message on standard error and exit with 2: bad input, nothing started."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def explain(error: BaseException, arguments: list[str]) -> str:
    """Return why the command line could not be composed."""
    return str(UserError.of(reasons(error, overrides_of(arguments))))


def reasons(error: BaseException, overrides: list[str]) -> list[str]:
    """Return why overrides could not be composed: each is tried alone, so that all bad ones are named."""
    return [problem for override in overrides if (problem := _alone(override))] or [_first_lines(error)]


@functools.cache
def _alone(override: str) -> str | None:
    ours = GlobalHydra.instance()
    former, ours.hydra = ours.hydra, None  # of a grid, which is composing right now
    try:
        for single in _expand(override):
            with initialize_config_dir(config_dir=conf_dir(), version_base="1.3", job_name="gpt"):
                composed = compose("config", [single], return_hydra_config=True)
                with open_dict(composed):
                    OmegaConf.to_container(job_config(composed), resolve=False)
    except CONFIG_ERRORS as problem:
        return _translate(override, problem)
    finally:
        ours.hydra = former
    return None


def quote_free_text(arguments: list[str]) -> list[str]:
    """Quote the arguments that are free text for Hydra: commas, brackets and spaces are text there.

    Example:
        >>> quote_free_text(["prompt=Hello, (world", "seed=1", "prompt='as it is'"])
        ['prompt="Hello, (world"', 'seed=1', "prompt='as it is'"]
    """
    result = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        free = equals and key.lstrip("+") in FREE_TEXT and not quoted
        result.append(f"{key}={QuotedString(value, Quote.double).with_quotes()}" if free else argument)
    return result


def overrides_of(arguments: list[str]) -> list[str]:
    """Return the ``key=value`` arguments among those of the command."""
    from hydra._internal.utils import get_args_parser

    overrides: list[str] = get_args_parser().parse_known_args(arguments)[0].overrides
    return overrides


def wants_grid(arguments: list[str]) -> bool:
    """Return whether the command asks for a grid (``-m``)."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_known_args(arguments)[0]
    return bool(parsed.multirun) or "hydra.mode=MULTIRUN" in parsed.overrides


def _expand(override: str) -> list[str]:
    """Return the single overrides of a sweep."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [override]
    return [f"{parsed.key_or_group}={value}" for value in parsed.sweep_string_iterator()]


def _translate(override: str, error: Exception) -> str:
    """Return Hydra's message in one sentence, with a suggestion."""
    text = str(error)
    key = override.lstrip("+~").split("=")[0]
    if "Could not override" in text or "not in" in text.split("\n", maxsplit=1)[0]:
        groups = [p.name for p in Path(conf_dir()).iterdir() if p.is_dir()]
        return f"unknown key {key}{suggest(key, [*known_keys(), *groups])}"
    if "Could not find" in text:
        group = Path(conf_dir()) / key
        options = sorted(p.stem for p in group.glob("*.yaml"))
        wanted = override.split("=", 1)[1]
        return f"{override}: no such {key}{suggest(wanted, options)}; there are {', '.join(options)}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        return f"{override}: {str(error.__cause__).splitlines()[0]}"
    return f"{override}: {_first_lines(error)}"


def _first_lines(error: BaseException) -> str:
    cause = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ else ""
    return " ".join(str(error).split("\n\n")[0].splitlines()[:3]) + cause
