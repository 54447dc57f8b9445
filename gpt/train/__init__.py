"""One training step, evaluation, metrics, loggers."""
