"""A run on disk: its folder, records, checkpoints, provenance, conversion and reports."""
