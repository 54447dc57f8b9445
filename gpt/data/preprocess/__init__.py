"""Raw text to token files, in parallel."""
