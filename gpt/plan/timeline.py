"""A job's pipeline on a stated device, simulated."""

from __future__ import annotations

from gpt.config import Config, accumulate_steps
from gpt.plan.cost import stage_times
from gpt.plan.footprint import on_cpu
from gpt.plan.simulation import Pipeline, Timeline, simulate


def timeline(config: Config) -> Timeline | None:
    """One step of ``config`` on ``config.device``; None if that does not state what is needed (``cost.missing``).

    On an accelerator a message keeps both sides busy, as Fleet sends on the stream that computes; on a CPU messages
    travel beside the passes (``gpt.sockets``).
    """
    times, stages = stage_times(config), config.parallel.pp_degree
    if times is None:
        return None
    return simulate(
        Pipeline(
            times.forward,
            times.backward,
            stages,
            accumulate_steps(config),
            config.parallel.virtual_pp_degree,
            links=[times.send] * stages,
            blocking=not on_cpu(config),
            reduction=[times.reduce] * stages,
            update=times.update,
        )
    )
