"""Stand-ins for Slurm's commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SLURM = ["cluster=slurm", "cluster.device=cpu", "cluster.per_node=1"]
# Stand-ins: sbatch numbers jobs and puts them into the queue, squeue shows it, the others write down what they hear.
COMMANDS = {
    "sbatch": """
if [ "$1" = --test-only ]; then
grep -q 'partition=nope' && { echo 'sbatch: error: invalid partition' >&2; exit 1; }; exit 0; fi
number=$(( $(cat number 2>/dev/null || echo 10) + 1 )); echo $number > number
count=$(sed -n 's/^#SBATCH --array=0-//p' "$2")
if [ -z "$count" ]; then echo "$number|N/A|PENDING|(None)|$2" >> queue; else
for i in $(seq 0 $count); do echo "$number|$i|PENDING|(None)|$2" >> queue; done; fi
echo $number""",
    "squeue": '[ -e broken ] && { echo "Unable to contact slurm controller" >&2; exit 1; }\ncat queue || :',
    "scancel": 'echo "$@" >> scancel.log; [ -e step ] && kill -TERM $(cat step); :',
    "scontrol": 'echo "$@" >> scontrol.log; cat job 2>/dev/null; :',
    "srun": "exec sh ./step.sh",
}


def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command is typed, with Slurm's commands as stand-ins that keep their files there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
