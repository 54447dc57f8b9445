"""The typed schema: every key, its type and its meaning. Values live in ``conf/``.

Neither Hydra nor Paddle is imported here, so a worker can read a job without the one
and a laptop can plan a 175B run without the other. The rules between fields: ``gpt.rules``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf

from gpt.config_cluster import Cluster
from gpt.config_cluster import Device as Device  # noqa: PLC0414  # so that it can be had from here as well
from gpt.config_evaluate import Evaluate
from gpt.config_grid import Grid, Optuna, Report
from gpt.config_parallel import EngineKind as EngineKind  # noqa: PLC0414  # these two as well
from gpt.config_parallel import Parallel as Parallel  # noqa: PLC0414
from gpt.config_plan import DeviceSpec, Plan
from gpt.config_prepare import Prepare
from gpt.config_text import Generate, Serve
from gpt.config_weights import Export, ImportWeights


class UserError(Exception):
    """Bad input: the message is for the user, holds the numbers and the remedy, and needs no traceback.

    Example:
        >>> str(UserError.of(["a is 3", "b is 4"]))
        '2 problems, nothing was started:\\n  - a is 3\\n  - b is 4'
    """

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or [message]

    @classmethod
    def of(cls, problems: list[str]) -> UserError:
        """Join all problems of one command into one error."""
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls(f"{head}, nothing was started:\n" + "\n".join(f"  - {p}" for p in problems), problems)


class Task(Enum):
    """What the command does."""

    pretrain = "pretrain"
    evaluate = "evaluate"
    generate = "generate"
    serve = "serve"
    plan = "plan"
    prepare = "prepare"
    import_weights = "import_weights"
    export = "export"
    report = "report"


class Recompute(Enum):
    """What is computed again in the backward pass instead of being kept."""

    none = "none"
    full = "full"  # the whole block
    full_attn = "full_attn"  # the attention module with its projections
    core_attn = "core_attn"  # softmax(q k) v only


class DType(Enum):
    """Element type of weights and activations; below fp32, master weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DataKind(Enum):
    """Where tokens come from."""

    stdlib = "stdlib"
    text = "text"
    tokens = "tokens"
    blend = "blend"


class Order(Enum):
    """How samples are drawn from a token set."""

    shuffle = "shuffle"
    megatron = "megatron"


class ScheduleName(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"


class Resume(Enum):
    """What to do about earlier work in the run directory."""

    auto = "auto"
    never = "never"
    must = "must"


class WandbMode(Enum):
    """How W&B is reached."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class Model:
    """Shape of the GPT. ``vocab`` is what the loss sees; the table is padded to 128 x mp_degree rows."""

    name: str = MISSING
    vocab: int = MISSING
    hidden: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    ffn: int = MISSING
    positions: int = MISSING
    dropout: float = MISSING
    attention_dropout: float = MISSING
    init_std: float = MISSING
    scale_output_init: bool = MISSING
    layer_norm_eps: float = MISSING
    recompute: Recompute = MISSING
    no_recompute_layers: list[int] = MISSING
    loss_chunk: int = MISSING


@dataclass
class BlendPart:
    """One set of a blend: the prefix of its token files and its share of the samples."""

    path: str = MISSING
    weight: float = MISSING


@dataclass
class Data:
    """What is read. ``split`` are relative shares of the documents."""

    kind: DataKind = MISSING
    path: str | None = MISSING
    blend: list[BlendPart] = MISSING
    seq_len: int = MISSING
    split: list[float] = MISSING
    order: Order = MISSING
    mask_eot: bool = MISSING
    overfit: bool = False  # every step sees the first global batch
    cache_dir: str = MISSING
    vocab: int = MISSING
    extensions: list[str] = MISSING
    eot_id: int | None = None  # None: what the prepared data says, else GPT-2's 50256 if the vocabulary has it
    tokenizer: str | None = None  # a tokenizer.json; None: what the prepared data says


@dataclass
class Optimizer:
    """AdamW with decoupled weight decay (not on biases and LayerNorm) and a global-norm clip."""

    lr: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    clip_norm: float = MISSING
    offload: bool = False  # float32 weights and moments in host memory, updated there


@dataclass
class Schedule:
    """Learning rate as a function of the step; see ``gpt.optim.lr_at``."""

    name: ScheduleName = MISSING
    warmup_steps: int = MISSING
    decay_steps: int = MISSING
    min_lr: float = MISSING


@dataclass
class Precision:
    """Element types."""

    dtype: DType = MISSING


@dataclass
class Trainer:
    """Horizon, batch, and what happens every so many steps (0: only at the end)."""

    max_steps: int = MISSING
    micro_batch_size: int | None = MISSING
    global_batch_size: int | None = MISSING
    save_every: int = MISSING
    eval_every: int = MISSING
    eval_batches: int = MISSING
    keep_checkpoints: int = MISSING
    resume: Resume = MISSING
    log_every: int = MISSING


@dataclass
class Wandb:
    """Weights & Biases."""

    enabled: bool = MISSING
    project: str = MISSING
    entity: str | None = None
    mode: WandbMode = MISSING
    name: str | None = None
    group: str | None = None
    links: str | None = None
    checkpoints: bool = MISSING
    init_timeout: int = MISSING


@dataclass
class Logger:
    """Where records go besides metrics.jsonl."""

    tensorboard: bool = MISSING
    wandb: Wandb = field(default_factory=Wandb)


@dataclass
class Config:
    """One job, whole."""

    task: Task = MISSING
    seed: int = MISSING
    tags: list[str] = MISSING
    notes: str = MISSING
    yes: bool = False  # what a terminal would be asked is granted
    dry_run: bool = False  # show what a cluster would be told
    checkpoint: str | None = None  # a run, or one of its checkpoints; None: the run of this configuration
    prompt: str = MISSING  # what ``generate.prompt`` is unless it is given itself
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = field(default_factory=Precision)
    trainer: Trainer = field(default_factory=Trainer)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)
    serve: Serve = field(default_factory=Serve)
    prepare: Prepare = field(default_factory=Prepare)
    plan: Plan = field(default_factory=Plan)
    import_weights: ImportWeights = field(default_factory=ImportWeights)
    export: Export = field(default_factory=Export)
    grid: Grid = field(default_factory=Grid)
    optuna: Optuna = field(default_factory=Optuna)
    report: Report = field(default_factory=Report)
    logger: Logger = field(default_factory=Logger)
    cluster: Cluster = field(default_factory=Cluster)
    device: DeviceSpec = field(default_factory=DeviceSpec)


def typed(plain: Any) -> Config:
    """Turn a resolved plain mapping (a job's ``config``) into dataclasses.

    Args:
        plain: nested dict or DictConfig with every value present.

    Raises:
        omegaconf.errors.OmegaConfBaseException: on an unknown key or a wrong type.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def plain(config: Config) -> dict[str, Any]:
    """The inverse of ``typed``: only str, int, float, bool, None, list and dict, as JSON holds them."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def replicas(config: Config) -> int:
    """Model replicas that read different samples."""
    return config.parallel.dp_degree * config.parallel.sharding_degree


def world_size(config: Config) -> int:
    """Number of ranks."""
    return replicas(config) * config.parallel.mp_degree * config.parallel.pp_degree


def global_batch_size(config: Config) -> int:
    """Samples per step; without a given number, one micro batch per replica."""
    return config.trainer.global_batch_size or (config.trainer.micro_batch_size or 1) * replicas(config)


def micro_batch_size(config: Config) -> int:
    """Samples of one forward pass; without a given number, a replica's share in one piece per pipeline stage."""
    share = global_batch_size(config) // replicas(config) // config.parallel.pp_degree
    return config.trainer.micro_batch_size or max(1, share)


def accumulate_steps(config: Config) -> int:
    """Micro batches that one replica adds up before a step."""
    return global_batch_size(config) // (micro_batch_size(config) * replicas(config))


def one_rank(config: Config) -> Config:
    """The same job with all degrees 1."""
    alone = Parallel(1, 1, config.parallel.sharding_stage, 1, 1, 1, False)
    return dataclasses.replace(config, parallel=alone)


def padded_vocab(config: Config) -> int:
    """Rows of the embedding table: ``model.vocab`` rounded up to a multiple of 128 x mp_degree."""
    return padded(config.model.vocab, config.parallel.mp_degree)


def padded(vocab: int, mp: int) -> int:
    """``vocab`` rounded up to a multiple of 128 x ``mp``."""
    return -(-vocab // (128 * mp)) * 128 * mp
