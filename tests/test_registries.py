"""The recipes of CONTRIBUTING.md for an optimizer and a logger, followed with toy examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL, configured

from gpt.config import optimizers
from gpt.config.optimizers import OptimizerSpec
from gpt.config.parameters import parameter_shapes
from gpt.data import corpus
from gpt.data.dataset import Split, TokenDataset
from gpt.parallel.topology import Topology
from gpt.plan import memory
from gpt.runs.run_dir import Job
from gpt.train import loggers
from gpt.train.loggers import build
from gpt.train.trainer import Trainer

ROW = OptimizerSpec(
    lambda settings, parameters, decays, master_weights: __import__("paddle").optimizer.SGD(
        learning_rate=settings.lr, parameters=parameters, multi_precision=master_weights
    ),
    moments=0,
    reads=(),
)
LOGGER = """
from pathlib import Path
from gpt.train.loggers.base import Logger, LoggerSpec

class Lines(Logger):
    def __init__(self, job): self.path = job.run_dir / "lines.txt"
    def write(self, record): self.path.write_text(f"{record['step']}\\n")

LOGGER = LoggerSpec(
    "lines", enabled=lambda config: "lines" in config.tags, make=Lines, summarise=lambda job, step, numbers: None,
    problems=lambda: ["no room for lines"],
)
"""


@pytest.mark.parametrize("name", ["adam", "sgd", "toy"])
def test_a_row_is_all_that_an_optimizer_needs(text: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(optimizers.OPTIMIZERS, "toy", ROW)
    config = configured([*SMALL, "data=text", f"data.path={text}", f"optimizer.name={name}", "data.overfit=true"])
    data = TokenDataset(config, corpus.prepare(config), Split.train)
    trainer = Trainer(config, Topology.initialize(config))
    first, *_, last = (trainer.step(number, data).loss for number in range(1, 7))
    assert last < first
    elements = sum(p.size for p in trainer.strategy.parameters.values())
    slots = [s for s in trainer.strategy.optimizer.state_dict().values() if getattr(s, "size", 1) > 1]
    planned = memory.memory(config).optimizer
    assert planned == 4 * sum(s.size for s in slots) == 4 * optimizers.OPTIMIZERS[name].moments * elements
    assert set(trainer.strategy.parameters) == set(parameter_shapes(config))


def test_an_unknown_optimizer_is_refused_with_those_there_are() -> None:
    with pytest.raises(Exception, match=r"optimizer\.name=lion: no such optimizer; there are adamw, adam, sgd"):
        configured(["optimizer.name=lion"])


def test_a_module_is_all_that_a_logger_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines.py").write_text(LOGGER)
    monkeypatch.setattr(loggers, "__path__", [*loggers.__path__, str(tmp_path)])
    job = Job(configured(["tags=[lines]"]), corpus.DatasetInfo([], "f", None, None, None, 0), tmp_path, [])
    assert build.problems(job.config) == ["no room for lines"]
    for logger in build.loggers(job)[1]:
        logger.write({"step": 7})
    assert (tmp_path / "lines.txt").read_text() == "7\n"
    assert build.enabled(configured([])) == []
