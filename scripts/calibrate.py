"""Measures this host for plans with device=cpu: matrix products, memory, Gloo between two ranks. Under a minute.

    python scripts/calibrate.py

Figures go to device_cpu.json in the cache folder ($GPT_CACHE, or gpt/ in the user's cache folder). Run it while nothing
else does: a plan is as honest as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.derived import plain, typed  # noqa: E402
from gpt.plan.devices import CALIBRATION, calibration_file  # noqa: E402
from gpt.utils import machine  # noqa: E402
from gpt.utils.files import write_json  # noqa: E402
from launchers import local, rank_env  # noqa: E402

SIZE = 1536  # of square products
ELEMENTS = 1 << 25  # of a pass over memory, and of an exchange: 128 MiB, as a bucket of gpt.parallel.gradients
TRIES = 12


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls: what the host can do; other load only slows."""
    found = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def compute() -> dict[str, float]:
    """Measure TFLOP/s of Paddle's float32 product and GB/s of a CPU kernel's pass (one array read, one written)."""
    import numpy as np
    import paddle

    from gpt.model.cpu_kernels import over_rows, tiles

    a, b = (paddle.randn([SIZE, SIZE]) for _ in range(2))
    product = fastest(lambda: paddle.matmul(a, b).numpy()[0, 0])
    x, y = np.ones(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)

    def work(first: int, last: int) -> None:
        for s in tiles(first, last, 1 << 15):
            np.multiply(x[s], np.float32(2), out=y[s])

    passed = fastest(lambda: over_rows(work, ELEMENTS))
    return {"fp32_tflops": 2 * SIZE**3 / product / 1e12, "bandwidth_gb_s": 2 * 4 * ELEMENTS / passed / 1e9}


def exchange(job: str) -> dict[str, float]:
    """GB/s that a rank of two sends while they add up 128 MiB, as ``gpt.parallel.gradients`` does."""
    import paddle
    import paddle.distributed as dist

    from gpt.parallel.topology import Topology

    topology = Topology.initialize(typed(json.loads(job)))
    flat = paddle.ones([ELEMENTS])
    (group,) = topology.gradient_groups
    seconds = fastest(lambda: dist.all_reduce(flat, group=group))
    return {"link_gb_s": 4 * ELEMENTS / seconds / 1e9}


def serve(what: str, job: str, answer: Path) -> None:
    """In a process of its own, whose threads are set by its environment."""
    from gpt.worker import exit_process

    answer.write_text(json.dumps(compute() if what == "compute" else exchange(job)))
    exit_process(0)


def run(what: str, ranks: int) -> dict[str, float]:
    """Start ``ranks`` processes, each in the environment of a worker, and return what the first measured."""
    config = cli.compose_job([*([f"parallel=dp{ranks}"] if ranks > 1 else []), "cluster.device=cpu"])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank, place in enumerate(rank_env.here(ranks, gpu=False)):
            answer, log = (str(Path(folder, f"{rank}.{ending}")) for ending in ("json", "log"))
            command = [sys.executable, "-W", "ignore", __file__, "--serve", what, json.dumps(plain(config)), answer]
            env = {**local.environment(config, ranks), **(place.variables() if ranks > 1 else {})}
            with open(log, "wb") as said:
                started.append(subprocess.Popen(command, env=env, stderr=said))
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit(f"measuring {what} failed:\n" + "".join(p.read_text() for p in Path(folder).glob("*.log")))
        found: dict[str, float] = json.loads(Path(folder, "0.json").read_text())
        return found


def main() -> None:
    """Measure, store, say."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    memory = machine.memory_gib()
    found = {"memory_gib": memory, **run("compute", 1), **run("exchange", 2)}
    assert set(found) == set(CALIBRATION)
    file = calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**found, "cores": machine.cores(), "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    print(
        f"{machine.cores()} cores: {found['fp32_tflops'] * 1000:,.0f} GFLOP/s in float32 products, "
        f"{found['bandwidth_gb_s']:.1f} GB/s of memory, {found['link_gb_s']:.2f} GB/s between two ranks, "
        f"{memory:.1f} GiB: {file}"
    )


if __name__ == "__main__":
    main()
