"""Run workers on this host: environment, start, watch, first failure, signals, no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from gpt import tasks
from gpt.config.schema import Config
from gpt.utils import machine
from gpt.utils.launch_env import WorkerEnv
from gpt.utils.outcome import END_SECONDS, GRACE_SECONDS, Outcome, RankHandle, last_lines, root_cause
from launchers import checks
from launchers.rank_env import RankEnv

DEFAULTS = WorkerEnv()
POLL_SECONDS = 0.05
TRACE_SECONDS = 0.5  # for a stuck rank to write where it is
# Big blocks stay in the process: otherwise every temporary of tens of MB is mapped, zeroed page by page and
# unmapped again, a fifth of a training step on a CPU.
MALLOC = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"


def environment(config: Config, ranks: int, own: WorkerEnv = DEFAULTS) -> dict[str, str]:
    """Return the environment of a worker: without other jobs' variables, with what must be set before it starts.

    Args:
        config: of the job.
        ranks: workers on this host, which share its cores.
        own: settings of the worker.
    """
    foreign = ("PADDLE_", "FLAGS_selected_", "POD_", "TRAINING_ROLE", "HYDRA_FULL_ERROR")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    threads = str(config.cluster.threads or max(1, machine.cores() // ranks))
    root = str(Path(__file__).resolve().parent.parent)
    return {
        **kept,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MKL_DYNAMIC": "FALSE",
        **checks.mkl_settings(),
        **tasks.spec(config.task).environment,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC),
        "GLOG_minloglevel": "2",  # no news of the sockets of Paddle
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
        **own.to_env(),
    }


class Tail:
    """Reader of the lines that are appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0
        self._partial = b""

    def lines(self, *, final: bool = False) -> list[str]:
        """Return new whole lines; with ``final`` also an unfinished last one."""
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


class Worker:
    """A rank on this host, in a session of its own so that all its processes can be reached at once.

    With ``terminal`` it has the driver's standard input and output, and stays in the driver's session.
    """

    def __init__(
        self,
        command: list[str],
        place: RankEnv,
        log: Path,
        env: dict[str, str],
        hand_over: tuple[int, ...],
        *,
        terminal: bool,
    ) -> None:
        self.rank = place.rank
        self.ended: float | None = None
        self.log, self._terminal = log, terminal
        self._begin = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command,
                env={**env, **place.variables()},
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=None if terminal else file,
                stderr=file,
                start_new_session=not terminal,  # Ctrl-Z stops who reads from the terminal together with the driver
                pass_fds=hand_over,
            )

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        code = self._process.poll()
        if code is not None and self.ended is None:
            self.ended = time.monotonic()
        return code

    @property
    def state(self) -> str:
        """Linux's process state: T stopped, D waiting for a disk, R, S."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return ""

    def last_lines(self) -> tuple[str, ...]:
        """Return the end of its log of this start."""
        return last_lines(self.log, self._begin)

    def last_written(self) -> float:
        """Return the time of its last line."""
        return self.log.stat().st_mtime

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to it and to its child processes."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                (os.kill if self._terminal else os.killpg)(self._process.pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` and return whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.code is not None


def run_workers(
    arguments: list[str],
    places: Callable[[], list[RankEnv]],
    log_dir: Path,
    env: dict[str, str],
    *,
    show: Callable[[str], None],
    poll: Callable[[], Outcome | None],
    others: Sequence[RankHandle] = (),
    hand_over: tuple[int, ...] = (),
    terminal: bool = False,
    retry: bool = True,
) -> Outcome:
    """Start one worker per place and watch them to the end.

    The first failing rank ends the job. If that was because another program took a port in the moment between choosing
    it and using it, the job is started once more on other ports.

    Args:
        arguments: after ``python``.
        places: of the ranks to start here; called again for a second start.
        log_dir: gets ``worker.R.log``, appended to.
        env: of every worker, to which its place is added.
        show: gets the lines of the first of them.
        poll: called every few hundredths of a second; an outcome ends the job.
        others: ranks of the job that run elsewhere.
        hand_over: file descriptors that the workers keep open (the run's lock).
        terminal: whether the first of them inherits standard input and output.
        retry: whether ``places`` can choose other ports.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    outcome = _attempt(arguments, places(), log_dir, env, show, poll, others, hand_over, terminal)
    if outcome.port_taken and not outcome.signal and retry:
        show("a port of this job was taken by another program meanwhile; starting once more on other ports")
        outcome = _attempt(arguments, places(), log_dir, env, show, poll, others, hand_over, terminal)
    return outcome


def _attempt(
    arguments: list[str],
    places: list[RankEnv],
    log_dir: Path,
    env: dict[str, str],
    show: Callable[[str], None],
    poll: Callable[[], Outcome | None],
    others: Sequence[RankHandle],
    hand_over: tuple[int, ...],
    terminal: bool,
) -> Outcome:
    tail = Tail(log_dir / f"worker.{places[0].rank}.log")
    workers: list[Worker] = []
    with _forwarded(workers) as received:
        try:
            for place in places:
                log = log_dir / f"worker.{place.rank}.log"
                inherits = terminal and not workers
                workers.append(Worker([sys.executable, *arguments], place, log, env, hand_over, terminal=inherits))
                if received.number:  # it came while this one was being started
                    workers[-1].stop(received.number)
            outcome = _watch(workers, others, tail, received, show, poll)
        finally:
            _end([*workers, *others])
    for line in tail.lines(final=True):
        show(line)
    return outcome


def _watch(
    workers: list[Worker],
    others: Sequence[RankHandle],
    tail: Tail,
    received: _Received,
    show: Callable[[str], None],
    poll: Callable[[], Outcome | None],
) -> Outcome:
    """Watch until all have ended with 0, one is known to have failed, or ``poll`` returns an outcome."""
    everyone: list[RankHandle] = [*workers, *others]
    while True:
        codes = [worker.code for worker in everyone]
        for line in tail.lines():
            show(line)
        verdict = poll()
        failed = root_cause(everyone, time.monotonic(), received.number)
        if failed is not None:
            return Outcome.of(failed, received.number)
        if all(code == 0 for code in codes):
            return Outcome(0)
        if verdict is not None:
            halted = _stopped_ranks(workers)
            _dump_stacks(workers)
            return replace(verdict, reason=verdict.reason + halted)
        if received.number and time.monotonic() - received.since > GRACE_SECONDS:
            _stop(workers, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


@dataclass
class _Received:
    """First signal that the driver received."""

    number: signal.Signals | None = None
    since: float = 0.0


@contextlib.contextmanager
def _forwarded(workers: list[Worker]) -> Iterator[_Received]:
    """Pass SIGTERM and Ctrl-C on to the workers, which save and end; a second one kills."""
    received = _Received()

    def forward(number: int, frame: FrameType | None) -> None:
        _stop(workers, signal.SIGKILL if received.number else signal.Signals(number))
        if not received.number:
            received.number, received.since = signal.Signals(number), time.monotonic()

    former = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _stop(workers: Sequence[RankHandle], number: signal.Signals) -> None:
    for worker in workers:
        worker.stop(number)


def _stopped_ranks(workers: Sequence[Worker]) -> str:
    """Return a sentence on each rank that is halted and cannot write its stack, perhaps after all sent a heartbeat."""
    states = {"T": "stopped by a signal (SIGSTOP)", "t": "stopped by a debugger", "D": "waiting for a disk"}
    return "".join(f". Rank {w.rank} is {states[w.state]}" for w in workers if w.state in states)


def _dump_stacks(workers: Sequence[Worker]) -> None:
    """Make the ranks dump their stacks: ``gpt.worker`` does so on SIGUSR1, whatever it waits for."""
    _stop(workers, signal.SIGUSR1)
    time.sleep(TRACE_SECONDS)


def _end(workers: Sequence[RankHandle]) -> None:
    """End the workers that still run: SIGTERM, then SIGKILL."""
    running = [worker for worker in workers if worker.code is None]
    _stop(running, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    for worker in running:
        if not worker.wait(max(0.05, deadline - time.monotonic())):
            worker.stop(signal.SIGKILL)
            worker.wait(END_SECONDS)
