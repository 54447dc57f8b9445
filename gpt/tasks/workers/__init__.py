"""What each rank does, one module per task with ranks: ``run(job, signals)`` returns the exit code."""
