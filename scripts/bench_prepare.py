"""The whole of task=prepare on a large corpus: MB/s from command to files, and the most memory of a process.

    python scripts/bench_prepare.py --megabytes 1000

The corpus is the standard library's sources as JSON lines, repeated with a number in each document until it has its
size. The table goes into docs/benchmarks.md. Outputs of all worker counts must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.data import tokenizer_files  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402


def corpus(path: Path, size: int) -> int:
    """Write about ``size`` bytes; returns the number of documents."""
    library = Path(os.__file__).parent
    texts = [p.read_text("utf-8", "ignore") for p in sorted(library.glob("*.py"))]
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            for text in texts:
                file.write(json.dumps({"text": f"# {count}\n{text}"}) + "\n")
                count += 1
    return count


def high_water(parent: int) -> dict[int, int]:
    """Peak resident bytes so far of a process and of all below it, by process."""
    found, waiting = {}, [parent]
    while waiting:
        process = waiting.pop()
        try:
            status = Path(f"/proc/{process}/status").read_text()
            waiting += map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
        except OSError:
            continue  # it has ended meanwhile
        line = next((row for row in status.splitlines() if row.startswith("VmHWM")), "VmHWM: 0 kB")
        found[process] = int(line.split()[1]) * 1024
    return found


def measure(source: Path, output: Path, tokenizer: Path, workers: int) -> tuple[float, int, int]:
    """Seconds, and the peak bytes of the driver and of the largest worker."""
    command = [
        sys.executable, "-m", "gpt.main", "task=prepare", f"prepare.input={source}", f"prepare.output={output}",
        f"prepare.tokenizer={tokenizer}", f"prepare.workers={workers}",
    ]  # fmt: skip
    began = time.monotonic()
    peaks: dict[int, int] = {}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        for number, peak in high_water(process.pid).items():
            peaks[number] = max(peak, peaks.get(number, 0))
        time.sleep(0.05)
    seconds = time.monotonic() - began
    if process.returncode:
        assert process.stdout
        sys.exit(process.stdout.read())
    driver = peaks.pop(process.pid)
    return seconds, driver, max(peaks.values())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    arguments = parser.parse_args()
    rows, digests = [], set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = corpus(folder / "corpus.jsonl", arguments.megabytes * 10**6)
        size = (folder / "corpus.jsonl").stat().st_size / 1e6
        tokenizer = tokenizer_files.find("gpt2", folder)
        for workers in range(1, min(len(os.sched_getaffinity(0)), 2) + 1):
            output = folder / str(workers) / "x"
            seconds, driver, worker = measure(folder / "corpus.jsonl", output, tokenizer, workers)
            digests.add(hashlib.sha256(Path(f"{output}_ids.npy").read_bytes()).hexdigest())
            peaks = f"{worker / 2**20:.0f} | {driver / 2**20:.0f}"
            rows.append(f"| {workers} | {size / seconds:.1f} | {seconds:.1f} | {peaks} |")
            print(rows[-1], flush=True)
    if len(digests) != 1:
        sys.exit("the outputs differ")
    lines = [
        f"`python scripts/bench_prepare.py --megabytes {arguments.megabytes}`: the whole of `task=prepare`, "
        f"{size:,.0f} MB of JSON lines, {documents:,} documents,",
        "GPT-2's vocabulary, from the command to the finished files; the same bytes each time.",
        "",
        "| workers | MB/s | seconds | peak MiB of a worker | peak MiB of the driver |",
        "|---|---|---|---|---|",
        *rows,
    ]
    replace_section(ROOT / "docs" / "benchmarks.md", "prepare", "\n".join(lines))


if __name__ == "__main__":
    main()
