"""The GPT and its kernels."""
