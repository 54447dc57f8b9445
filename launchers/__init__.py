"""Launch a checked job as processes. Nothing here imports Paddle."""
