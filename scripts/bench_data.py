"""Speed of text to tokens and of the sample index, side by side in one run; --write puts the tables into the docs.

    pip install -e '.[cpu,dev,gpt2]'
    python scripts/bench_data.py --write

Text: the standard library's sources, GPT-2's vocabulary. Every variant encodes in processes of its own, one and two
of them, each pinned to a core; megabytes a second are of all together, wall time, the tokenizer already open. The
predecessor's algorithm is byte-pair merging in pure Python with a cache by word, written here from its description.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.data import sampler, tokenizer, tokenizer_files  # noqa: E402
from gpt.utils.arrays import Array  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402

VARIANTS = {
    "ours": "`open_encoder`: tiktoken's engine",
    "tokenizers": "Hugging Face `tokenizers`, `encode_batch` of 64 documents",
    "predecessor": "byte-pair merging in pure Python, cache by word",
}
SEQ_LEN = 1024


class PurePython:
    """The predecessor's way: a regular expression cuts words, each is merged pair by pair, results are remembered."""

    def __init__(self, path: Path) -> None:
        import regex

        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        self.numbers: dict[str, int] = model["vocab"]
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.letter = {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.cache: dict[str, list[int]] = {}

    def merge(self, word: str) -> list[int]:
        """Token numbers of one word."""
        if word in self.cache:
            return self.cache[word]
        parts = [self.letter[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, 1 << 60))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        self.cache[word] = ids = [self.numbers[part] for part in parts]
        return ids

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        return [number for word in self.words.findall(text) for number in self.merge(word)]


def texts(limit: float) -> list[str]:
    """Standard library sources, up to ``limit`` megabytes."""
    import sysconfig

    root, out, size = Path(sysconfig.get_path("stdlib")), [], 0
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idle_test", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        out.append(text)
        size += len(text.encode())
        if size > limit * 1e6:
            break
    return out


def encode_all(variant: str, path: Path, documents: list[str]) -> Callable[[], int]:
    """A function that encodes all documents and returns the number of tokens."""
    if variant == "tokenizers":
        from tokenizers import Tokenizer

        theirs = Tokenizer.from_file(str(path))
        batches = [documents[i : i + 64] for i in range(0, len(documents), 64)]
        return lambda: sum(len(row.ids) for batch in batches for row in theirs.encode_batch(batch))
    encoder: Any = tokenizer.open_encoder(path) if variant == "ours" else PurePython(path)
    return lambda: sum(len(encoder.encode(document)) for document in documents)


def worker(variant: str, path: Path, limit: float, core: int) -> None:
    """One process: ready, then encode when told to."""
    os.sched_setaffinity(0, {core})
    documents = texts(limit)
    run = encode_all(variant, path, documents)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    count = run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(len(d.encode()) for d in documents)
    print(json.dumps({"seconds": seconds, "tokens": count, "bytes": size, "peak": peak, "base": base}), flush=True)


def measure(variant: str, path: Path, limit: float, cores: list[int]) -> tuple[float, float, int]:
    """Megabytes a second of all processes together, peak MiB of one, tokens of one."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", variant, "--path", str(path), "--megabytes", str(limit)]
    processes = [
        subprocess.Popen(
            [*command, "--core", str(core)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for core in cores
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in processes]
    seconds = max(r["seconds"] for r in results)
    return sum(r["bytes"] for r in results) / 1e6 / seconds, results[0]["peak"] / 1024, results[0]["tokens"]


def encoding_table(path: Path, limit: float, rounds: int) -> list[str]:
    """MB/s and memory of every variant on one core and on two, in turns."""
    available = sorted(os.sched_getaffinity(0))[:2]
    found: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    for _ in range(rounds):
        for variant in VARIANTS:
            for n in range(1, len(available) + 1):
                found.setdefault((variant, n), []).append(measure(variant, path, limit, available[:n]))
                print(variant, n, found[variant, n][-1], flush=True)
    if len({runs[0][2] for runs in found.values()}) != 1:
        raise AssertionError("the variants do not agree on the number of tokens")

    def median(variant: str, n: int, what: int) -> float:
        return statistics.median(run[what] for run in found[variant, n])

    lines = [
        "| | MB/s, one core | MB/s, two cores | ours / it | peak MiB of a process | |",
        "|---|---|---|---|---|---|",
    ]
    for variant, about in VARIANTS.items():
        one = median(variant, 1, 0)
        two = f"{median(variant, 2, 0):.1f}" if len(available) > 1 else "-"
        ratio = median("ours", 1, 0) / one
        lines.append(f"| {variant} | {one:.1f} | {two} | {ratio:.1f} | {median(variant, 1, 1):.0f} | {about} |")
    return lines


def python_loop(lengths: Array, documents: Array, seq_len: int) -> int:
    """Megatron's walk, one document at a time; returns the number of samples."""
    sizes, stops = lengths.tolist(), documents.tolist()
    samples, row, offset, out = 0, 0, 0, []
    total = (sum(sizes) - 1) // seq_len
    while samples <= total:
        left = seq_len + 1
        out.append((row, offset))
        while left and row < len(stops):
            length = sizes[stops[row]] - offset
            left -= length
            if left <= 0:
                offset += left + length - 1
                left = 0
            else:
                row, offset = row + 1, 0
        samples += 1
    return samples


def index_table(documents: int, mean: int, loop_documents: int) -> list[str]:
    """Seconds to have an index: the default order, ours of Megatron's tables, and the walk in Python."""
    rng = np.random.default_rng(0)
    lens = rng.integers(1, 2 * mean, documents, dtype=np.int32)
    total = int(lens.sum(dtype=np.int64))

    def timed(what: Callable[[], object], repeat: int = 3) -> float:
        took = []
        for _ in range(repeat):
            start = time.perf_counter()
            what()
            took.append(time.perf_counter() - start)
        return min(took)

    def default() -> None:
        ends = np.cumsum(lens, dtype=np.int64)
        count = sampler.windows(int(ends[-1]), SEQ_LEN)
        sampler.permute(np.arange(512), count, 0, 0)

    samples = sampler.windows(total, SEQ_LEN)
    tables = timed(lambda: sampler.megatron_index(lens, SEQ_LEN, samples, 1), 3 if documents < 10**7 else 1)
    part = lens[:loop_documents]
    shuffled = np.random.RandomState(1).permutation(len(part))
    loop = timed(lambda: python_loop(part, shuffled, SEQ_LEN), 1) * documents / len(part)
    note = "" if loop_documents >= documents else f", scaled from {loop_documents:,} documents"
    name = f"{total / 1e9:.2g}B tokens, {documents / 1e6:g}M documents"
    return [
        f"| {name} | {timed(default):.3f} | {tables:.3f} | {loop:.1f}{note} |",
    ]


def main() -> int:
    """Measure, print, and write if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text for every process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    for hidden in ("--worker", "--path", "--core"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, Path(options.path), options.megabytes, int(options.core))
        return 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as cache:
        encoding = encoding_table(tokenizer_files.find("gpt2", Path(cache)), options.megabytes, options.rounds)
    index = index_table(1_000_000, 300, 1_000_000)
    index += index_table(50_000_000, 300, 1_000_000)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = "\n".join(
        [
            "```bash",
            f"python scripts/bench_data.py --rounds {options.rounds} --megabytes {options.megabytes:g} --write",
            "```",
            "",
            f"Standard library sources, {options.megabytes:g} MB for each process, GPT-2's vocabulary, medians of "
            f"{options.rounds} rounds in which the variants take",
            "turns; all give the same number of tokens. A process's peak includes its text and its tokenizer. Other",
            f"work kept {load:.1f} of the {os.cpu_count()} cores busy when it began.",
            "",
            *encoding,
            "",
            f"Seconds to have the index of all samples of {SEQ_LEN} tokens, lengths in memory (peak of the whole "
            f"script {peak:,.0f} MiB):",
            "",
            "| set | `order=shuffle`, computed as it goes | `order=megatron`, numpy | the walk in Python |",
            "|---|---|---|---|",
            *index,
        ]
    )
    print(text)
    if options.write:
        replace_section(ROOT / "docs" / "benchmarks.md", "bench_data", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
