"""Sharded checkpoints, independent of the topology that wrote them."""
