"""Imports point down from room to room, no circle of files exists, and the light rooms stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up: a module imports from its own room and from those above it in this list. docs/architecture.md
# opens with the same list.
ROOMS = [
    "gpt.utils",
    "gpt.config",
    "gpt.data",
    "gpt.plan",
    "gpt.parallel",
    "gpt.model",
    "gpt.runs",
    "gpt.train",
    "gpt.inference",
    "gpt.tasks",
    "gpt.cli gpt.worker",
    "launchers",
    "gpt.main gpt.lm_eval launchers.plugins",
]
NO_PADDLE = ["gpt.utils", "gpt.config", "gpt.data", "gpt.plan", "gpt.tasks", "gpt.cli", "launchers"]
NO_PADDLE_MODULES = [
    "gpt.runs.run_dir", "gpt.runs.source", "gpt.runs.evaluation", "gpt.runs.grid", "gpt.runs.report.report",
    "gpt.runs.convert.import_weights", "gpt.runs.convert.export_weights",
]  # fmt: skip
NO_HYDRA = ["gpt.utils", "gpt.config", "gpt.data", "gpt.parallel", "gpt.model", "gpt.runs", "gpt.train", "gpt.tasks"]


def sources() -> dict[str, Path]:
    """Module names and their files."""
    files = [path for package in ("gpt", "launchers") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path, modules: set[str]) -> set[str]:
    """Own modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (full & modules) or {node.module}
    return names & modules


def graph() -> dict[str, set[str]]:
    """Every module with those that it imports."""
    files = sources()
    return {name: imports(path, set(files)) for name, path in files.items()}


def room(name: str) -> int:
    """The room of a module: the longest entry of ``ROOMS`` that its name begins with."""
    matches = [(len(p), i) for i, row in enumerate(ROOMS) for p in row.split() if f"{name}.".startswith(f"{p}.")]
    return max(matches)[1] if matches else -1  # the package gpt itself is the ground


def modules_of(prefixes: list[str]) -> list[str]:
    return [name for name in sources() if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)]


def test_imports_point_down_from_room_to_room() -> None:
    up = [f"{name} imports {other}" for name, others in graph().items() for other in others if room(other) > room(name)]
    assert up == []


def test_no_circle_of_files_exists() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def loaded_with(modules: list[str]) -> set[str]:
    """Top-level packages that a fresh process has loaded after importing ``modules``."""
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_paddle_is_not_imported_where_runs_are_composed_planned_and_launched() -> None:
    light = [name for name in modules_of(NO_PADDLE) if ".plugins" not in name and ".workers" not in name]
    assert "paddle" not in loaded_with([*light, *NO_PADDLE_MODULES])


def test_workers_and_frozen_cells_never_import_hydra() -> None:
    light = [*modules_of(NO_HYDRA), "gpt.worker", "launchers.sweep.run_cell"]
    assert "hydra" not in loaded_with(light)


def test_only_the_topology_starts_fleet() -> None:
    starters = [n for n, p in sources().items() if {"fleet.init(", "init_parallel_env("} & set(_calls(p))]
    assert starters == ["gpt.parallel.topology"]


def _calls(path: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [f"{ast.unparse(call.func)}(" for call in calls]


def test_the_cpu_adapter_is_imported_where_the_device_is_a_cpu_and_nowhere_else() -> None:
    guarded, adapter = [], ("gloo", "semi_auto_gloo")
    for path in sources().values():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If):
                inside = [n for n in node.body if isinstance(n, ast.ImportFrom) and n.names[0].name in adapter]
                guarded += [(path.name, n.names[0].name, ast.unparse(node.test)) for n in inside]
        assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name in adapter for n in tree.body), path
    assert sorted(guarded) == [("strategy.py", "semi_auto_gloo", "on_cpu"), ("topology.py", "gloo", "on_cpu")]
