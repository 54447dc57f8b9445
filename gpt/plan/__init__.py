"""What a run needs, before it runs: memory, FLOPs, communication and time, by arithmetic on the configuration.

No Paddle and no device: a 175B run on 128 GPUs is planned in milliseconds on a laptop.
"""
