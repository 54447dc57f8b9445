"""Shows plans: of one job, of a search, of a grid. See docs/plan.md."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gpt.config.derived import world_size
from gpt.config.schema import Config
from gpt.plan import auto_parallel, report, summary
from gpt.plan.explain import AutoParallelResult, Verdict, check_fit
from gpt.plan.pipeline_plot import draw
from gpt.plan.pipeline_simulation import timeline
from gpt.plan.search import Candidate, search
from gpt.tasks.spec import Command, Driver, TaskSpec
from gpt.train.lr_scheduler import lr_at
from gpt.utils.console import Console
from gpt.utils.errors import UserError

LAYOUT_KEYS = (
    "task=", "plan.", "parallel=", "parallel.", "trainer.micro_batch_size=", "trainer.global_batch_size=",
    "model.recompute=", "model.no_recompute_layers=",
)  # fmt: skip


def show(config: Config, console: Console, overrides: list[str], choice: AutoParallelResult | None = None) -> None:
    """Print what a job would need, how long it would take, whether it fits, and with ``plan.search`` what is best.

    Args:
        config: of the job.
        console: to print on.
        overrides: of the command, to print one for the best layout.
        choice: of ``parallel=auto``.

    Raises:
        UserError: it does not fit, and ``plan.require_fit`` is set.
    """
    auto_parallel.show(choice, config, console)
    if config.plan.search:
        _show_search(config, console, overrides)
        return
    rows = dict(summary.summary(config))
    shown = [(key, rows[key]) for key in ("parameters", "ranks", "batch")]
    shown += [("compute", report.compute(config)), ("first loss", rows["first loss"])]
    shown += [("pipeline bubble", rows["pipeline bubble"])] if "pipeline bubble" in rows else []
    console.table(f"plan: {_title(config)}", [*shown, *_learning_rate(config, console)])
    memory = report.memory_table(config)
    console.columns(memory.title, memory.header, memory.rows)
    if travels := report.traffic_table(config):
        console.columns(travels.title, travels.header, travels.rows)
    console.table("time", report.times(config))
    if config.plan.picture:
        _draw(config, console, Path(config.plan.picture))
    verdict = check_fit(config)
    console.verdict(verdict.lines, verdict.fits)
    _require(config, [verdict])


def _draw(config: Config, console: Console, path: Path) -> None:
    line = timeline(config)
    assert line is not None, "gpt.config.rules"
    draw(line, path, f"{config.model.name} {config.device.name}:")
    idle = ", ".join(f"{line.idle(stage):.1%}" for stage in range(config.parallel.pp_degree))
    rows = [("step", f"{line.step:.4g} s, of which {line.passes:.4g} s are passes"), ("idle by stage", idle)]
    console.table("simulation", [*rows, ("picture", str(path))])


def _title(config: Config) -> str:
    device = f" on {config.device.name}" if config.device.name else ""
    return f"{config.model.name}, {config.precision.dtype.value}{device}"


def _learning_rate(config: Config, console: Console) -> list[tuple[str, str]]:
    schedule, peak, last = config.schedule, config.optimizer.lr, config.trainer.max_steps
    marks = sorted({1, max(1, schedule.warmup_steps), last // 4, last // 2, 3 * last // 4, last} - {0})
    rates = ", ".join(f"{lr_at(step, peak, schedule):.3g} at {step:,}" for step in marks if step <= last)
    return [
        ("learning rate", rates),
        ("", console.curve([lr_at(1 + i * (last - 1) // 59, peak, schedule) for i in range(60)])),
    ]


def _require(config: Config, verdicts: list[Verdict]) -> None:
    bad = [verdict.lines[0] for verdict in verdicts if verdict.fits is False]
    if config.plan.require_fit and bad:
        raise UserError.of([f"plan.require_fit: {line}" for line in bad])


def _show_search(config: Config, console: Console, overrides: list[str]) -> None:
    devices = config.plan.devices or world_size(config)
    layouts = search(config, devices)
    title = f"{_title(config)}: {len(layouts):,} layouts of {devices:,} devices fit"
    if not layouts:
        verdict = check_fit(config)
        console.verdict([f"{title}: no layout does", *verdict.lines], False)
        if config.plan.require_fit:
            raise UserError.of([f"plan.require_fit: no layout of {devices:,} devices fits"])
        return
    console.columns(title, report.SEARCH, report.search_rows(layouts, config.plan.top))
    console.next_commands([(command(overrides, layouts[0]), "the fastest; add task=plan to look at it")])


def command(overrides: list[str], candidate: Candidate) -> str:
    """What to type for a layout: the command at hand without its own layout, and the keys of the candidate."""
    kept = [o for o in overrides if not o.lstrip("+").startswith(LAYOUT_KEYS)]
    return shlex.join(["python", "-m", "gpt.main", *kept, *candidate.overrides])


def show_grid(cells: list[tuple[list[str], Config | list[str]]], console: Console) -> None:
    """One table for all jobs of a grid, with ``plan.search`` of the best layout of each; what cannot be is said below.

    Args:
        cells: the overrides of each, and its configuration or its problems.
        console: to print on.

    Raises:
        UserError: no cell is legal; or one does not fit, and ``plan.require_fit`` is set.
    """
    legal = [config for _, config in cells if isinstance(config, Config)]
    refused = [(overrides, config) for overrides, config in cells if not isinstance(config, Config)]
    if not legal:
        raise UserError.of([f"{' '.join(overrides)}: {problem}" for overrides, all_ in refused for problem in all_])
    planned = [_best(config) if config.plan.search else config for config in legal]
    console.columns(f"plan of {len(cells)} jobs", report.GRID, [report.grid_row(config) for config in planned])
    everywhere = set.intersection(*(set(overrides) for overrides, _ in cells))
    if any(config.plan.picture for config in legal):
        console.note("plan.picture is of one plan: nothing is drawn for several")
    for overrides, problems in refused:
        console.note(f"not possible: {' '.join(o for o in overrides if o not in everywhere)}: {'; '.join(problems)}")
    for config in planned:
        _require(config, [check_fit(config)] if config.plan.require_fit else [])


def _best(config: Config) -> Config:
    """With the fastest layout; as it is if none fits."""
    layouts = search(config, config.plan.devices or world_size(config))
    return layouts[0].config if layouts else config


def is_plan(composed: Any) -> bool:
    """Whether a composed configuration asks for a plan."""
    return str(getattr(composed.get("task"), "value", composed.get("task"))) == "plan"


def run(command: Command, driver: Driver) -> float | None:
    """Show the plan."""
    show(command.config, driver.console, command.overrides, command.choice)
    return None


TASK = TaskSpec(run=run)
