"""A worker's entry, apart from ``encode`` so that what is pickled has one name in both processes."""

from gpt.data.prepare.encode import main

if __name__ == "__main__":
    main()
