"""Start a job of eight ranks again and again, and time what stands between the command and its first step.

    python scripts/starts.py                # a hundred starts; stops at the first that fails
    python scripts/starts.py --phases 5     # where the seconds of a start on two ranks go, and how many are Paddle's

Both write their part of docs/launch.md. Every start is the real command: the driver, a worker per rank, all groups
of dp 2 x mp 2 x pp 2, one training step on eight ranks, and the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.utils import heartbeat, machine  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402
from launchers import rank_env  # noqa: E402

DOCUMENT = ROOT / "docs" / "launch.md"
JOB = [
    "model=tiny", "model.hidden=64", "model.layers=2", "model.positions=64", "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2", "trainer.max_steps=1", "trainer.save_every=0", "trainer.eval_every=0",
    "trainer.eval_batches=1", "generate.max_new_tokens=1", "cluster.device=cpu", "cluster.threads=1",
]  # fmt: skip
# What Paddle needs of itself before two ranks can work together: its import, its start, a first sum.
PADDLES_OWN = """
import paddle, paddle.distributed as dist
dist.init_parallel_env()
dist.all_reduce(paddle.ones([1]))
print("met", flush=True)
import os; os._exit(0)
"""
PHASES = {
    "import Paddle": "the command composes, checks, prepares data; the worker's Python starts",
    "connect": "Paddle and our modules are imported",
    "build": "the ranks meet, fleet makes its groups",
    "step 1": "model, optimizer, samples",
    "shown": "the first step, its line on the terminal",
}


def command(run_dir: Path, *more: str) -> list[str]:
    """The training command."""
    return [sys.executable, "-m", "gpt.main", *JOB, *more, f"hydra.run.dir={run_dir}"]


def start(run_dir: Path, *more: str) -> float:
    """One job from beginning to end; returns its seconds, or leaves with its lines if it fails."""
    began = time.monotonic()
    done = subprocess.run(
        command(run_dir, *more), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    seconds = time.monotonic() - began
    result = run_dir / "result.json"
    if done.returncode or not result.exists() or json.loads(result.read_text())["status"] != "done":
        print(f"{done.stdout}\nexit code {done.returncode} after {seconds:.1f} s; its logs: {run_dir / 'logs'}")
        raise SystemExit(1)
    return seconds


def consecutive(count: int, preset: str) -> list[str]:
    """So many starts of the job; returns the lines for the document."""
    seconds: list[float] = []
    folder = Path(tempfile.mkdtemp(prefix="starts-"))
    start(folder / "data")  # the text is tokenised once, whatever the machine had before
    for number in range(1, count + 1):
        seconds.append(start(folder / str(number), f"parallel={preset}"))
        print(f"start {number:>3} of {count}: {seconds[-1]:5.1f} s", flush=True)
    middle = statistics.median(seconds)
    words = shlex.join(["python", "scripts/starts.py", "--starts", str(count), "--preset", preset])
    return [
        f"Made by `{words}` on {machine.cores()} cores:",
        "",
        "| job | starts | succeeded | seconds: min | median | max |",
        "|---|---|---|---|---|---|",
        f"| {preset} | {count} | {len(seconds)} | {min(seconds):.1f} | {middle:.1f} | {max(seconds):.1f} |",
    ]


def paddles_own(folder: Path) -> float:
    """Seconds until two plain processes have imported Paddle, started it and made a sum."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOG_minloglevel": "2"}
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PADDLES_OWN],
            cwd=folder,
            env={**env, **place.variables()},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for place in rank_env.here(2, gpu=False)
    ]
    for process in processes:
        assert process.stdout
        if "met" not in process.stdout.read():
            raise SystemExit("two plain processes of Paddle did not meet")
    seconds = time.monotonic() - began
    for process in processes:
        process.wait()
    return seconds


def phases(run_dir: Path, preset: str) -> dict[str, float]:
    """When each phase of a start began, in seconds after the command: the last rank's, by its heartbeat."""
    seen: dict[str, float] = {}
    over = threading.Event()
    began = time.time()

    def look() -> None:
        while not over.is_set():
            beat = heartbeat.read(run_dir / "logs", 1)
            if beat:
                seen.setdefault(beat.phase if beat.step == 0 else f"step {beat.step}", beat.time - began)
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    process = subprocess.Popen(
        command(run_dir, f"parallel={preset}"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 1/"):
            seen["shown"] = time.time() - began
    code = process.wait()
    over.set()
    watcher.join()
    if code or set(seen) & set(PHASES) != set(PHASES):
        print("".join(lines))
        raise SystemExit(f"exit code {code}; phases seen: {', '.join(seen)}")
    return seen


def breakdown(count: int, preset: str) -> list[str]:
    """Medians over so many starts; returns the lines for the document."""
    folder = Path(tempfile.mkdtemp(prefix="starts-"))
    start(folder / "data")
    times = []
    own = []
    for number in range(count):
        own.append(paddles_own(folder))
        times.append(phases(folder / str(number), preset))
    rows = []
    former = [0.0] * count
    for name, what in PHASES.items():
        at = [each[name] for each in times]
        took = statistics.median(b - a for a, b in zip(former, at, strict=True))
        rows.append(f"| {what} | {took:.2f} | {statistics.median(at):.2f} |")
        former = at
    whole, paddle = statistics.median(each["shown"] for each in times), statistics.median(own)
    return [
        f"Made by `python scripts/starts.py --phases {count}`: medians of {count} starts of {preset} on "
        f"{machine.cores()} cores.",
        "",
        "| until | seconds | seconds after the command |",
        "|---|---|---|",
        *rows,
        "",
        f"Two plain processes that import Paddle, start it and make one sum take {paddle:.2f} s; "
        f"from the command to the line of its first step it is {whole:.2f} s, {whole - paddle:.2f} s more.",
    ]


def main() -> None:
    """Start, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--preset", help="of parallel: dp2_mp2_pp2, with --phases dp2")
    parser.add_argument("--phases", type=int, default=0, metavar="N", help="time the phases of N starts instead")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    if arguments.phases:
        name, lines = "phases", breakdown(arguments.phases, arguments.preset or "dp2")
    else:
        name, lines = "starts", consecutive(arguments.starts, arguments.preset or "dp2_mp2_pp2")
    print("\n".join(lines))
    replace_section(arguments.output, name, "\n".join(lines))


if __name__ == "__main__":
    main()
