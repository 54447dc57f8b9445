"""The typed schema: every key, its type and its meaning. Values live in ``conf/``.

Neither Hydra nor Paddle is imported here, so that a worker can read a job without the one and a laptop can plan a 175B
run without the other. Rules between fields: ``gpt.config.rules``.

A run's name hashes its configuration. A key that is added later records in its ``metadata`` the generation of the
schema that it came ``since``, and as ``default`` the plain value that stands for what was done before: with it the key
is no part of the name (``gpt.runs.run_dir.identity``). It stays as recorded even if conf/ has another value one day.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from omegaconf import MISSING

from gpt.config.cluster import Cluster
from gpt.config.task_schemas import (
    DeviceSpec,
    Evaluate,
    Export,
    Generate,
    Grid,
    ImportWeights,
    Optuna,
    Plan,
    Prepare,
    Report,
    Serve,
)


class EngineKind(Enum):
    """The distributed engine: Fleet's layers and groups, or Paddle's semi-auto engine."""

    fleet = "fleet"
    auto = "auto"


@dataclass(frozen=True)
class Parallel:
    """Degrees; their product is the number of ranks. Replicas = dp_degree x sharding_degree."""

    dp_degree: int = MISSING
    sharding_degree: int = MISSING
    sharding_stage: int = MISSING
    mp_degree: int = MISSING
    pp_degree: int = MISSING
    virtual_pp_degree: int = MISSING
    sequence_parallel: bool = MISSING
    engine: EngineKind = field(default=EngineKind.fleet, metadata={"since": 2, "default": "fleet"})
    static: bool = field(default=False, metadata={"since": 2, "default": False})  # engine=auto: a static program


def degrees_name(p: Parallel) -> str:
    """Degrees as presets are called.

    Example:
        >>> degrees_name(Parallel(2, 8, 3, 4, 1, 1, True)), degrees_name(Parallel(1, 1, 1, 1, 1, 1, False))
        ('dp2_sharding8_stage3_mp4', 'single')
    """
    degrees = {"dp": p.dp_degree, "sharding": p.sharding_degree, "mp": p.mp_degree, "pp": p.pp_degree}
    words = [f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1]
    stage = p.sharding_stage if p.sharding_degree > 1 else 1
    at = next((i + 1 for i, word in enumerate(words) if word.startswith("sharding")), 0)
    return "_".join([*words[:at], *([f"stage{stage}"] if stage > 1 else []), *words[at:]]) or "single"


# The typed schema: every key, its type and its meaning. Values live in ``conf/``.


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

    @property
    def facts(self) -> TaskFacts:
        """The task's row of ``TASKS``."""
        return TASKS[self]


class Ranks(Enum):
    """How many worker processes compute a task."""

    none = "none"  # the driver does it alone, on this machine
    one = "one"
    one_replica = "one_replica"
    any = "any"


@dataclass(frozen=True)
class TaskFacts:
    """What rules, run names and grids need to know of a task; its module in ``gpt.tasks`` has the rest."""

    ranks: Ranks = Ranks.any
    trains: bool = False  # makes runs, from a data set
    needs_checkpoint: bool = False  # works on a trained run, or on one of its checkpoints
    once_per_checkpoint: bool = False  # as a cell of a grid it is done until its run has a newer checkpoint


TASKS = {
    Task.pretrain: TaskFacts(trains=True),
    Task.evaluate: TaskFacts(needs_checkpoint=True, once_per_checkpoint=True),
    Task.generate: TaskFacts(needs_checkpoint=True, once_per_checkpoint=True),
    Task.serve: TaskFacts(Ranks.one_replica, needs_checkpoint=True),
    Task.plan: TaskFacts(Ranks.none),
    Task.prepare: TaskFacts(Ranks.none),
    Task.import_weights: TaskFacts(Ranks.none),
    Task.export: TaskFacts(Ranks.one, needs_checkpoint=True),
    Task.report: TaskFacts(Ranks.none),
}


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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class BlendPart:
    """One set of a blend: the prefix of its token files and its share of the samples."""

    path: str = MISSING
    weight: float = MISSING


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Optimizer:
    """The optimizer. Biases and LayerNorm have no weight decay; gradients are clipped by their global norm."""

    name: str = field(default="adamw", metadata={"since": 2, "default": "adamw"})  # a row of gpt.config.optimizers
    lr: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    clip_norm: float = MISSING
    momentum: float = field(default=0.9, metadata={"since": 2, "default": 0.9})  # of sgd
    offload: bool = False  # float32 weights and moments in host memory, updated there


@dataclass(frozen=True)
class LRSchedule:
    """Learning rate as a function of the step; see ``gpt.train.lr_scheduler.lr_at``."""

    name: ScheduleName = MISSING
    warmup_steps: int = MISSING
    decay_steps: int = MISSING
    min_lr: float = MISSING


@dataclass(frozen=True)
class Precision:
    """Element types."""

    dtype: DType = MISSING


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Logger:
    """Where records go besides metrics.jsonl."""

    tensorboard: bool = MISSING
    wandb: Wandb = field(default_factory=Wandb)


@dataclass(frozen=True)
class Config:
    """One job, whole."""

    task: Task = MISSING
    seed: int = MISSING
    tags: list[str] = MISSING
    notes: str = MISSING
    yes: bool = False  # what a terminal would be asked is granted
    dry_run: bool = False  # show what a cluster would be told
    # A run, or one of its checkpoints; None: the run of this configuration.
    checkpoint: str | None = field(default=None, metadata={"since": 2, "default": None})
    prompt: str = MISSING  # what ``generate.prompt`` is unless it is given itself
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: LRSchedule = field(default_factory=LRSchedule)
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


# A task's section has its name. None of it changes what is trained, and it is no config group.
TASK_SECTIONS = [each.name for each in fields(Config) if each.name in Task.__members__]
