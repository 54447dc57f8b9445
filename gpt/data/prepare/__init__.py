"""Raw text to token files, in four steps: sources, documents, encode (in workers), build."""
