"""What a run needs, before it runs: arithmetic on the configuration, no Paddle, no device.

A 175B run on 128 GPUs is planned in milliseconds on a laptop. ``counts`` parameters and FLOPs, ``footprint`` bytes,
``traffic`` what travels, ``cost`` seconds, ``devices`` the data of ``conf/device``.
"""

from gpt.plan.cost import pipeline_bubble
from gpt.plan.counts import first_loss, flops_per_token, parameters
from gpt.plan.devices import peak_flops
from gpt.plan.footprint import Memory, memory
from gpt.plan.summary import summary

__all__ = [
    "Memory", "first_loss", "flops_per_token", "memory", "parameters", "peak_flops", "pipeline_bubble", "summary",
]  # fmt: skip
