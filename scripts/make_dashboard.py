"""Makes the W&B workspace of this project's runs: losses, speed, optimizer and samples, by model and parallel.

    python scripts/make_dashboard.py --entity NAME                # saved, its address is printed; needs a key
    python scripts/make_dashboard.py --entity NAME --grid lr_seed_68a5e4b8      # the cells of one grid only
    python scripts/make_dashboard.py --json                       # what would be saved; no key, no network

Needs wandb-workspaces: pip install 'gpt-runner[dashboard]'.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

X = "tokens"
GROUPS = ("choices.model", "choices.parallel")  # of the run's configuration, see gpt.runs.wandb_run.about
SAMPLES = "samples"


@dataclass(frozen=True)
class Chart:
    """Curves over tokens; the keys are those of ``metrics.jsonl``."""

    title: str
    keys: tuple[str, ...]
    log: bool = False


SECTIONS = {
    "Loss": (
        Chart("training and validation loss", ("train/loss", "val/loss"), log=True),
        Chart("validation loss", ("val/loss",)),
    ),
    "Speed": (
        Chart("tokens per second", ("tokens_per_second",)),
        Chart("model FLOPs utilisation", ("mfu",)),
        Chart("most memory of a rank (GiB)", ("memory_peak_gib",)),
    ),
    "Optimizer": (
        Chart("gradient norm", ("grad_norm",), log=True),
        Chart("learning rate", ("lr",)),
        Chart("loss scale (float16)", ("loss_scale",), log=True),
    ),
}


def workspace(entity: str, project: str, name: str, grid: str | None) -> Any:
    """The workspace, not saved yet.

    Raises:
        SystemExit: wandb-workspaces is not there.
    """
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2 as panels
    except ImportError:
        sys.exit("make_dashboard needs wandb-workspaces: pip install 'gpt-runner[dashboard]'")
    sections = [
        workspaces.Section(
            name=title,
            is_open=True,
            layout_settings=workspaces.SectionLayoutSettings(columns=len(charts), rows=1),
            panels=[
                panels.LinePlot(title=chart.title, x=X, y=list(chart.keys), log_y=chart.log or None) for chart in charts
            ],
        )
        for title, charts in SECTIONS.items()
    ]
    table = panels.WeavePanelSummaryTable(table_name=SAMPLES)
    sections.append(workspaces.Section(name="Samples", is_open=True, panels=[table]))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Config(key) for key in GROUPS],
            filters=f"Metric('group') == '{grid}'" if grid else "",
        ),
    )


def main() -> None:
    """Print or save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", help="whose project it is; the key's own by default")
    parser.add_argument("--project", default="gpt", help="as logger.wandb.project")
    parser.add_argument("--name", default="GPT runs", help="of the workspace")
    parser.add_argument("--grid", help="only its cells: the name of its folder in outputs/grids")
    parser.add_argument("--json", action="store_true", help="print it, and save nothing")
    arguments = parser.parse_args()
    if arguments.json:
        made = workspace(arguments.entity or "", arguments.project, arguments.name, arguments.grid)
        print(made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1))
        return
    import wandb

    try:
        entity = arguments.entity or wandb.Api().default_entity
        made = workspace(entity, arguments.project, arguments.name, arguments.grid)
        made.save()
    except Exception as error:
        sys.exit(f"not saved: {error} (a key? wandb login; a look without one: --json)")
    print(made.url)


if __name__ == "__main__":
    main()
