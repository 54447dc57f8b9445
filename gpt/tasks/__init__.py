"""What a worker can do, one module each, to be read from top to bottom."""

from __future__ import annotations

from gpt.config.schema import Task
from gpt.runs.run_dir import Job
from gpt.utils.signals import Signals


def run(job: Job, signals: Signals) -> int:
    """Do the job's task on this rank; returns the exit code."""
    if job.config.task is Task.pretrain:
        from gpt.tasks import pretrain

        return pretrain.run(job, signals)
    if job.config.task is Task.evaluate:
        from gpt.tasks import evaluate

        return evaluate.run(job, signals)
    if job.config.task is Task.serve:
        from gpt.tasks import serve

        return serve.run(job, signals)
    if job.config.task is Task.export:
        from gpt.tasks import export

        return export.run(job)
    from gpt.tasks import generate

    return generate.run(job, signals)
