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


def degrees_name(p: Parallel) -> str:
    """Degrees as presets are called.

    Example:
        >>> degrees_name(Parallel(2, 8, 3, 4, 1, 1, True)), degrees_name(Parallel(1, 1, 1, 1, 1, 1, False))
        ('dp2_sharding8_stage3_mp4', 'single')
    """
    degrees = {"dp": p.dp_degree, "sharding": p.sharding_degree, "mp": p.mp_degree, "pp": p.pp_degree}
    words = [f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1]
    stage = p.sharding_stage if p.sharding_degree > 1 else 1
    at = next((i + 1 for i, word in enumerate(words) if word.startswith("sharding")), 0)
    return "_".join([*words[:at], *([f"stage{stage}"] if stage > 1 else []), *words[at:]]) or "single"
