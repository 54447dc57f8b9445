"""Run a function on several ranks, each a process with the environment that Paddle wants.

    results = run("ranks:where", 2, config)

calls ``where(config)`` of ``tests/ranks.py`` on two ranks; each returns what JSON holds. Ranks are forked from one
process per test session that has imported Paddle and computed nothing: a rank starts in milliseconds, not seconds.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from launchers import checks, rank_env

TESTS = Path(__file__).resolve().parent
LAST_LINES = 25


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
        atexit.register(self._process.kill)

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
    for module in ("ranks", "gpt.tasks.workers.pretrain", "gpt.parallel.tensor_parallel", "gpt.model.pipeline"):
        importlib.import_module(module)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request, answer = json.loads(line), None
        if call := request.get("fork"):
            answer = os.fork()
            if answer == 0:
                _rank(**call)
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
