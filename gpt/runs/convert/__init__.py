"""Weights from and to other formats."""
