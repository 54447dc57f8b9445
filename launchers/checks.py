"""Check, without Paddle, whether this machine can run a job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gpt.config.cluster import Device
from gpt.config.derived import resolve_device
from gpt.config.schema import Config, DType, EngineKind, Parallel
from gpt.train.loggers import build as loggers
from gpt.utils import machine
from gpt.utils.files import conf_dir

TESTED_PADDLE = ("3.3.1",)
INSTALL = "pip install 'paddlepaddle==3.3.1' (CPU), or a GPU wheel: https://www.paddlepaddle.org.cn/en/install/quick"


def mkl_settings() -> dict[str, str]:
    """Return the environment variables that the MKL in Paddle's wheel needs on this processor.

    It is from 2019 and takes its slowest path on a processor that is not Intel's, unless the path is set:
    3.4 times the speed of a matrix product on an AMD EPYC.
    """
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {"MKL_DEBUG_CPU_TYPE": "5"} if "AuthenticAMD" in info and " avx2 " in info else {}


def presets_up_to(ranks: int) -> list[str]:
    """Return fleet's presets of ``parallel`` that need at most ``ranks`` ranks, the largest first."""
    sizes = {}
    for path in sorted(Path(conf_dir(), "parallel").glob("*.yaml")):
        degrees: Any = OmegaConf.load(path)
        if OmegaConf.missing_keys(degrees):
            continue  # parallel=auto
        if degrees.get("engine") == "auto":
            continue  # the same degrees in other hands
        sizes[path.stem] = math.prod([degrees.get(f"{name}_degree", 1) for name in ("dp", "sharding", "mp", "pp")])
    return sorted((name for name, size in sizes.items() if size <= ranks), key=lambda name: -sizes[name])


def problems(config: Config, ranks: int) -> list[str]:
    """Return what this machine lacks for the job."""
    reasons = []
    package = machine.paddle_package()
    if package is None:
        reasons.append(f"PaddlePaddle is not installed: {INSTALL}")
    reasons += loggers.problems(config)
    device = resolve_device(config)
    if device is Device.gpu and package and package[0] != "paddlepaddle-gpu":
        reasons.append(f"cluster.device=gpu, but the installed {package[0]} computes on the CPU only: {INSTALL}")
    elif device is Device.gpu and machine.gpus() == 0:
        reasons.append("cluster.device=gpu, but there is no GPU here: use cluster.device=cpu")
    elif device is Device.gpu and ranks > machine.gpus():
        reasons.append(
            f"{ranks:,} ranks need a GPU each, and this host has {machine.gpus()}: of the presets of parallel, "
            f"{', '.join(presets_up_to(machine.gpus()))} fit; "
            f"cluster.device=cpu simulates all {ranks:,} ranks on the CPU"
        )
    if device is Device.cpu and config.precision.dtype is not DType.fp32:
        reasons.append(
            f"precision={config.precision.dtype.value} needs a GPU: Paddle has no {config.precision.dtype.value} "
            "matrix product on the CPU; use precision=fp32"
        )
    if device is Device.cpu and config.task.facts.trains and config.parallel.engine is EngineKind.auto:
        reasons += _without_kernels(config.parallel)
    return reasons


def _without_kernels(parallel: Parallel) -> list[str]:
    """Return why Paddle 3.3's semi-auto engine cannot run this on a CPU; docs/parallel.md has programs that show it."""
    reasons = []
    if parallel.sharding_degree > 1 and parallel.sharding_stage == 3:
        reasons.append(
            "parallel.engine=auto parallel.sharding_stage=3 needs a GPU: Paddle has no all_to_all on the CPU; "
            "use parallel.sharding_stage=2, or parallel.engine=fleet"
        )
    if parallel.static and parallel.mp_degree > 1 and parallel.dp_degree * parallel.sharding_degree > 1:
        reasons.append(
            f"parallel.static=true with parallel.mp_degree={parallel.mp_degree} and "
            f"{parallel.dp_degree * parallel.sharding_degree} replicas needs a GPU: on the CPU the program of a mesh "
            "with two axes computes other losses; use parallel.static=false"
        )
    return reasons


def warnings() -> list[str]:
    """Return a warning if the installed version of Paddle was not tested."""
    package = machine.paddle_package()
    if package and package[1] not in TESTED_PADDLE:
        return [f"{package[0]} {package[1]} was not tested with this project; {', '.join(TESTED_PADDLE)} was"]
    return []
