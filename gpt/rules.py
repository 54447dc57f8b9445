"""The rules between fields. Every problem of a command is found at once and says its remedy.

Pure: no Hydra, no Paddle, no file is opened. What depends on this machine is in ``launchers.host``,
what depends on data files in ``gpt.data``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt import config as schema
from gpt.config import (
    Config,
    DataKind,
    Recompute,
    Task,
    global_batch_size,
    micro_batch_size,
    replicas,
)
from gpt.config_evaluate import Detokenizer, EvaluateKind
from gpt.config_prepare import DocumentRule
from gpt.rules_cluster import cluster_problems
from gpt.rules_engine import engine_problems
from gpt.rules_plan import plan_problems
from gpt.text.request import Sampling

NO_GROUPS = (
    "seed", "tags", "notes", "checkpoint", "prompt",
    "yes", "dry_run", "evaluate", "generate", "serve", "prepare", "import_weights", "export", "plan", "grid",
    "optuna", "report",
)  # fmt: skip
BYTE_ALPHABET = 256  # of a byte-level BPE; one more for end-of-text


def check(composed: DictConfig, choices: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """Check a composed configuration against the schema and the rules.

    Args:
        composed: what Hydra composed, without its ``hydra`` node; interpolations may be unresolved.
        choices: the option chosen for each config group (``hydra.runtime.choices``).

    Returns:
        The typed configuration (None if it cannot be typed) and all problems found.
    """
    problems = group_problems(choices)
    missing = sorted(OmegaConf.missing_keys(composed))
    problems += [f"{key} has no value: give one with {key}=..." for key in missing]
    plain = OmegaConf.to_container(composed, resolve=not missing, enum_to_str=True)
    assert isinstance(plain, dict)
    problems += unknown_keys(plain)
    if missing or any(choices.get(group) is None for group in _required_groups()):
        return None, problems
    config = _as_composed(composed) or schema.typed(plain)
    return config, problems + rule_problems(config)


def _as_composed(composed: DictConfig) -> Config | None:
    """The configuration as it was composed from the schema, which has checked its types; None if a part was not."""
    hints = typing.get_type_hints(Config)
    parts = {key: kind for key, kind in hints.items() if dataclasses.is_dataclass(kind)}
    found = OmegaConf.to_object(composed)
    if isinstance(found, Config):
        return found
    assert isinstance(found, dict)
    if set(found) != set(hints) or any(type(found[key]) is not kind for key, kind in parts.items()):
        return None
    values = OmegaConf.merge(_root_values(), {key: value for key, value in found.items() if key not in parts})
    return Config(**vars(OmegaConf.to_object(values)), **{key: found[key] for key in parts})


@functools.cache
def _root_values() -> DictConfig:
    """Schema of what is not in a section: a copy of the root has lost the types of these."""
    hints = typing.get_type_hints(Config)
    fields = [(f.name, hints[f.name], dataclasses.field(default=f.default)) for f in dataclasses.fields(Config)]
    made = dataclasses.make_dataclass("Root", [each for each in fields if not dataclasses.is_dataclass(each[1])])
    structured = OmegaConf.structured(made)
    assert isinstance(structured, DictConfig)
    return structured


def known_keys(of: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of the schema, sections included."""
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_keys(hints[field.name], f"{prefix}{field.name}.")


def suggest(key: str, among: list[str]) -> str:
    """' (did you mean X?)', or nothing if nothing is near.

    Example:
        >>> suggest("trainer.max_step", ["trainer.max_steps", "seed"])
        ' (did you mean trainer.max_steps?)'
    """
    near = difflib.get_close_matches(key, among, n=1, cutoff=0.6)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = [k for k in among if k.rsplit(".", 1)[-1] == leaf][:1]
    return f" (did you mean {near[0]}?)" if near else ""


def unknown_keys(plain: dict[Any, Any]) -> list[str]:
    """Find what '+key=value' smuggled in; the strays are removed from ``plain``."""
    known = _all_keys()
    problems: list[str] = []

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for key in list(node):
            name = f"{prefix}{key}"
            if name not in known:
                problems.append(f"unknown key {name}{suggest(name, known)}")
                del node[key]
            elif isinstance(node[key], dict):
                walk(node[key], f"{name}.")

    walk(plain, "")
    return problems


@functools.cache
def _all_keys() -> list[str]:
    return list(known_keys())


def _required_groups() -> list[str]:
    groups = [f.name for f in dataclasses.fields(Config)]
    return [g for g in groups if g not in NO_GROUPS]


def group_problems(choices: dict[str, Any]) -> list[str]:
    """A group that '~group' removed, or for which a list was given."""
    removed = [group for group in _required_groups() if choices.get(group) is None]
    return [f"no option of the group {group} is chosen: choose one with {group}=..." for group in removed]


def rule_problems(config: Config) -> list[str]:
    """All violations of rules between fields, each a sentence with the numbers and the remedy."""
    return [
        *_ranges(config),
        *_model(config),
        *_parallel(config),
        *engine_problems(config),
        *_batch(config),
        *_data(config),
        *plan_problems(config),
        *cluster_problems(config),
        *(_prepare(config) if config.task is Task.prepare else ()),
        *(_serve(config) if config.task is Task.serve else ()),
        *(_evaluate(config) if config.task is Task.evaluate else ()),
    ]


def _ranges(config: Config) -> Iterator[str]:
    """Single values out of their range."""
    at_least = {
        "model.vocab": 2, "model.hidden": 1, "model.layers": 1, "model.heads": 1, "model.ffn": 1,
        "model.positions": 1, "model.loss_chunk": 0,
        "parallel.dp_degree": 1, "parallel.sharding_degree": 1, "parallel.mp_degree": 1,
        "parallel.pp_degree": 1, "parallel.virtual_pp_degree": 1,
        "data.seq_len": 1, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
        "schedule.warmup_steps": 0, "schedule.decay_steps": 1, "schedule.min_lr": 0,
        "trainer.max_steps": 1, "trainer.micro_batch_size": 1, "trainer.global_batch_size": 1,
        "trainer.save_every": 0, "trainer.eval_every": 0, "trainer.eval_batches": 1,
        "trainer.keep_checkpoints": 1, "trainer.log_every": 1,
        "evaluate.stride": 1, "evaluate.batch_size": 1, "evaluate.max_samples": 1,
        "generate.batch_size": 1, "cluster.threads": 1, "cluster.hang_seconds": 0, "seed": 0,
        "serve.port": 0, "serve.queue": 1, "serve.max_body": 1, "serve.max_texts": 1, "serve.max_tokens": 1,
        "prepare.min_length": 1, "prepare.limit": 1, "prepare.workers": 1,
    }  # fmt: skip
    for key, low in at_least.items():
        value = _get(config, key)
        if value is not None and not value >= low:
            yield f"{key}={value}: must be at least {low}"
    for key in ("model.dropout", "model.attention_dropout"):
        if not 0 <= _get(config, key) < 1:
            yield f"{key}={_get(config, key)}: a probability from 0 up to but not including 1"
    for key in ("model.init_std", "model.layer_norm_eps", "optimizer.lr", "optimizer.eps"):
        if not 0 < _get(config, key) < float("inf"):
            yield f"{key}={_get(config, key)}: must be more than 0"
    yield from Sampling.of(config.generate, config.seed).problems()
    if not config.generate.prompt:
        yield "generate.prompt is empty: there must be something to continue"
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        yield f"optimizer.betas={betas}: two numbers from 0 up to but not including 1"
    if config.schedule.min_lr > config.optimizer.lr:
        yield f"schedule.min_lr={config.schedule.min_lr} is above optimizer.lr={config.optimizer.lr}"
    if config.schedule.warmup_steps > config.schedule.decay_steps and config.schedule.name.value == "cosine":
        yield (
            f"schedule.warmup_steps={config.schedule.warmup_steps} is more than "
            f"schedule.decay_steps={config.schedule.decay_steps}"
        )


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.heads >= 1 and model.hidden % model.heads:
        yield (
            f"model.hidden={model.hidden} is not divisible by model.heads={model.heads}: "
            f"try model.heads={_nearest_divisor(model.hidden, model.heads)}"
        )
    stray = [i for i in model.no_recompute_layers if not 0 <= i < model.layers]
    if stray:
        yield f"model.no_recompute_layers={stray}: layers are numbered 0 to {model.layers - 1}"
    if model.no_recompute_layers and model.recompute is Recompute.none:
        yield "model.no_recompute_layers says which layers are exempt, but model.recompute=none"
    if config.data.seq_len > model.positions:
        yield (
            f"data.seq_len={config.data.seq_len} is longer than model.positions={model.positions}: "
            f"set data.seq_len={model.positions} or raise model.positions"
        )


def _parallel(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    mp, pp, vpp = parallel.mp_degree, parallel.pp_degree, parallel.virtual_pp_degree
    if min(mp, pp, vpp, parallel.sharding_degree, parallel.dp_degree) < 1:
        return  # said by _ranges
    for name in ("heads", "ffn"):
        if getattr(model, name) % mp:
            yield f"model.{name}={getattr(model, name)} is not divisible by parallel.mp_degree={mp}"
    if model.layers % (pp * vpp):
        yield (
            f"model.layers={model.layers} is not divisible by parallel.pp_degree x "
            f"parallel.virtual_pp_degree = {pp} x {vpp} = {pp * vpp}"
        )
    if vpp > 1 and pp <= 2:
        yield f"parallel.virtual_pp_degree={vpp} needs parallel.pp_degree of at least 3, not {pp}"
    if parallel.sequence_parallel and mp == 1:
        yield "parallel.sequence_parallel=true needs parallel.mp_degree of at least 2"
    if parallel.sequence_parallel and config.data.seq_len % mp:
        yield (f"parallel.sequence_parallel: data.seq_len={config.data.seq_len} is not divisible by mp_degree={mp}")
    if parallel.sharding_stage not in (1, 2, 3):
        yield f"parallel.sharding_stage={parallel.sharding_stage}: 1, 2 or 3"
    elif parallel.sharding_stage > 1 and pp > 1:
        yield (
            f"parallel.sharding_stage={parallel.sharding_stage} does not go with parallel.pp_degree={pp}, "
            "whose schedule adds up the tied table's gradients itself: use parallel.sharding_stage=1"
        )


def _batch(config: Config) -> Iterator[str]:
    trainer, parallel = config.trainer, config.parallel
    if min(replicas(config), parallel.pp_degree, trainer.micro_batch_size or 1) < 1:
        return  # said by _ranges
    unit = micro_batch_size(config) * replicas(config)
    total = global_batch_size(config)
    if total % unit:
        below, above = total // unit * unit, -(-total // unit) * unit
        yield (
            f"trainer.global_batch_size={total} is not divisible by trainer.micro_batch_size x replicas = "
            f"{micro_batch_size(config)} x {replicas(config)} = {unit}: "
            f"try {' or '.join(str(n) for n in (below, above) if n)}"
        )
    elif parallel.virtual_pp_degree > 1 and (total // unit) % parallel.pp_degree:
        yield (
            f"virtual pipeline: {total // unit} accumulate steps are not divisible by "
            f"parallel.pp_degree={parallel.pp_degree}"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if len(data.split) != 3 or min(data.split, default=0) < 0 or not data.split[0] > 0:
        yield f"data.split={data.split}: three shares (train, validation, test), none negative, train above 0"
    if data.kind in (DataKind.stdlib, DataKind.text) and not BYTE_ALPHABET < data.vocab <= config.model.vocab:
        yield (
            f"data.vocab={data.vocab}: a byte-level BPE needs at least {BYTE_ALPHABET + 1} tokens "
            f"and at most model.vocab={config.model.vocab}"
        )
    if data.kind is DataKind.blend and not data.blend:
        yield "data.blend is empty: 'data.blend=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]'"
    for part in data.blend:
        if not 0 < part.weight < float("inf"):
            yield f"data.blend: {part.path} has weight {part.weight}, which must be more than 0"
    if data.eot_id is not None and not 0 <= data.eot_id < config.model.vocab:
        yield f"data.eot_id={data.eot_id} is outside the vocabulary of model.vocab={config.model.vocab} tokens"


def _prepare(config: Config) -> Iterator[str]:
    prepare = config.prepare
    if not prepare.input:
        yield "prepare.input has no value: give files, folders, globs, or - with prepare.input=..."
    if not prepare.output:
        yield "prepare.output has no value: give the prefix of the files to make with prepare.output=..."
    if prepare.tokenizer is None and prepare.vocab <= BYTE_ALPHABET:
        yield f"prepare.vocab={prepare.vocab}: a byte-level BPE needs at least {BYTE_ALPHABET + 1} tokens"
    if prepare.tokenizer is None and prepare.input == "-":
        yield (
            "prepare.input=- needs prepare.tokenizer=...: training one reads the text before it is encoded, "
            "and standard input comes only once"
        )
    for key in ("val_share", "max_bad"):
        if not 0 <= getattr(prepare, key) < 1:
            yield f"prepare.{key}={getattr(prepare, key)}: a share from 0 up to but not including 1"
    if (prepare.document in (DocumentRule.literal, DocumentRule.regex)) != bool(prepare.separator):
        yield f"prepare.document={prepare.document.value}: prepare.separator goes with literal and regex only"
    elif prepare.document is DocumentRule.regex:
        try:
            re.compile(str(prepare.separator))
        except re.error as error:
            yield f"prepare.separator={prepare.separator}: not a regular expression ({error})"


def _serve(config: Config) -> Iterator[str]:
    if config.serve.port > 65535:
        yield f"serve.port={config.serve.port}: at most 65535"
    if not 0 < config.serve.queue_seconds < float("inf"):
        yield f"serve.queue_seconds={config.serve.queue_seconds}: must be more than 0"
    if replicas(config) > 1:
        yield (
            f"task=serve: parallel.dp_degree={config.parallel.dp_degree} and parallel.sharding_degree="
            f"{config.parallel.sharding_degree} would make {replicas(config)} copies of the model that answer the same "
            "request: start as many servers with other ports behind a balancer; mp and pp degrees share one model out"
        )


def _evaluate(config: Config) -> Iterator[str]:
    """What does not depend on the trained run; the rest is in ``gpt.evaluation``."""
    evaluate, kind = config.evaluate, config.evaluate.kind
    if kind is EvaluateKind.split and evaluate.path is not None:
        yield (
            f"evaluate.path={evaluate.path} goes with evaluate.kind=text or cloze; "
            "the split of other token files: data=tokens data.path=..."
        )
    if kind is not EvaluateKind.split and not evaluate.path:
        yield f"evaluate.kind={kind.value} reads a file: name it with evaluate.path=..."
    if kind is not EvaluateKind.text and evaluate.detokenizer is not Detokenizer.none:
        yield f"evaluate.detokenizer={evaluate.detokenizer.value} goes with evaluate.kind=text, not {kind.value}"
    if kind is EvaluateKind.cloze and evaluate.stride is not None:
        yield f"evaluate.stride={evaluate.stride}: evaluate.kind=cloze has passages, not windows"


def _nearest_divisor(of: int, near: int) -> int:
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: (abs(d - near), d))
