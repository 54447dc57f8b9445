"""Look at token files, whichever their format: figures, documents, a picture of the lengths.

    python scripts/inspect_tokens.py corpus
    python scripts/inspect_tokens.py corpus --tokenizer gpt2 --document 0 --document 17 --tokens 200
    python scripts/inspect_tokens.py corpus.bin --tokenizer corpus/tokenizer.json --samples 3 --picture lengths.png

Tokens are read where they are needed only, except for one pass that counts them all (300 million in seconds).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.data import token_files, tokenizer, tokenizer_files  # noqa: E402
from gpt.data.token_files import SCAN_BLOCK, TokenSet  # noqa: E402
from gpt.data.tokenizer import Encoder  # noqa: E402
from gpt.utils.arrays import Array  # noqa: E402
from gpt.utils.errors import UserError  # noqa: E402
from gpt.utils.files import cache_dir  # noqa: E402

PERCENTILES = {"min": 0, "5%": 5, "median": 50, "95%": 95, "99%": 99, "max": 100}


def counts(token_set: TokenSet) -> Array:
    """How often each token number occurs, block by block."""
    total = np.zeros(1 + token_set.largest_id(), np.int64)
    for start in range(0, len(token_set.ids), SCAN_BLOCK):
        block = np.bincount(token_set.ids[start : start + SCAN_BLOCK])
        total[: len(block)] += block
    return total


def shown(token: int, encoder: Encoder | None) -> str:
    """A token as its number, and its text where there is a tokenizer."""
    return f"{token}" if encoder is None else f"{token} {json.dumps(encoder.decode([token]), ensure_ascii=False)}"


def figures(token_set: TokenSet, lengths: Array, encoder: Encoder | None) -> list[str]:
    """What there is to say about a set, in lines."""
    total = counts(token_set)
    share = total[total > 0] / total.sum()
    entropy = float(-(share * np.log(share)).sum())
    paths = token_files.paths_of(token_set.prefix)
    at = {name: np.percentile(lengths, p) for name, p in PERCENTILES.items()}
    most = np.argsort(-total, kind="stable")[:10]
    lines = [
        f"{paths[0]} + {paths[1].name}: {sum(p.stat().st_size for p in paths) / 1e6:,.1f} MB, {token_set.ids.dtype}",
        f"tokens      {len(token_set.ids):>15,}",
        f"documents   {token_set.documents:>15,}   ({int((lengths == 0).sum()):,} empty)",
        f"vocabulary  {len(share):>15,} different tokens, the largest {len(total) - 1:,}",
        f"entropy     {entropy:>15.3f} nats a token: the loss of knowing only how often each token occurs",
        f"length      {'  '.join(f'{name} {value:,.0f}' for name, value in at.items())}  mean {lengths.mean():,.1f}",
        "most often  " + ", ".join(f"{shown(int(t), encoder)} {total[t] / total.sum():.1%}" for t in most if total[t]),
    ]  # fmt: skip
    if encoder is not None:
        lines.append(f"tokenizer   {encoder.vocab:>15,} tokens, end-of-text {encoder.eot}, identity {encoder.digest}")
        if len(total) > encoder.vocab:
            lines.append(f"WARNING     token {len(total) - 1} is beyond this tokenizer: it is not the one of this data")
        last = token_set.document_ends[lengths > 0] - 1
        if encoder.eot is not None:
            ended = float((token_set.ids[last[:: max(1, len(last) // 10_000)]] == encoder.eot).mean())
            lines.append(f"            {ended:.1%} of documents end with end-of-text")
    return lines


def picture(lengths: Array, path: Path, title: str) -> None:
    """Histogram of document lengths, log scale, with the share of tokens beside the share of documents."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    some = lengths[lengths > 0]
    edges = np.unique(np.geomspace(some.min(), some.max() + 1, 50).round())
    edges = edges if len(edges) > 1 else np.array([some.min(), some.max() + 1])
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for weights, label, color in ((None, "documents", "#1f6f8b"), (some, "tokens", "#e08e45")):
        height, _ = np.histogram(some, edges, weights=weights)
        axes.stairs(height / height.sum() * 100, edges, label=f"share of {label}", fill=True, alpha=0.5, color=color)
    median = float(np.median(some))
    axes.axvline(median, color="#333333", linewidth=1, linestyle="--", label=f"median {median:,.0f}")
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="% per bar", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(token_set: TokenSet, number: int, encoder: Encoder | None, limit: int) -> list[str]:
    """One document, its first ``limit`` tokens.

    Raises:
        UserError: there is no such document.
    """
    if not 0 <= number < token_set.documents:
        raise UserError(f"{token_set.prefix}: there is no document {number}; there are {token_set.documents:,}")
    begin, end = (int(token_set.document_ends[n]) if n >= 0 else 0 for n in (number - 1, number))
    ids = token_set.ids[begin : min(end, begin + limit)].tolist()
    more = f", the first {limit:,}" if end - begin > limit else ""
    head = f"--- document {number:,}: {end - begin:,} tokens{more} ---"
    return [head, " ".join(map(str, ids)) if encoder is None else encoder.decode(ids)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="prefix of the set, one of its files, or a folder with one set")
    parser.add_argument(
        "--tokenizer", help="tokenizer.json, .model, a folder with one, or gpt2; else the one beside the set"
    )
    parser.add_argument("--document", type=int, action="append", default=[], help="number of a document to show")
    parser.add_argument("--samples", type=int, default=2, help="documents to show, spread over the set (default 2)")
    parser.add_argument("--tokens", type=int, default=100, help="of a document to show (default 100)")
    parser.add_argument("--picture", type=Path, help="PNG of the document lengths")
    options = parser.parse_args(arguments)
    try:
        prefixes = token_files.prefixes_at(options.set)
        if len(prefixes) != 1:
            raise UserError(f"{options.set}: {len(prefixes)} sets in this folder; name one: {' '.join(prefixes)}")
        token_set = token_files.load(prefixes[0])
        encoder = None
        beside = token_files.tokenizer_path(prefixes[0])
        name = options.tokenizer or (str(beside) if beside.is_file() else None)
        if name:
            encoder = tokenizer.open_encoder(tokenizer_files.find(name, Path(cache_dir())))
        lengths = np.diff(token_set.document_ends, prepend=0)
        print("\n".join(figures(token_set, lengths, encoder)))
        spread = np.linspace(0, token_set.documents - 1, max(0, options.samples), dtype=int).tolist()
        for number in options.document or dict.fromkeys(spread):
            print("\n".join(show(token_set, number, encoder, options.tokens)))
        if options.picture:
            picture(lengths, options.picture, f"{Path(prefixes[0]).name}: {token_set.documents:,} documents")
            print(f"picture: {options.picture}")
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
