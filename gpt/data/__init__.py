"""Text or token files in, samples out."""
