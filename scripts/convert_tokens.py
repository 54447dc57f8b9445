"""Turn token files of one format into the other: published ``_ids.npy``, ``_idx.npz``, Megatron's ``.bin``, ``.idx``.

    python scripts/convert_tokens.py corpus_text_document converted/corpus
    python scripts/convert_tokens.py converted/corpus back/corpus_text_document

Tokens, sentences and documents stay what they are, and a tokenizer beside the set comes along. Training reads either
format, so only other programs need this.
Token numbers are written as uint16 if they fit, else as int32, which both formats hold.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.data import token_files  # noqa: E402
from gpt.utils.errors import UserError  # noqa: E402

COMPANIONS = ("_manifest.json", "_tokenizer.json", "_tokenizer.model")  # what goes with a prepared set


def convert(source: str, out: str) -> str:
    """Write the set at ``source`` in the other format; returns what was done, in a sentence.

    Raises:
        UserError: the source is damaged, or there is something at ``out`` already.
    """
    from_megatron = token_files.paths_of(source)[0].suffix == ".bin"
    endings, write = (
        (("_ids.npy", "_idx.npz"), token_files.write)
        if from_megatron
        else ((".bin", ".idx"), token_files.write_megatron)
    )
    there = [f"{out}{ending}" for ending in endings if Path(f"{out}{ending}").exists()]
    if there:
        raise UserError(f"{' and '.join(there)} exists already: choose another name or remove it")
    ids, lens, docs = token_files.read(source)
    largest = token_files.load(source).largest_id()
    if largest > np.iinfo(np.int32).max:
        raise UserError(f"{source}: token number {largest} does not fit int32")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    paths = write(out, ids, lens, docs, np.uint16 if largest < 1 << 16 else np.int32)
    bare = str(token_files.paths_of(source)[0]).removesuffix("_ids.npy").removesuffix(".bin")
    for ending in COMPANIONS:
        if Path(f"{bare}{ending}").is_file() and Path(bare).resolve() != Path(out).resolve():
            shutil.copyfile(f"{bare}{ending}", f"{out}{ending}")
    size = sum(path.stat().st_size for path in paths) / 1e6
    return (
        f"{paths[0]} and {paths[1]}: {len(ids):,} tokens, {len(docs) - 1:,} documents, {size:.1f} MB "
        f"in {time.perf_counter() - start:.2f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for bad input, with nothing written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="prefix of the set, or one of its two files")
    parser.add_argument("out", help="prefix of the files to write")
    options = parser.parse_args(arguments)
    try:
        print(convert(options.source, options.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
