"""The process that the user starts: check, prepare, plan, launch, show, and sum up. No Paddle here."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from gpt.config import cluster_rules, derived, rules
from gpt.config.cluster import ClusterKind
from gpt.config.derived import needs_checkpoint, world_size
from gpt.config.schema import Config, Task
from gpt.config.task_schemas import Split
from gpt.data import corpus, tokenizer_files
from gpt.data.corpus import DatasetInfo
from gpt.data.dataset import TokenDataset
from gpt.data.preprocess import pipeline
from gpt.inference import prompts
from gpt.inference.server import address
from gpt.plan import auto_parallel, devices, summary
from gpt.runs import evaluation, provenance, source, wandb_run
from gpt.runs import run_dir as runs
from gpt.runs.convert import export_weights, import_weights
from gpt.runs.report import report
from gpt.runs.run_dir import Job
from gpt.tasks import plan
from gpt.utils import machine
from gpt.utils.console import Console
from gpt.utils.errors import UserError
from gpt.utils.files import short
from gpt.utils.signals import FAILED
from launchers import checks, rendezvous, slurm
from launchers.job import JobFailed, launch, locked

WITHOUT_RANKS = {Task.prepare: pipeline.check, Task.import_weights: import_weights.check, Task.report: report.check}


def preflight(config: Config, run_dir: Path, data_problems: Callable[[Config], list[str]] = corpus.check) -> None:
    """Everything that can be known to be wrong before anything is created.

    Args:
        config: of the command.
        run_dir: of its run.
        data_problems: what is wrong with the data; a grid looks once at what its cells share.

    Raises:
        UserError: listing every problem.
    """
    away = cluster_rules.is_away(config)
    if config.task is Task.plan or (away and config.cluster.kind is not ClusterKind.slurm):
        return  # what is printed for other hosts is checked there: their files are not ours
    if config.task in WITHOUT_RANKS:
        if problems := WITHOUT_RANKS[config.task](config):
            raise UserError.of(problems)
        return
    job = source.job(config, run_dir) if needs_checkpoint(config.task) else None
    problems = slurm.problems(config, rendezvous.hub().role, os.environ) if away else _here(config)
    if config.task is Task.pretrain:
        problems += data_problems(config) + runs.resume_conflicts(run_dir, config) + source.start_problems(config)
    if job and config.task is Task.generate:
        problems += prompts.check(job.config, source.vocabulary(job))
    if job and config.task is Task.serve:
        problems += address.problems(config.serve) + ([] if source.vocabulary(job) else [prompts.NO_TEXT])
    if job and config.task is Task.evaluate:
        problems += evaluation.problems(job)
    if config.task is Task.export:
        problems += export_weights.check(config)
    if problems:
        raise UserError.of(problems)


def _here(config: Config) -> list[str]:
    """What keeps the ranks from running on this host, or on those that were started with it."""
    role, ranks = rendezvous.hub().role, world_size(config)
    problems = role.problems(ranks, dict(summary.summary(config))["ranks"])
    return problems + checks.problems(config, role.here(ranks))


def run(config: Config, run_dir: Path, overrides: list[str]) -> float | None:
    """Do the task; returns the validation loss for a sweeper to minimise.

    Raises:
        UserError: bad input; nothing was started.
        JobFailed: with the exit code.
    """
    console = Console()
    for line in checks.warnings():
        console.warn(line)
    if config.task is Task.plan:
        plan.show(config, console, overrides)
        return None
    if config.task is Task.prepare:
        _prepare(config, console)
        return None
    if config.task is Task.import_weights:
        _import_weights(config, console)
        return None
    if config.task is Task.report:
        report.run(config, console)
        return None
    config.cluster.device = derived.resolve_device(config)
    if config.task is not Task.pretrain:
        _on_trained_run(config, run_dir, overrides, console)
        return None
    return _pretrain(config, run_dir, overrides, console)


def _prepare(config: Config, console: Console) -> None:
    """Token files from raw text.

    Raises:
        JobFailed: too much of the text is unreadable.
    """
    try:
        with console.measure() as show:
            manifest = pipeline.prepare(config, console.note, show, machine.cores())
    except pipeline.TooManyBadRecords as error:
        raise JobFailed(f"FAILED: {error}", FAILED) from error
    except KeyboardInterrupt:
        console.note("the same command goes on with what is done")
        raise
    prefix = shlex.quote(str(config.prepare.output))
    skipped = ", ".join(f"{count:,} {what}" for what, count in manifest["skipped"].items() if count)
    rows = [(key, f"{manifest[key]:,}") for key in ("documents", "tokens", "bytes", "duplicates")]
    rows += [("bytes per token", f"{manifest['bytes_per_token']:.3f}"), ("skipped", skipped or "nothing")]
    rows.append(("files", f"{config.prepare.output}_ids.npy, _idx.npz, _tokenizer.json, _manifest.json"))
    console.table("prepared", rows)
    vocab = manifest["tokenizer"]["vocab"]
    fit = "" if vocab <= config.model.vocab else f" model.vocab={vocab}"
    console.next_commands([(f"python -m gpt.main data=tokens data.path={prefix}{fit}", "train on it")])


def _import_weights(config: Config, console: Console) -> None:
    console.table("imported", import_weights.run(config, console.warn))
    checkpoint = f"checkpoint={shlex.quote(str(config.import_weights.output))}"
    console.next_commands([(f"python -m gpt.main task=generate {checkpoint}", "continue a prompt")])


def prepared(config: Config, console: Console) -> DatasetInfo:
    """The data of a training, tokenised if it was not yet.

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


def _pretrain(config: Config, run_dir: Path, overrides: list[str], console: Console) -> float | None:
    data = prepared(config, console)
    if config.checkpoint:
        config.checkpoint = str(Path(config.checkpoint).resolve())  # for ranks elsewhere, and for the record
    with locked(run_dir, console) as lock:
        decision = runs.resume_decision(run_dir, config, data)
        if decision.aside:
            os.rename(run_dir, decision.aside)
        for message in decision.messages:
            console.note(message)
        if not decision.start:
            result = runs.read_result(run_dir)
            return result.get("val/loss") if result else None
        run_dir.mkdir(parents=True, exist_ok=True)  # for a command that Hydra did not start
        job = Job(config, data, run_dir.resolve(), _command(overrides))
        job.write()
        provenance.note_start(run_dir, job.command, max(runs.checkpoint_steps(run_dir), default=0), world_size(config))
        auto_parallel.show(config, console)
        console.header(_header(job))
        launch(job, run_dir / "job.json", console, lock)
    return _sum_up(job, console)


def _on_trained_run(config: Config, run_dir: Path, overrides: list[str], console: Console) -> None:
    job = source.job(config, run_dir)
    named = [o.lstrip("+").split("=")[0] for o in overrides]
    if any(key == "data" or key.startswith("data.") for key in named):
        kept = {"seq_len", "vocab"} - {key.removeprefix("data.") for key in named}
        job = _on_other_data(job, config, console, kept)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    if config.task is Task.generate:
        prompts.hand_over(job.config, run_dir / "logs")
    file = run_dir / "logs" / f"{config.task.value}.json"
    dataclasses.replace(job, command=_command(overrides)).write(file)
    before = evaluation.read(run_dir)
    launch(job, file, console, None)
    for name, record in evaluation.read(run_dir).items():
        if config.task is Task.evaluate and record != before.get(name):
            console.table(name, list(evaluation.rows(record)))


def _on_other_data(job: Job, config: Config, console: Console, kept: set[str]) -> Job:
    """The trained job on the data that the command names, but for the keys ``kept``, which go with the model.

    Raises:
        UserError: not for this model.
    """
    for key in kept:
        setattr(config.data, key, getattr(job.config.data, key))
    job.config.data = config.data
    problems = rules.rule_problems(job.config) + corpus.check(job.config)
    problems += evaluation.problems(job) if config.task is Task.evaluate else []
    if problems:
        raise UserError.of(problems)
    data = corpus.prepare(job.config, console.note)
    there = source.vocabulary(job)
    if there and data.tokenizer and not tokenizer_files.same(there, Path(data.tokenizer)):
        raise UserError(
            "this data is of another tokenizer than the model, whose loss on it means nothing: "
            "evaluate.kind=text evaluate.path=... tokenises a text as the model wants it"
        )
    return dataclasses.replace(job, data=data)


def _header(job: Job) -> list[tuple[str, str]]:
    config = job.config
    rows = dict(summary.summary(dataclasses.replace(config, device=devices.known_device(config))))
    entropy = f", unigram entropy {job.data.unigram_entropy:.2f} nats" if job.data.unigram_entropy else ""
    role, ranks = rendezvous.hub().role, world_size(config)
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


def _sum_up(job: Job, console: Console) -> float | None:
    from gpt.train.loss_curve import loss_curve

    result = runs.read_result(job.run_dir) or {}
    picture = loss_curve(job.run_dir, job.config, job.data.unigram_entropy)
    rows = [(key, f"{value:,.4f}" if isinstance(value, float) else f"{value}") for key, value in result.items()]
    rows.append(("loss curve", str(short(picture))))
    console.table("done", rows)
    command, more = "python -m gpt.main", 2 * job.config.trainer.max_steps
    run = f"hydra.run.dir={shlex.quote(str(short(job.run_dir)))}"
    console.next_commands(
        [
            (f"{command} task=generate {run} prompt='import '", "continue a prompt"),
            (f"{command} task=evaluate {run} evaluate.split=test", "measure on the test split"),
            (f"{_again(job.command)} {run} trainer.max_steps={more}", "train on"),
            (f"{command} task=plan model=1.3b parallel=dp8", "what would a bigger model need?"),
            *wandb_run.commands(job.run_dir / "wandb"),
        ]
    )
    value = result.get("val/loss")
    return float(value) if value is not None else None


def _again(command: list[str]) -> str:
    """The command without the keys that are given anew."""
    return shlex.join(w for w in command if not w.startswith(("hydra.run.dir=", "trainer.max_steps=")))


def _command(overrides: list[str]) -> list[str]:
    return ["python", "-m", "gpt.main", *overrides]
