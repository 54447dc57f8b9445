"""Where records go: metrics.jsonl, W&B, TensorBoard."""
