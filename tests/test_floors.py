"""The house stands: imports point down only, and nothing that plans a run loads Paddle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Lower floors first; a module may import from its own floor and from those before it.
FLOORS = [
    {
        "gpt",
        "gpt.config",
        "gpt.config_cluster",
        "gpt.config_evaluate",
        "gpt.config_grid",
        "gpt.config_parallel",
        "gpt.config_plan",
        "gpt.config_prepare",
        "gpt.config_text",
        "gpt.config_weights",
        "gpt.files",
        "gpt.guard",
        "gpt.heartbeat",
    },
    {"gpt.text", "gpt.text.request", "gpt.talk", "gpt.provenance"},
    {"gpt.shapes"},
    {
        "gpt.plan",
        "gpt.plan.schedule",
        "gpt.plan.simulation",
        "gpt.plan.picture",
        "gpt.plan.timeline",
        "gpt.plan.counts",
        "gpt.plan.devices",
        "gpt.plan.footprint",
        "gpt.plan.traffic",
        "gpt.plan.cost",
        "gpt.plan.summary",
    },
    {"gpt.rules_cluster", "gpt.rules_plan", "gpt.rules_engine"},
    {"gpt.rules"},
    {"gpt.plan.search", "gpt.support", "gpt.text.listen", "gpt.text.desk", "gpt.text.bodies"},
    {"gpt.plan.verdict", "gpt.plan.choice", "gpt.text.server"},
    {"gpt.plan.tables"},
    {
        "gpt.data",
        "gpt.data.megatron",
        "gpt.data.tokens",
        "gpt.data.tokenizer",
        "gpt.data.order",
        "gpt.data.corpus",
        "gpt.data.samples",
        "gpt.data.download",
        "gpt.data.sentences",
        "gpt.data.vocabularies",
        "gpt.data.windows",
    },
    {"gpt.weights", "gpt.weights.archives", "gpt.weights.pickles"},
    {"gpt.weights.huggingface"},
    {"gpt.weights.fleetx"},
    {"gpt.data.prepare", "gpt.data.prepare.sources", "gpt.data.prepare.division"},
    {"gpt.data.prepare.documents"},
    {"gpt.data.passages"},
    {"gpt.data.prepare.encode", "gpt.data.prepare.worker"},
    {"gpt.data.prepare.join"},
    {"gpt.data.prepare.build"},
    {"gpt.kernels", "gpt.sockets"},
    {"gpt.kernels_large", "gpt.cache"},
    {"gpt.kernels_decode"},
    {"gpt.ops", "gpt.gloo", "gpt.tensor_parallel", "gpt.placements"},
    {"gpt.semi_auto", "gpt.gloo_auto"},
    {"gpt.optim", "gpt.topology", "gpt.lowered"},
    {"gpt.whole"},
    {"gpt.exchange", "gpt.sharding", "gpt.slices", "gpt.stages", "gpt.scores"},
    {"gpt.model", "gpt.runs", "gpt.weights.eight_bits"},
    {"gpt.trained", "gpt.wandb_run", "gpt.text.choice", "gpt.text.growing", "gpt.text.prompts", "gpt.text.decoder"},
    {"gpt.pipeline", "gpt.pipeline_auto", "gpt.evaluation", "gpt.grid", "gpt.grid.cells"},
    {"gpt.grid.folder", "gpt.grid.study"},
    {"gpt.grid.gather", "gpt.grid.seeds"},
    {"gpt.grid.sizes"},
    {"gpt.grid.summary"},
    {"gpt.grid.curves", "gpt.grid.page"},
    {"gpt.checkpoint", "gpt.saving", "gpt.log", "gpt.wandb_sink", "gpt.report", "gpt.console"},
    {"gpt.grid.report"},
    {"gpt.engine", "gpt.text.search", "gpt.text.beams", "gpt.text.scoring"},
    {"gpt.weights.importing", "gpt.weights.exporting", "gpt.weights.static"},
    {"gpt.text.writer"},
    {
        "gpt.meter",
        "gpt.measure",
        "launchers",
        "launchers.host",
        "launchers.places",
        "launchers.ending",
        "launchers.watchdog",
    },
    {"launchers.local", "launchers.roles", "launchers.slots"},
    {"launchers.pool", "launchers.slurm", "launchers.nodes"},
    {"launchers.kubernetes"},
    {"launchers.group"},
    {"gpt.text.answers"},
    {
        "gpt.tasks",
        "gpt.tasks.generate",
        "gpt.tasks.evaluate",
        "gpt.tasks.export",
        "gpt.tasks.pretrain",
        "gpt.tasks.serve",
    },
    {"gpt.launching"},
    {"gpt.grid.checks", "gpt.grid.board"},
    {"gpt.grid.running"},
    {"gpt.choosing"},
    {"gpt.worker", "gpt.driver", "gpt.planning", "gpt.follow", "gpt.cli"},
    {"gpt.ends", "gpt.grid.composing", "gpt.grid.submitting"},
    {"gpt.grid.away"},
    {"gpt.grid.launching", "gpt.frozen"},
    {"gpt.grid.searching"},
    {"launchers.plugins.hydra_plugins.gpt_grid"},
    {"gpt.main", "gpt.harness"},
]
NO_PADDLE = [
    "gpt.config",
    "gpt.rules",
    "gpt.plan",
    "gpt.plan.tables",
    "gpt.planning",
    "gpt.runs",
    "gpt.trained",
    "gpt.choosing",
    "gpt.evaluation",
    "gpt.driver",
    "gpt.follow",
    "gpt.cli",
    "gpt.data.samples",
    "gpt.weights.importing",
    "gpt.weights.exporting",
    "launchers.local",
    "launchers.group",
    "gpt.grid.launching",
    "gpt.grid.report",
    "gpt.frozen",
]


def modules() -> dict[str, str]:
    """Module names and their source."""
    found = {}
    for package in ("gpt", "launchers"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(source: str) -> set[str]:
    """Own modules that a source imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("gpt", "launchers")}


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set().union(*FLOORS)


def test_imports_point_down_only() -> None:
    known = set().union(*FLOORS)
    up = [
        f"{name} imports {other}"
        for name, source in modules().items()
        for other in imports(source) & known
        if floor(other) > floor(name)
    ]
    assert up == []


def test_only_topology_starts_fleet() -> None:
    starters = [name for name, source in modules().items() if "fleet.init" in source or "init_parallel_env" in source]
    assert set(starters) <= {"gpt.topology"}


@pytest.mark.parametrize("name", NO_PADDLE)
def test_paddle_stays_out_of_what_plans_and_launches(name: str) -> None:
    code = f"import {name}, sys; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_workers_never_see_hydra() -> None:
    code = "import gpt.tasks.pretrain, sys; sys.exit('hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_cpu_adapter_is_imported_where_the_device_is_a_cpu_and_nowhere_else() -> None:
    found, adapter = [], ("gloo", "gloo_auto")
    for path in [*Path(ROOT / "gpt").rglob("*.py"), *Path(ROOT / "launchers").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If):
                inside = [n for n in node.body if isinstance(n, ast.ImportFrom) and n.names[0].name in adapter]
                found += [(path.name, n.names[0].name, ast.unparse(node.test)) for n in inside]
        assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name in adapter for n in tree.body), path
    assert sorted(found) == [("topology.py", "gloo", "on_cpu"), ("topology.py", "gloo_auto", "on_cpu")]
