"""Text generation and scoring."""
