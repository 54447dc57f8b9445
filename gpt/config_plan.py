"""The typed sections of a plan: what a device can do, and what is asked of the plan. See docs/plan.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Attention(Enum):
    """What the attention of a device keeps for the backward pass."""

    flash = "flash"  # neither scores nor probabilities, and the causal half of the work (Dao et al., 2022)
    matrix = "matrix"  # probabilities, their dropout mask and what it leaves (Korthikanti et al., 2022)


@dataclass
class Peaks:
    """Dense matrix products by element type, in TFLOP/s. None: not stated, so no time and no MFU is said."""

    fp32: float | None = None
    bf16: float | None = None
    fp16: float | None = None


@dataclass
class DeviceSpec:
    """What one accelerator can do. None: not known, and then nothing that needs it is said.

    Bandwidths are in 1e9 bytes per second; those of links are per device and direction.
    """

    name: str | None = None
    match: list[str] = field(default_factory=list)  # parts of the name that Paddle gives it
    memory_gib: float | None = None
    peak_tflops: Peaks = field(default_factory=Peaks)
    efficiency: float = 0.7  # share of the peak that large matrix products reach; of all else by bandwidths
    bandwidth_share: float = 0.8  # of the stated bandwidths that passes over memory and large messages reach
    attention: Attention = Attention.matrix
    bandwidth_gb_s: float | None = None  # of its memory
    intra_node_gb_s: float | None = None
    inter_node_gb_s: float | None = None
    per_node: int = 8
    shared: bool = False  # all ranks of a node share one: the cores of a host
    watts: float | None = None
    price_per_hour: float | None = None  # of one device, in whatever currency


@dataclass
class Plan:
    """Of ``task=plan``."""

    token_budget: int | None = None  # tokens to train on; None: trainer.max_steps global batches
    reserve_gib: float = 2.0  # of every device's memory, for its context, NCCL and what fragments
    require_fit: bool = False  # leave with 2 if the job does not fit
    search: bool = False  # rank all layouts of plan.devices devices
    devices: int | None = (
        None  # of a search, or of parallel=auto; None: as the layout at hand has ranks, or as are here
    )
    top: int = 10  # layouts to show
    picture: str | None = None  # file for the pipeline's timeline, .svg or .png
