"""What is only shown: a batch script, a command per host."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Ran
from slurm_stand_in import SLURM

from gpt import cli
from launchers import nodes


@pytest.mark.slow
def test_a_dry_run_shows_the_script_without_slurm_and_leaves_nothing(
    gpt: Callable[..., Ran], small: list[str], tmp_path: Path
) -> None:
    shown = gpt(*small, *SLURM, "parallel=dp2", "dry_run=true", env={"PATH": str(tmp_path / "none")})
    assert shown.code == 0, shown.text
    assert shown.out.startswith("#!/bin/bash\n#SBATCH --job-name=gpt-tiny_dp2_")
    assert subprocess.run(["bash", "-n"], input=shown.out, text=True, check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_every_host_is_told_its_own_command() -> None:
    overrides = ["cluster=nodes", "cluster.hosts=[a,b]", "cluster.device=cpu", "parallel=dp8", "notes=two words"]
    found = nodes.commands(cli.compose_job(overrides), overrides, ROOT)
    assert [host for host, _ in found] == ["a", "b"]
    for rank, (_, command) in enumerate(found):
        assert f"--master a:29500 --nnodes 2 --rank {rank} --nproc_per_node 4 " in command
        assert " gpt/main.py " in command
        assert command.endswith(" cluster.device=cpu parallel=dp8 'notes=two words'")
        assert "cluster=nodes" not in command
