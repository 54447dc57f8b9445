"""Values that follow from a configuration by arithmetic: degrees, batch sizes, the device, plain mappings."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt.config.cluster import Device
from gpt.config.schema import Config, DType, Parallel, Task
from gpt.config.task_schemas import DeviceSpec
from gpt.utils import machine


def typed(plain: Any) -> Config:
    """Turn a resolved plain mapping (a job's ``config``) into dataclasses.

    Args:
        plain: nested dict or DictConfig with every value present.

    Raises:
        omegaconf.errors.OmegaConfBaseException: on an unknown key or a wrong type.
    """
    merged = OmegaConf.merge(schema(), plain)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def schema(of: type = Config) -> DictConfig:
    """Return a schema as a node to merge values into, which OmegaConf makes read-only for frozen dataclasses."""
    node = OmegaConf.structured(of)
    assert isinstance(node, DictConfig)
    sections = [node]
    for section in sections:
        OmegaConf.set_readonly(section, None)
        sections += [each for key in section if isinstance(each := section._get_node(key), DictConfig)]
    return node


def replace_in(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with other values for some keys.

    Example:
        >>> replace_in(config, {"seed": 3, "trainer.max_steps": 100})  # doctest: +SKIP
    """
    for key, value in values.items():
        config = _replace(config, key, value)
    return config


def _replace(section: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return dataclasses.replace(section, **{name: _replace(getattr(section, name), rest, value) if rest else value})


def plain(config: Config) -> dict[str, Any]:
    """The inverse of ``typed``: only str, int, float, bool, None, list and dict, as JSON holds them."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def replicas(config: Config) -> int:
    """Model replicas that read different samples."""
    return config.parallel.dp_degree * config.parallel.sharding_degree


def world_size(config: Config) -> int:
    """Number of ranks."""
    return replicas(config) * config.parallel.mp_degree * config.parallel.pp_degree


def global_batch_size(config: Config) -> int:
    """Samples per step; without a given number, one micro batch per replica."""
    return config.trainer.global_batch_size or (config.trainer.micro_batch_size or 1) * replicas(config)


def micro_batch_size(config: Config) -> int:
    """Samples of one forward pass; without a given number, a replica's share in one piece per pipeline stage."""
    share = global_batch_size(config) // replicas(config) // config.parallel.pp_degree
    return config.trainer.micro_batch_size or max(1, share)


def accumulate_steps(config: Config) -> int:
    """Micro batches that one replica adds up before a step."""
    return global_batch_size(config) // (micro_batch_size(config) * replicas(config))


def one_rank(config: Config) -> Config:
    """The same job with all degrees 1."""
    alone = Parallel(1, 1, config.parallel.sharding_stage, 1, 1, 1, False)
    return dataclasses.replace(config, parallel=alone)


def padded_vocab(config: Config) -> int:
    """Rows of the embedding table: ``model.vocab`` rounded up to a multiple of 128 x mp_degree."""
    return padded(config.model.vocab, config.parallel.mp_degree)


def padded(vocab: int, mp: int) -> int:
    """``vocab`` rounded up to a multiple of 128 x ``mp``."""
    return -(-vocab // (128 * mp)) * 128 * mp


PADDLE_DTYPE = {DType.fp32: "float32", DType.bf16: "bfloat16", DType.fp16: "float16"}


def resolve_device(config: Config) -> Device:
    """What ``cluster.device=auto`` means here."""
    if config.cluster.device is not Device.auto:
        return config.cluster.device
    package = machine.paddle_package()
    return Device.gpu if machine.gpus() and package and package[0] == "paddlepaddle-gpu" else Device.cpu


def needs_checkpoint(task: Task) -> bool:
    """Return whether the task reads a trained run or checkpoint."""
    return task.facts.needs_checkpoint


def peak(device: DeviceSpec, dtype: DType) -> float | None:
    """FLOP/s of dense matrix products, or None where it is not stated."""
    tflops = getattr(device.peak_tflops, dtype.value)
    return tflops * 1e12 if tflops else None
