"""Run many cells from one command: on this host, on Slurm, or as a search."""
