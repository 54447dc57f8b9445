"""Scalars in ``<run>/tensorboard``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gpt.runs.run_dir import Job
from gpt.train.loggers.base import Logger, LoggerSpec, Record


class TensorBoard(Logger):
    """Scalars over steps in ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, record: Record) -> None:
        """All numbers of the record."""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])

    def close(self, status: str, code: int, why: str = "") -> None:
        """Flush and close."""
        self._writer.close()


def summarise(job: Job, step: int, numbers: Record) -> None:
    """Log the figures of an evaluation at ``step``."""
    board = TensorBoard(job.run_dir)
    board.write({"step": step, **numbers})
    board.close("done", 0)


def problems() -> list[str]:
    """Return what keeps TensorBoard from being used here."""
    if importlib.util.find_spec("tensorboardX"):
        return []
    return ["logger.tensorboard needs tensorboardX: pip install tensorboardX"]


LOGGER = LoggerSpec(
    "TensorBoard",
    enabled=lambda config: config.logger.tensorboard,
    make=lambda job: TensorBoard(job.run_dir),
    summarise=summarise,
    problems=problems,
)
