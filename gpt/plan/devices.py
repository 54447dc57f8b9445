"""Devices as data: what ``conf/device`` says of one, for a worker that knows only the name Paddle gives it."""

from __future__ import annotations

import functools
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from gpt.config import DType
from gpt.config_plan import DeviceSpec
from gpt.files import conf_dir


@functools.lru_cache(maxsize=1)
def table() -> dict[str, DeviceSpec]:
    """All devices of ``conf/device`` whose figures stand in the file, by name."""
    found = {}
    for path in sorted(Path(conf_dir(), "device").glob("*.yaml")):
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig) and loaded.get("match"):
            spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DeviceSpec), loaded))
            assert isinstance(spec, DeviceSpec)
            found[path.stem] = spec
    return found


def called(device_name: str) -> DeviceSpec | None:
    """The device that Paddle calls so; the longest part of the name that matches decides.

    Example:
        >>> called("NVIDIA A100-SXM4-80GB").memory_gib
        80.0
    """
    parts = ((part, spec) for spec in table().values() for part in spec.match if part in device_name)
    return max(parts, key=lambda pair: len(pair[0]), default=("", None))[1]


def peak(device: DeviceSpec, dtype: DType) -> float | None:
    """FLOP/s of dense matrix products, or None where it is not stated."""
    tflops = getattr(device.peak_tflops, dtype.value)
    return tflops * 1e12 if tflops else None


def peak_flops(device_name: str, dtype: DType) -> float | None:
    """``peak`` of the device that Paddle calls so; None where none is known: no MFU rather than a wrong one.

    Example:
        >>> peak_flops("Some CPU", DType.fp32) is None
        True
    """
    spec = called(device_name)
    return peak(spec, dtype) if spec else None
