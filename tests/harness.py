"""Runs a function on several ranks: each a Python process with the environment that Paddle wants.

    results = run("ranks:where", 2, config)

calls ``where(config)`` of ``tests/ranks.py`` on two ranks; each returns what JSON holds.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpt.worker import exit_process
from launchers import checks, rank_env

TESTS = Path(__file__).resolve().parent
LAST_LINES = 25


class RankFailedError(Exception):
    """A rank did not end well; the message has its last lines."""


def environment() -> dict[str, str]:
    """Of every rank: one thread each, and nothing of a job that these tests may themselves be part of."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "FLAGS_"))}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOG_minloglevel": "1"}
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**kept, **one_thread, **checks.mkl_settings(), "PYTHONPATH": path}


def run(target: str, world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Call ``module:function`` with JSON ``arguments`` on ``world_size`` ranks.

    Returns:
        What each rank returned.

    Raises:
        RankFailedError: a rank failed, or the time is over; no process is left.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = [folder / f"{rank}.log" for rank in range(world_size)]
        processes = []
        for rank, place in enumerate(rank_env.here(world_size, gpu=False)):
            with open(logs[rank], "wb") as log:
                command = [sys.executable, __file__, target, str(folder / f"{rank}.json"), json.dumps(arguments)]
                env = {**environment(), **place.variables()}
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            _watch(processes, logs, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _watch(processes: list[subprocess.Popen[bytes]], logs: list[Path], deadline: float) -> None:
    """Until all ended with 0."""
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None and time.monotonic() > deadline:
            failed = codes.index(None)
        if failed is not None:
            lines = logs[failed].read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise RankFailedError("\n".join([f"rank {failed}: exit code {codes[failed]} (None: time over)", *lines]))
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def main() -> None:
    """In a rank: call the function and write its result."""
    target, result, arguments = sys.argv[1:]
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    exit_process(0)


if __name__ == "__main__":
    main()
