"""One rank: ``python -m gpt.worker RUN_DIR JOB_FILE``. Reads a resolved job; Hydra is not here.

Even a single rank is a worker process: thread counts and the allocator must be in the environment before it starts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from gpt.utils.peers import JobMonitor
    from gpt.utils.signals import Signals

ORPHAN_SECONDS = 60.0  # for a worker without its driver to save and end
_monitors: list[JobMonitor] = []  # of this process, if an external launcher has started several ranks


def start_monitoring() -> None:
    """Write heartbeats and end with the process that started this one, even in a collective that never returns.

    SIGTERM at the driver's death becomes a flag that the training loop reads; a rank that never leaves a collective
    never reads it, so a thread sees to the end as well.
    """
    from gpt.utils import heartbeat
    from gpt.utils import signals as utils_signals
    from gpt.utils.launch_env import WorkerEnv

    settings, rank = WorkerEnv.from_env(os.environ), int(os.environ.get("PADDLE_TRAINER_ID", "0"))
    driver = settings.parent or os.getppid()
    utils_signals.die_with_parent(driver)
    faulthandler.register(signal.SIGUSR1)  # the stack goes to our log, whatever we are waiting for
    threading.Thread(target=_end_without, args=(driver,), daemon=True).start()
    heartbeat.begin(Path(sys.argv[1]) / "logs", rank)
    heartbeat.beat(0, "start")
    if settings.peers:
        from gpt.utils.peers import JobMonitor

        _monitors.append(JobMonitor(Path(sys.argv[1]), rank, settings))


def _end_without(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(1.0)
    time.sleep(ORPHAN_SECONDS)
    os._exit(128 + signal.SIGTERM)


def import_paddle() -> None:
    """Import it without its remark that more than one OpenMP thread harms data parallelism (it does not here)."""
    stderr = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(stderr):
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle
    paddle.disable_signal_handler()  # its handler for SIGTERM prints a stack and dies; ours saves
    remarks = [line for line in stderr.getvalue().splitlines() if "OMP_NUM_THREADS" not in line]
    sys.stderr.write("".join(f"{line}\n" for line in remarks))


def main() -> None:
    """Run the job's task; the exit code is the task's."""
    start_monitoring()
    from gpt.utils.signals import Signals

    signals = Signals()  # from here on a signal is remembered, also during the imports
    run_to_exit(lambda: _run_job(signals))


def _run_job(signals: Signals) -> int:
    from gpt.utils import heartbeat
    from gpt.utils.launch_env import WorkerEnv

    heartbeat.beat(0, "import Paddle")
    import_paddle()
    signals.listen()
    from gpt import tasks
    from gpt.runs.run_dir import Job

    job = Job.read(Path(sys.argv[1]), Path(sys.argv[2]))
    code = tasks.run(job, signals)
    if code == 0 and WorkerEnv.from_env(os.environ).concludes:
        from gpt.utils.console import Console

        tasks.spec(job.config.task).conclude(job, Console())
    return code


def run_to_exit(task: Callable[[], int]) -> NoReturn:
    """Run a task and end the process with its exit code, or that of its error, which is printed."""
    from gpt.utils.errors import UserError
    from gpt.utils.signals import BAD_INPUT, FAILED, GUARD, GuardError

    try:
        code = task()
    except UserError as error:
        print(f"ERROR: {error}", flush=True)
        code = BAD_INPUT
    except GuardError as error:
        print(f"STOPPED: {error}", flush=True)
        code = GUARD
    except OSError as error:  # a full or lost disk; checkpoints are as they were
        print(f"FAILED: {error}; the same command goes on from the last checkpoint", flush=True)
        code = FAILED
    except SystemExit as end:  # of a second signal
        code = end.code if isinstance(end.code, int) else FAILED
    except Exception:
        traceback.print_exc(file=sys.stdout)
        code = FAILED
    exit_process(code)


def exit_process(code: int) -> NoReturn:
    """End this process; one of several ranks ends without taking its communication apart.

    The servers of Paddle's stores sometimes abort when they are destroyed, after all the work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _monitors:
        code = _monitors[0].finish(code)
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
