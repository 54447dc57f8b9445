"""The schema of ``parallel``: how ranks share a job out, and who does it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class EngineKind(Enum):
    """Who shares the model out: Fleet's layers and groups, or Paddle's semi-auto engine by ``gpt.placements``."""

    fleet = "fleet"
    auto = "auto"


@dataclass
class Parallel:
    """Degrees; their product is the number of ranks. Replicas = dp_degree x sharding_degree."""

    dp_degree: int = MISSING
    sharding_degree: int = MISSING
    sharding_stage: int = MISSING
    mp_degree: int = MISSING
    pp_degree: int = MISSING
    virtual_pp_degree: int = MISSING
    sequence_parallel: bool = MISSING
    engine: EngineKind = EngineKind.fleet
    static: bool = False  # of engine=auto: the step is lowered to a static program
