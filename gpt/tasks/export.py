"""``task=export``: a checkpoint to a folder for other programs."""

from __future__ import annotations

from gpt.runs.convert import export_weights
from gpt.tasks.spec import TaskSpec

TASK = TaskSpec(lambda command: export_weights.check(command.config), worker="gpt.tasks.workers.export")
