"""This host: cores, memory, GPUs, installed packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from gpt import __version__

GPU_FOLDER = Path("/proc/driver/nvidia/gpus")  # what the driver says of each
PACKAGES = (
    "paddlepaddle", "paddlepaddle-gpu", "numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "tiktoken",
    "sentencepiece", "wandb", "tensorboardX", "ml-dtypes", "protobuf", "nvidia-nccl-cu12", "nvidia-cudnn-cu12",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what computes, composes and records."""
    found = {"gpt": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpu_names(folder: Path = GPU_FOLDER) -> list[str]:
    """What the driver calls this host's GPUs."""
    found = []
    for path in sorted(folder.glob("*/information")):
        with contextlib.suppress(OSError, StopIteration):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found.append(next(line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")))
    return found


def machine() -> dict[str, Any]:
    """This host: its name, system, processor, cores that this process may use, and the driver's list of GPUs."""
    cpu = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpu_names(),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_gib() -> float:
    """Main memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def gpus() -> int:
    """NVIDIA GPUs that a job may use: CUDA_VISIBLE_DEVICES, else what the driver lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() not in ("", "-1")])
    return len(list(GPU_FOLDER.iterdir())) if GPU_FOLDER.is_dir() else 0


def gpu_name() -> str:
    """What the driver calls the first GPU of this host; '' without one."""
    return next(iter(gpu_names(GPU_FOLDER)), "")


def paddle_package() -> tuple[str, str] | None:
    """Name and version of the installed Paddle, or None."""
    for name in ("paddlepaddle-gpu", "paddlepaddle"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ("paddlepaddle", "unknown") if importlib.util.find_spec("paddle") else None
