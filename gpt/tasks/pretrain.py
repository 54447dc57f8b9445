"""``task=pretrain``: train a GPT in its run directory, or go on with what is in it."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

from gpt.config.derived import world_size
from gpt.config.schema import Config
from gpt.config.task_schemas import Split
from gpt.data import corpus
from gpt.data.corpus import DatasetInfo
from gpt.data.dataset import TokenDataset
from gpt.plan import auto_parallel, devices, summary
from gpt.runs import provenance, source, wandb_run
from gpt.runs import run_dir as runs
from gpt.runs.run_dir import Job
from gpt.tasks.spec import Command, Driver, TaskSpec
from gpt.utils import machine
from gpt.utils.console import Console
from gpt.utils.files import short
from gpt.utils.launch_env import LaunchEnvironment


def check(command: Command) -> list[str]:
    """Return what earlier work in the run directory, or the weights to start from, do not allow."""
    return runs.resume_conflicts(command.run_dir, command.config) + source.start_problems(command.config)


def prepare_data(config: Config, console: Console) -> DatasetInfo:
    """Return the data of a training, tokenised if it was not yet.

    Raises:
        UserError: it does not do for this job; nothing was started.
    """
    data = corpus.prepare(config, console.note)
    if config.checkpoint and (remark := source.same_tokenizer(config, data)):
        console.warn(remark)
    for split in (Split.train, Split.val):
        if config.data.split[list(Split).index(split)] > 0:
            TokenDataset(config, data, split)  # a split too small for a sample is an error before anything is started
    return data


def run(command: Command, driver: Driver) -> float | None:
    """Train, and return the validation loss; a run that is done returns the one that it has."""
    config, run_dir, console = command.config, command.run_dir, driver.console
    data = prepare_data(config, console)
    if config.checkpoint:
        checkpoint = str(Path(config.checkpoint).resolve())  # for ranks elsewhere, and for the record
        config = dataclasses.replace(config, checkpoint=checkpoint)
    with driver.locked(run_dir) as lock:
        decision = runs.resume_decision(run_dir, config, data)
        if decision.aside:
            os.rename(run_dir, decision.aside)
        for message in decision.messages:
            console.note(message)
        if not decision.start:
            result = runs.read_result(run_dir)
            return result.get("val/loss") if result else None
        run_dir.mkdir(parents=True, exist_ok=True)  # for a command that Hydra did not start
        job = Job(config, data, run_dir.resolve(), command.words)
        job.write()
        provenance.note_start(run_dir, job.command, max(runs.checkpoint_steps(run_dir), default=0), world_size(config))
        auto_parallel.show(command.choice, config, console)
        console.header(_header(job, driver.role))
        driver.launch(job, run_dir / "job.json", lock)
    return conclude(job, console)


def _header(job: Job, role: LaunchEnvironment) -> list[tuple[str, str]]:
    config = job.config
    rows = dict(summary.summary(dataclasses.replace(config, device=devices.known_device(config))))
    entropy = f", unigram entropy {job.data.unigram_entropy:.2f} nats" if job.data.unigram_entropy else ""
    ranks = world_size(config)
    threads = config.cluster.threads or max(1, machine.cores() // role.here(ranks))
    device = f"{config.cluster.device.value}, {config.precision.dtype.value}"
    shape = f"{config.model.layers} layers x {config.model.hidden}, {rows['parameters']} parameters"
    started = f", started by {role.starter}" if role.starter else ""
    return [
        ("device", f"{device}, {threads} threads" if config.cluster.device.value == "cpu" else device),
        *([("ranks", f"{rows['ranks']}{started}")] if ranks > 1 else []),
        ("model", f"{config.model.name}: {shape}"),
        ("data", f"{config.data.kind.value}: {job.data.tokens:,} tokens{entropy}"),
        ("batch", rows["batch"]),
        ("horizon", rows["horizon"]),
        ("memory", rows["memory"].split(":")[0]),
        *([("time", rows["time"])] if "time" in rows else []),
        ("first loss", rows["first loss"]),
        ("run", str(short(job.run_dir))),
    ]


def conclude(job: Job, console: Console) -> float | None:
    """Show the result, the loss curve and what to try next; return the validation loss."""
    from gpt.train.loss_curve import loss_curve

    result = runs.read_result(job.run_dir) or {}
    picture = loss_curve(job.run_dir, job.config, job.data.unigram_entropy)
    rows = [(key, f"{value:,.4f}" if isinstance(value, float) else f"{value}") for key, value in result.items()]
    rows.append(("loss curve", str(short(picture))))
    console.table("done", rows)
    command, more = "python -m gpt.main", 2 * job.config.trainer.max_steps
    same = shlex.join(w for w in job.command if not w.startswith(("hydra.run.dir=", "trainer.max_steps=")))
    run = f"hydra.run.dir={shlex.quote(str(short(job.run_dir)))}"
    console.next_commands(
        [
            (f"{command} task=generate {run} prompt='import '", "continue a prompt"),
            (f"{command} task=evaluate {run} evaluate.split=test", "measure on the test split"),
            (f"{same} {run} trainer.max_steps={more}", "train on"),
            (f"{command} task=plan model=1.3b parallel=dp8", "what would a bigger model need?"),
            *wandb_run.commands(job.run_dir / "wandb"),
        ]
    )
    value = result.get("val/loss")
    return float(value) if value is not None else None


TASK = TaskSpec(check, run, conclude=conclude, worker="gpt.tasks.workers.pretrain")
