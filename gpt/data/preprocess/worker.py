"""A worker's entry, apart from ``encode`` so that what is pickled has one name in both processes."""

from __future__ import annotations

from gpt.data.preprocess.encode import main

if __name__ == "__main__":
    main()
