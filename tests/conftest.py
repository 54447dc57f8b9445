"""What tests share: configurations as a user composes them, a small real text, and the command itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", "2")
with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    import paddle  # noqa: F401

import harness  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from gpt import cli  # noqa: E402
from gpt.config.schema import Config  # noqa: E402
from launchers.sweep.compose import Composer  # noqa: E402

cli.register()

# A model that trains in milliseconds, on a text that is made here; dropout on, since it must be reproducible too.
SMALL = [
    "model=tiny",
    "model.hidden=32",
    "model.layers=2",
    "model.heads=2",
    "model.positions=32",
    "model.vocab=384",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "trainer.max_steps=12",
    "trainer.save_every=4",
    "trainer.eval_every=6",
    "trainer.eval_batches=2",
    "schedule.warmup_steps=2",
    "schedule.decay_steps=20",
    "cluster.threads=1",
]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or written to the user's own cache."""
    os.environ["GPT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))  # of grids' slots: a user's own grid may have them all
    for key in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        os.environ[key] = str(tmp_path_factory.mktemp("wandb"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents of real English: docstrings of the standard library."""
    import argparse
    import collections
    import decimal
    import logging
    import pathlib
    import random
    import subprocess as sub

    folder = tmp_path_factory.mktemp("text")
    modules = (argparse, collections, decimal, logging, pathlib, random, sub)
    docs = [
        member.__doc__
        for module in modules
        for member in vars(module).values()
        if isinstance(getattr(member, "__doc__", None), str) and len(member.__doc__) > 400
    ]
    for number, doc in enumerate(docs[:40]):
        (folder / f"{number:02}.txt").write_text(doc, encoding="utf-8")
    return folder


@pytest.fixture(params=["stored", "torch"])
def reference(request: pytest.FixtureRequest) -> Any:
    """What torch and transformers compute: as stored in tests/expected, and by themselves where they are installed."""
    if request.param == "stored":
        from foreign import Stored

        return Stored()
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=f"no {module} (the extra bench): compared with stored values only")
    from scripts.make_expected import Torch

    return Torch()


@pytest.fixture
def small(text: Path) -> list[str]:
    """Overrides of a small job on that text."""
    return [*SMALL, "data=text", f"data.path={text}"]


class Hydra:
    """What a grid composes its cells with: groups once, values on copies, which is a tenth of the time."""

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3", job_name="gpt"):
            return compose("config", overrides, return_hydra_config=True)


@cache
def _composer() -> Composer:
    return Composer(Hydra(), Hydra().load_sweep_config(DictConfig({}), []))


def composed(overrides: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """Configuration and choices, as the command would see them."""
    configuration, choices = _composer().compose(cli.quote_free_text(overrides))
    return configuration, dict(choices)


def configured(overrides: list[str]) -> Config:
    """The typed configuration, on the CPU."""
    overrides = ["cluster.device=cpu", *overrides]
    return cli.resolve(*composed(overrides), overrides).config


@dataclass
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@pytest.fixture
def gpt(tmp_path: Path) -> Callable[..., Ran]:
    """Runs ``python -m gpt.main`` in an empty folder, as a user would; forked, unless with a path of its own."""

    def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 120) -> Ran:
        env = {"PYTHONPATH": str(ROOT), **(env or {})}
        if env["PYTHONPATH"] == str(ROOT):
            return Ran(*harness.command(list(arguments), tmp_path, {**os.environ, **env}, timeout))
        done = subprocess.run(
            [sys.executable, "-m", "gpt.main", *arguments],
            cwd=tmp_path,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The run directory of an undisturbed small job; read only."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "gpt.main", *SMALL, "data=text", f"data.path={text}", f"hydra.run.dir={run_dir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of a run, which must all be whole."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wandb_records(segment: Path) -> list[dict[str, Any]]:
    """All records of an offline folder, as W&B's own reader tells them."""
    return [json.loads(line) for line in _inspected(segment).splitlines() if line.startswith("{")]


def wandb_summary(segment: Path) -> dict[str, Any]:
    """What they come to."""
    found: dict[str, Any] = json.loads(_inspected(segment, "--summary"))
    return found


def _inspected(segment: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(segment)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
