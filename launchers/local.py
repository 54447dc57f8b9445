"""Workers on this host: environment, start, watch, first failure, signals, no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gpt.config import Config, Device
from launchers import host

POLL_SECONDS = 0.05
GRACE_SECONDS = 60.0  # from a signal to SIGKILL: time to finish the step and to save
LAST_LINES = 15
# Big blocks stay in the process: otherwise every temporary of tens of MB is mapped, zeroed page by page and
# unmapped again, a fifth of a training step on a CPU.
MALLOC = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"


def environment(config: Config, ranks: int, *, live: bool) -> dict[str, str]:
    """The environment of a worker: ours without what belongs to other jobs, plus what must be set before it starts.

    Args:
        config: of the job.
        ranks: workers on this host, which share its cores.
        live: the terminal shows a progress display, so step lines are not needed.
    """
    foreign = ("PADDLE_", "FLAGS_selected_", "POD_", "TRAINING_ROLE", "HYDRA_FULL_ERROR")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    threads = str(config.cluster.threads or max(1, host.cores() // ranks))
    root = str(Path(__file__).resolve().parent.parent)
    return {
        **kept,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MKL_DYNAMIC": "FALSE",
        **host.mkl_settings(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC),
        "PYTHONUNBUFFERED": "1",
        "GLOG_minloglevel": "1",  # Paddle's C++ side otherwise reports every connection
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
        "GPT_DRIVER_PID": str(os.getpid()),
        "GPT_LIVE": "1" if live else "",
    }


def places(ranks: int, device: Device) -> list[dict[str, str]]:
    """What tells each rank who it is and where the others are, in Paddle's terms."""
    *ports, meeting = host.free_ports(ranks + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    shared = {
        "PADDLE_TRAINERS_NUM": str(ranks),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_MASTER": f"127.0.0.1:{meeting}",
    }
    if device is Device.cpu:
        shared["PADDLE_DISTRI_BACKEND"] = "gloo"
    return [
        {
            **shared,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_CURRENT_ENDPOINT": endpoint,
            "PADDLE_LOCAL_RANK": str(rank),
            "PADDLE_RANK_IN_NODE": str(rank),
            **({} if device is Device.cpu else {"FLAGS_selected_gpus": str(rank)}),
        }
        for rank, endpoint in enumerate(endpoints)
    ]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the exit code of the first rank that failed, or 0; with that rank's last lines.

    ``signal`` is what the driver was sent and passed on, if anything.
    """

    code: int
    rank: int = 0
    last_lines: tuple[str, ...] = ()
    signal: signal.Signals | None = None


class Tail:
    """Reads what a file has grown by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0
        self._partial = b""

    def lines(self, *, final: bool = False) -> list[str]:
        """New whole lines; with ``final`` also an unfinished last one."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                new = file.read()
        except FileNotFoundError:
            return []
        self.position += len(new)
        *whole, self._partial = (self._partial + new).split(b"\n")
        if final and self._partial:
            whole, self._partial = [*whole, self._partial], b""
        return [line.decode("utf-8", errors="replace") for line in whole]


def run_workers(
    arguments: list[str],
    own: list[dict[str, str]],
    log_dir: Path,
    env: dict[str, str],
    *,
    show: Callable[[str], None],
    poll: Callable[[], None],
    hand_over: tuple[int, ...] = (),
) -> Outcome:
    """Start one worker per rank and watch them to the end.

    Args:
        arguments: after ``python``.
        own: environment of each worker besides ``env``; one for each rank.
        log_dir: gets ``worker.R.log``, appended to.
        env: of every worker.
        show: gets the lines of rank 0.
        poll: called every few hundredths of a second.
        hand_over: file descriptors that the workers keep open (the run's lock).
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    tails = [Tail(log_dir / f"worker.{rank}.log") for rank in range(len(own))]
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarded(processes) as received:
        for rank, place in enumerate(own):
            with open(tails[rank].path, "ab") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        env={**env, **place},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=hand_over,
                    )
                )
        try:
            failed = _watch(processes, tails[0], received, show, poll)
        finally:
            _end(processes)
    for line in tails[0].lines(final=True):
        show(line)
    poll()
    if failed is None:
        return Outcome(0)
    text = tails[failed].path.read_text(encoding="utf-8", errors="replace")
    return Outcome(processes[failed].returncode, failed, tuple(text.splitlines()[-LAST_LINES:]), received.number)


def _watch(
    processes: list[subprocess.Popen[bytes]],
    tail: Tail,
    received: _Received,
    show: Callable[[str], None],
    poll: Callable[[], None],
) -> int | None:
    """Until all have ended well, or one has not: that one."""
    while True:
        codes = [process.poll() for process in processes]
        for line in tail.lines():
            show(line)
        poll()
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or all(code == 0 for code in codes):
            return failed
        if received.number and time.monotonic() - received.since > GRACE_SECONDS:
            _kill(processes, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


@dataclass
class _Received:
    """The first signal to the driver."""

    number: signal.Signals | None = None
    since: float = 0.0


@contextlib.contextmanager
def _forwarded(processes: list[subprocess.Popen[bytes]]) -> Iterator[_Received]:
    """Pass SIGTERM and Ctrl-C on to the workers, which save and end; a second one kills."""
    received = _Received()

    def forward(number: int, frame: FrameType | None) -> None:
        _kill(processes, signal.SIGKILL if received.number else signal.Signals(number))
        if not received.number:
            received.number, received.since = signal.Signals(number), time.monotonic()

    former = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _kill(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: first kindly."""
    _kill(processes, signal.SIGTERM)
    deadline = time.monotonic() + 5.0
    for process in processes:
        try:
            process.wait(max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill([process], signal.SIGKILL)
            process.wait()
