"""How a checked job becomes processes. Nothing here imports Paddle."""
