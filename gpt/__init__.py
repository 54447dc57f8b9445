"""A Hydra-composed experiment runner for GPT models on PaddlePaddle."""

__version__ = "0.1.0"
