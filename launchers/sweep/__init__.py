"""Many runs from one command: here, on Slurm, or as a search."""
