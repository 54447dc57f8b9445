"""Devices as data: what ``conf/device`` says of one, for a worker that knows only the name Paddle gives it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from gpt.config.cluster import Device
from gpt.config.derived import peak, resolve_device, schema, world_size
from gpt.config.schema import Config, DType
from gpt.config.task_schemas import DeviceSpec, Peaks
from gpt.utils import machine
from gpt.utils.files import cache_dir, conf_dir

CALIBRATION = ("memory_gib", "fp32_tflops", "bandwidth_gb_s", "link_gb_s")


def calibration_file() -> Path:
    """Where ``scripts/calibrate.py`` puts what it measured of this host."""
    return Path(cache_dir(), "device_cpu.json")


def calibrated(key: str) -> float | None:
    """A measured figure of this host, one of ``CALIBRATION``; None if it was not measured."""
    try:
        stored = json.loads(calibration_file().read_text(encoding="utf-8"))
        return float(stored[key]) if key in CALIBRATION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.lru_cache(maxsize=1)
def table() -> dict[str, DeviceSpec]:
    """All devices of ``conf/device`` whose figures stand in the file, by name."""
    found = {}
    for path in sorted(Path(conf_dir(), "device").glob("*.yaml")):
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig) and loaded.get("match"):
            spec = OmegaConf.to_object(OmegaConf.merge(schema(DeviceSpec), loaded))
            assert isinstance(spec, DeviceSpec)
            found[path.stem] = spec
    return found


def this_host() -> DeviceSpec:
    """``device=cpu``: this host as it was measured, with None where it was not."""
    path = Path(conf_dir(), "device", "cpu.yaml")
    OmegaConf.register_new_resolver("calibrated", calibrated, replace=True)
    spec = OmegaConf.to_object(OmegaConf.merge(schema(DeviceSpec), OmegaConf.load(path)))
    assert isinstance(spec, DeviceSpec)
    return spec


def called(device_name: str) -> DeviceSpec | None:
    """The device that Paddle calls so; the longest part of the name that matches decides.

    Example:
        >>> called("NVIDIA A100-SXM4-80GB").memory_gib
        80.0
    """
    parts = ((part, spec) for spec in table().values() for part in spec.match if part in device_name)
    return max(parts, key=lambda pair: len(pair[0]), default=("", None))[1]


def of_rank(config: Config) -> DeviceSpec:
    """The device of one rank: a share of one that all ranks have in common."""
    device, ranks = config.device, world_size(config)
    if not device.shared or ranks == 1:
        return device
    peaks = {key: value / ranks if value else None for key, value in vars(device.peak_tflops).items()}
    memory, bandwidth = (x / ranks if x else None for x in (device.memory_gib, device.bandwidth_gb_s))
    return replace(device, peak_tflops=Peaks(**peaks), memory_gib=memory, bandwidth_gb_s=bandwidth)


def peak_flops(device_name: str, dtype: DType) -> float | None:
    """``peak`` of the device that Paddle calls so; None where none is known: no MFU rather than a wrong one.

    Example:
        >>> peak_flops("Some CPU", DType.fp32) is None
        True
    """
    spec = called(device_name)
    return peak(spec, dtype) if spec else None


def peak_here(config: Config, device_name: str) -> float | None:
    """FLOP/s of the device that a rank runs on: of the one that was chosen, else of the one that Paddle calls so.

    On a CPU only ``device=cpu`` says it, which is measured.
    """
    chosen = config.device.name is not None
    if config.cluster.device is Device.cpu:
        return peak(of_rank(config), config.precision.dtype) if config.device.name == "cpu" else None
    return peak(config.device, config.precision.dtype) if chosen else peak_flops(device_name, config.precision.dtype)


def known_device(config: Config) -> DeviceSpec:
    """What is known of the devices of a job here: ``device=``, else what this host's GPU is called."""
    known = called(machine.gpu_name()) if resolve_device(config) is Device.gpu and not config.device.name else None
    return known or config.device
