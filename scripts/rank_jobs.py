"""Starts the ranks of a measurement on this machine, for the benchmarks beside it.

Each rank runs the script again with ``--serve JOB ANSWER``: the configuration as JSON, and a file for its answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpt.config.derived import plain, world_size
from gpt.config.schema import Config
from launchers import checks, rank_env


class RandomSamples:
    """Stands in for ``gpt.data.dataset.TokenDataset``."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def batch(self, first: int, count: int) -> Any:
        """Samples ``first`` to ``first + count`` of random tokens."""
        import numpy as np

        from gpt.data.dataset import Batch

        shape = (count, self.config.data.seq_len + 1)
        tokens = np.random.default_rng(first).integers(0, self.config.model.vocab, shape)
        return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((count, shape[1] - 1), np.float32))


def answers(script: str, config: Config, *more: str) -> list[Any]:
    """What each rank of a job answered; ends this program with a rank's log if it failed.

    Args:
        script: that every rank runs.
        config: of the job.
        more: arguments for the script.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOG_minloglevel": "2"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = []
        for rank, place in enumerate(rank_env.here(world_size(config), gpu=False)):
            job = ["--serve", json.dumps(plain(config)), str(folder / f"{rank}.json"), *more]
            variables = place.variables() if world_size(config) > 1 else {}
            env = {**os.environ, **one_thread, **checks.mkl_settings(), **variables}
            with open(folder / f"{rank}.log", "wb") as log:
                command = [sys.executable, "-W", "ignore", script, *job]
                ranks.append(subprocess.Popen(command, env=env, stderr=log))
        codes = [rank.wait() for rank in ranks]
        for number in (number for number, code in enumerate(codes) if code):
            sys.exit(f"rank {number} of {config.parallel}:\n{(folder / f'{number}.log').read_text()}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(ranks))]
