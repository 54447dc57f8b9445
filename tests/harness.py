"""Run a function on several ranks, each a process with the environment that Paddle wants.

    results = run("ranks:where", 2, config)

calls ``where(config)`` of ``tests/ranks.py`` on two ranks; each returns what JSON holds. Ranks are forked from one
process per test session that has imported Paddle and computed nothing, so a rank starts in milliseconds, not seconds.

    command(["task=plan"], folder, {})

is ``python -m gpt.main task=plan`` forked from the same process, and so are its workers and the cells of a grid.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launchers import checks, rank_env

TESTS = Path(__file__).resolve().parent
LAST_LINES = 25
# What every command and every rank imports.
IMPORTED = (
    "ranks",
    *(f"gpt.tasks.workers.{task}" for task in ("pretrain", "generate", "evaluate")),
    *("gpt.parallel.tensor_parallel", "gpt.model.pipeline", "gpt.cli", "hydra", "matplotlib.pyplot"),
    *("launchers.driver", "launchers.remote", "launchers.sweep.launch"),
)
FORKED = ("gpt.worker", "launchers.sweep.run_cell")  # what the command starts as processes of their own


class RankFailedError(Exception):
    """A rank did not end well; the message has its last lines."""


def environment() -> dict[str, str]:
    """Of every rank: one thread each, and nothing of a job that these tests may themselves be part of."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "FLAGS_"))}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOG_minloglevel": "1"}
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**kept, **one_thread, **checks.mkl_settings(), "PYTHONPATH": path}


class ForkServer:
    """A process that has imported Paddle and forks a rank per request."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.communicate)  # the end of its requests is its end

    def ask(self, request: dict[str, Any]) -> Any:
        """Send one request and return its answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, target: str, arguments: Any, env: dict[str, str], result: Path, log: Path) -> int:
        """Fork a rank; return its process id."""
        call = {"target": target, "arguments": arguments, "env": env, "result": str(result), "log": str(log)}
        return int(self.ask({"fork": call}))

    def codes(self, ranks: list[int]) -> list[int | None]:
        """Exit codes of ranks, negative for signals, None while a rank runs."""
        codes: list[int | None] = self.ask({"poll": ranks})
        return codes

    def end(self, ranks: list[int]) -> None:
        """Kill ranks that still run, and wait for them."""
        self.ask({"kill": ranks})


@cache
def _server() -> ForkServer:
    return ForkServer()


def run(target: str, world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Call ``module:function`` with JSON ``arguments`` on ``world_size`` ranks.

    Returns:
        What each rank returned.

    Raises:
        RankFailedError: a rank failed, or the time is over; no process is left.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = [folder / f"{rank}.log" for rank in range(world_size)]
        ranks = [
            server.start(target, arguments, place.variables(), folder / f"{rank}.json", logs[rank])
            for rank, place in enumerate(rank_env.here(world_size, gpu=False))
        ]
        try:
            _watch(server, ranks, logs, time.monotonic() + timeout)
        finally:
            server.end(ranks)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


class Command:
    """``python -m gpt.main`` in a folder, in the background; like ``subprocess.Popen``."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str], out: Path, err: Path) -> None:
        call = {"arguments": arguments, "cwd": str(folder), "env": env, "out": str(out), "err": str(err)}
        self._server = _server()
        self.pid = int(self._server.ask({"command": call}))

    def wait(self, timeout: float) -> int:
        """Return the exit code; kill what takes longer."""
        deadline = time.monotonic() + timeout
        while (code := self._server.codes([self.pid])[0]) is None:
            if time.monotonic() > deadline:
                self._server.end([self.pid])
                raise subprocess.TimeoutExpired("gpt.main", timeout)
            time.sleep(0.02)
        return code


def command(arguments: list[str], folder: Path, env: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """Run ``python -m gpt.main`` in a folder; return its exit code, standard output and standard error."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        code = Command(arguments, folder, env, out, err).wait(timeout)
        return code, out.read_text(), err.read_text()


def _watch(server: ForkServer, ranks: list[int], logs: list[Path], deadline: float) -> None:
    """Until all ended with 0."""
    while True:
        codes = server.codes(ranks)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None and time.monotonic() > deadline:
            failed = codes.index(None)
        if failed is not None:
            lines = logs[failed].read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise RankFailedError("\n".join([f"rank {failed}: exit code {codes[failed]} (None: time over)", *lines]))
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def serve() -> None:
    """Be the fork server: a JSON request per line of standard input, an answer per line of standard output."""
    from gpt.worker import import_paddle

    import_paddle()
    for module in IMPORTED:
        importlib.import_module(module)
    from launchers import local
    from launchers.sweep import pool

    local.subprocess = pool.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _popen})  # type: ignore
    for module in FORKED:
        sys.modules.pop(module, None)  # each is the main module of its process
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request, answer = json.loads(line), None
        if call := request.get("fork"):
            answer = os.fork()
            if answer == 0:
                _rank(**call)
        elif call := request.get("command"):
            answer = os.fork()
            if answer == 0:
                os.chdir(call["cwd"])
                files = [os.open(call[name], os.O_WRONLY | os.O_CREAT) for name in ("out", "err")]
                _become("gpt.main", call["arguments"], call["env"], *files, ())
        elif ranks := request.get("poll"):
            ended |= {pid: code for pid in ranks if pid not in ended and (code := _code(pid, os.WNOHANG)) is not None}
            answer = [ended.get(pid) for pid in ranks]
        for pid in request.get("kill", []):
            if pid not in ended:
                os.kill(pid, signal.SIGKILL)
                _code(pid, 0)
            ended.pop(pid, None)
        print(json.dumps(answer), flush=True)


def _code(pid: int, options: int) -> int | None:
    done, status = os.waitpid(pid, options)
    return os.waitstatus_to_exitcode(status) if done else None


class Forked:
    """What the command needs of ``subprocess.Popen``."""

    def __init__(self, command: list[str], options: dict[str, Any]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if options["start_new_session"]:
                os.setsid()
            out, err = options["stdout"], options["stderr"]
            out = out.fileno() if out else 1
            err = out if err == subprocess.STDOUT else err.fileno()
            _become(command[2], command[3:], options["env"], out, err, options["pass_fds"])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _code(self.pid, os.WNOHANG)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            time.sleep(0.01)
        return code


def _popen(command: list[str], **options: Any) -> Any:
    """Start a process: one of ours by forking this one."""
    if command[:2] == [sys.executable, "-m"] and command[2] in FORKED:
        return Forked(command, options)
    return subprocess.Popen(command, **options)


def _become(module: str, arguments: list[str], env: dict[str, str], out: int, err: int, keep: tuple[int, ...]) -> None:
    """In a forked process: be ``python -m module``, with files, environment and signals as if started afresh; end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    sys.argv[1:] = arguments
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank(target: str, arguments: Any, env: dict[str, str], result: str, log: str) -> None:
    """In the forked rank: call the function, write its result, and end."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    try:
        module, function = target.split(":")
        value = getattr(importlib.import_module(module), function)(*arguments)
        Path(result).write_text(json.dumps(value))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
