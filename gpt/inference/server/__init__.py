"""An OpenAI-compatible completions server."""
