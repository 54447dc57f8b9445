"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from gpt.config.schema import LRSchedule, ScheduleName


def lr_at(step: int, peak: float, schedule: LRSchedule) -> float:
    """Learning rate of update ``step``; the first update is step 1.

    Linear warm-up over w steps, then min + (peak - min)(1 + cos(pi (t - w) / (D - w))) / 2 up to D, then min
    (Loshchilov and Hutter, SGDR, 2017, without restarts); or flat after warm-up.

    Example:
        >>> lr_at(1, 5e-5, LRSchedule(ScheduleName.cosine, warmup_steps=3600, decay_steps=360000, min_lr=1e-5))
        1.388888888888889e-08
    """
    warmup, decay, floor = schedule.warmup_steps, schedule.decay_steps, schedule.min_lr
    if step <= warmup and warmup > 0:
        return peak * (step / warmup)
    if schedule.name is ScheduleName.constant:
        return peak
    if step > decay or decay == warmup:
        return floor
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) * (peak - floor)
