"""What ``checkpoint=`` names, and the job of a task that reads it. No Paddle here."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from gpt.config import rules
from gpt.config.derived import replace_in, replicas
from gpt.config.schema import TASK_SECTIONS, Config, Parallel
from gpt.data import tokenizer_files
from gpt.data.corpus import DatasetInfo
from gpt.runs import run_dir as runs
from gpt.runs.run_dir import Job
from gpt.utils.errors import UserError

# The command says these, whatever the run was trained with.
COMMAND_SECTIONS = ("task", "seed", *TASK_SECTIONS, "logger", "cluster", "precision")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a single checkpoint."""
    return (path / "state.json").is_file()


def results_dir(named: Path) -> Path:
    """Where a task on ``checkpoint=named`` keeps its logs and results: the run, or if it is not ours a folder of ours.

    Example:
        >>> results_dir(Path("somewhere/gpt2"))
        PosixPath('outputs/from_gpt2')
    """
    run = named
    if is_checkpoint(named) and named.resolve().parent.name == "checkpoints":
        run = named.resolve().parent.parent
    if (run / "job.json").is_file() and os.access(run, os.W_OK):
        return run
    return Path("outputs") / f"from_{run.resolve().name}"


def job(config: Config, run_dir: Path) -> Job:
    """Return the trained job with the sections of this command.

    Args:
        config: of the command.
        run_dir: where logs go; also the run, unless ``config.checkpoint`` names another.

    Raises:
        UserError: there is nothing trained, or it cannot be shared out as asked.
    """
    source = Path(config.checkpoint) if config.checkpoint else run_dir
    stored = _stored(source, run_dir, config)
    micro = stored.config.trainer.micro_batch_size or 1
    values = {name: getattr(config, name) for name in COMMAND_SECTIONS} | {
        "checkpoint": str(source.resolve()),
        "parallel": _for_inference(config.parallel),
        "trainer.micro_batch_size": micro,
        "trainer.global_batch_size": micro * replicas(config) * config.parallel.pp_degree,
    }
    merged = replace_in(stored.config, values)
    if problems := rules.rule_problems(merged):
        raise UserError.of(problems)
    return dataclasses.replace(stored, config=merged)


def _stored(source: Path, run_dir: Path, now: Config) -> Job:
    if is_checkpoint(source):
        try:
            state = json.loads((source / "state.json").read_text(encoding="utf-8"))
            return Job(runs.stored_config(state["config"], now), DatasetInfo.from_plain(state["data"]), run_dir, [])
        except Exception as error:
            raise UserError(f"{source}: not a checkpoint of this version ({type(error).__name__}: {error})") from error
    if now.checkpoint and not (source / "job.json").is_file():
        reason = "no such folder" if not source.exists() else "neither a run (job.json) nor a checkpoint (state.json)"
        runs_here = sorted(path.parent.as_posix() for path in Path("outputs").glob("*/job.json"))
        raise UserError(
            f"checkpoint={source}: {reason}" + (f"; runs here: {', '.join(runs_here)}" if runs_here else "")
        )
    stored = Job.read(source, now=now)
    if not runs.checkpoint_steps(source):
        raise UserError(f"{source}: no checkpoint yet; train first (the same command without task=)")
    return Job(stored.config, stored.data, run_dir, stored.command)


def config_of(config: Config) -> Config | None:
    """What ``config.checkpoint`` was trained with; None if that cannot be read, which ``job`` says."""
    try:
        return _stored(Path(str(config.checkpoint)), Path(str(config.checkpoint)), config).config
    except UserError:
        return None


def start_problems(config: Config) -> list[str]:
    """What keeps a new run from starting with the weights that ``checkpoint=`` names."""
    if config.checkpoint is None:
        return []
    source = Path(config.checkpoint)
    try:
        stored = _stored(source, source, config).config.model
    except UserError as error:
        return [str(error)]
    pairs = {key: (getattr(stored, key), getattr(config.model, key)) for key in (*runs.SHAPE_KEYS, "layer_norm_eps")}
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not differing:
        return []
    differences = ", ".join(f"model.{key} is {was} there and {now} here" for key, (was, now) in differing.items())
    remedy = " ".join(f"model.{key}={was}" for key, (was, _) in differing.items())
    return [f"checkpoint={source}: weights of another model: {differences}: add {remedy}"]


def same_tokenizer(config: Config, data: DatasetInfo) -> str | None:
    """Compare the data's tokenizer with that of the weights to start from; a remark if it cannot be known.

    Raises:
        UserError: they number tokens differently.
    """
    tokenizer = _vocabulary(Path(str(config.checkpoint)))
    if tokenizer is None or data.tokenizer is None:
        which = "the data" if tokenizer else "the checkpoint"
        return f"{which} has no tokenizer: whether both number tokens in the same way is not known"
    if not tokenizer_files.same(tokenizer, Path(data.tokenizer)):
        raise UserError(
            f"the data is in tokens of {data.tokenizer}, the weights of checkpoint={config.checkpoint} are of another "
            f"tokenizer: prepare the text with it (task=prepare prepare.tokenizer={tokenizer}) and train on that"
        )
    return None


def vocabulary(job: Job) -> Path | None:
    """The tokenizer of the checkpoint that will be read, or of the newest of a run; a worker looks closer."""
    return _vocabulary(Path(str(job.config.checkpoint)))


def _vocabulary(source: Path) -> Path | None:
    if not is_checkpoint(source):
        source = source / "checkpoints" / f"step_{runs.checkpoint_steps(source)[-1]:08d}"
    return next(iter(source.glob("tokenizer.*")), None)


def _for_inference(parallel: Parallel) -> Parallel:
    """The degrees as far as they matter without gradients: sharding ranks are replicas with whole weights."""
    return Parallel(parallel.dp_degree, parallel.sharding_degree, 1, parallel.mp_degree, parallel.pp_degree, 1, False)
